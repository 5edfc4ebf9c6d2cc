"""The place that is explained, the index that is searched, the picture that is read."""

from __future__ import annotations

import io
import json

import judged_lake
import numpy as np
import pyarrow as pa
import pytest
import scored_model
import torch
from PIL import Image
from watched_lake import later

from memmc.evaluation.why_figure import surroundings, why_png
from memmc.lake.erasure import is_of_patients
from memmc.lake.schemas import CALIBRATIONS, PATCHES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline.maps import framed, read_uids
from memmc.pipeline.patch_index import PatchIndex, position
from memmc.pipeline.progress import Silent
from memmc.pipeline.select import score_rows
from memmc.pipeline.why import Explainer, place_of
from memmc.scoring.masks import random_mask_ids, reconstruct_pasted
from memmc.scoring.scorer import PastedScorer


def test_a_region_covers_the_patches_its_box_touches():
    anomaly_map = np.zeros((32, 32))
    anomaly_map[9:15, 17:24] = 1.0
    anomaly_map[16:18, 24] = 9.0
    region = {"x_px": 17, "y_px": 9, "width_px": 8, "height_px": 9}
    place = place_of(anomaly_map, region, 8)
    assert sorted(np.flatnonzero(place.mask_L)) == [6, 7, 10, 11]
    assert place.peak_patch == 6
    alone = place_of(anomaly_map, None, 8)
    assert np.flatnonzero(alone.mask_L).tolist() == [6]


def test_a_peak_outside_the_region_is_not_the_regions_patch():
    anomaly_map = np.zeros((32, 32))
    anomaly_map[:8, :8] = 5.0
    anomaly_map[24:, 24:] = 2.0
    place = place_of(anomaly_map, {"x_px": 24, "y_px": 24, "width_px": 8, "height_px": 8}, 8)
    assert place.peak_patch == 15


def test_nearest_names_the_planted_patch_first_and_each_normal_once():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(7, 16, 24)) + 20.0  # a part that all patches share
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    index = PatchIndex(tuple(scored_model.uids(7)), features.astype(np.float16))
    found = index.nearest(features[4, 9], count=3)
    assert (found[0]["sop_instance_uid"], found[0]["row"], found[0]["column"]) == ("2.25.4", 2, 1)
    assert found[0]["similarity"] == pytest.approx(1.0, abs=0.02)
    assert len({item["sop_instance_uid"] for item in found}) == 3
    centred = features - features.mean((0, 1))
    centred /= np.linalg.norm(centred, axis=2, keepdims=True)
    slow = sorted((float((centred[n] @ centred[4, 9]).max()) for n in range(7)), reverse=True)[:3]
    np.testing.assert_allclose([item["similarity"] for item in found], slow, atol=0.02)
    assert position(9, 16) == {"row": 2, "column": 1}


def test_an_erasure_looks_at_the_index():
    assert is_of_patients(PATCHES)
    assert not is_of_patients(CALIBRATIONS)


def explanation(region: dict | None) -> dict:
    return {
        "sop_instance_uid": "2.25.1",
        "model": "m/1",
        "anomaly_score": 4.2,
        "p_value": 0.01,
        "is_abnormal": True,
        "region": region,
        "patch": {"row": 0, "column": 3},
        "memory": [{"layer": 1, "head": 1, "slot": 2, "attention": 0.3, "attention_everywhere": 0.1}] if region else [],
        "nearest": [{"sop_instance_uid": "2.25.2", "row": 3, "column": 0, "similarity": 0.9}],
        "scales": [{"part": "broad residual", "share": 1.0}] if region else [],
        "levels": [0.5, 0.4] if region else [],
    }


@pytest.mark.parametrize("region", [None, {"x_px": 20, "y_px": 2, "width_px": 8, "height_px": 6}])
def test_the_picture_marks_the_region_and_is_the_same_each_time(region):
    image = np.random.default_rng(0).random((32, 32))
    arguments = (explanation(region), image, image, image * 3, 3.0, [image], 8)
    picture = why_png(*arguments)
    assert picture == why_png(*arguments)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    frame = np.abs(pixels - [0x2A, 0xA7, 0xE0]).max(-1) < 12
    assert (frame.sum() > 100) == (region is not None)
    json.dumps(explanation(region))


def test_surroundings_at_the_edge_are_black_beyond_it():
    crop = surroundings(np.ones((32, 32)), 0, 3, 8)
    assert crop.shape == (24, 24)
    assert crop[:8].max() == 0
    assert crop[8:, :16].min() == 1


def test_pictures_of_maps_frame_their_regions():
    dark = np.zeros((64, 64, 3), np.uint8)
    region = {"x_px": 4, "y_px": 8, "width_px": 8, "height_px": 4}
    ys, xs = np.nonzero(framed(dark, [region], 2.0).max(-1))
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (7, 24, 15, 24)
    assert not framed(dark, [], 2.0).any()


def test_uids_are_read_one_a_line(tmp_path):
    from memmc.errors import UsageError

    (tmp_path / "u").write_text("2.25.1\n\n 2.25.2 \n")
    assert read_uids(tmp_path / "u") == ["2.25.1", "2.25.2"]
    (tmp_path / "u").write_text("\n")
    with pytest.raises(UsageError, match="names no instance"):
        read_uids(tmp_path / "u")
    with pytest.raises(UsageError, match="one UID a line"):
        read_uids(tmp_path / "absent")


def test_the_papers_score_is_explained_by_the_passes_it_judged(tmp_path):
    config, model = judged_lake.judged(tmp_path, "score.scorer=pasted_ms_ssim", "score.passes=10")
    lake = Lake(config.lake.uri)
    explainer = Explainer.open(config, lake, model, Silent())
    uid = min(score_rows(lake, "cxr", model, "c"))
    found = explainer.explain("cxr", uid)
    loaded = explainer.loaded
    mean, std = loaded.info.pixel_mean, loaded.info.pixel_std
    images = torch.from_numpy(found.image_HWC[None]).permute(0, 3, 1, 2).contiguous()
    ids = random_mask_ids(loaded.digest, [uid], loaded.model.num_patches, loaded.model.num_keep, 10)
    passes = reconstruct_pasted(loaded.model, (images - mean) / std, ids).rescale(mean, std)
    np.testing.assert_allclose(found.expected_HW, passes.mean_BCHW[0, 0].numpy(), atol=1e-6)
    score = PastedScorer().score(images, passes).anomaly_score_B[0]
    assert found.result.anomaly_score == pytest.approx(score, abs=1e-4)
    assert found.result.scales == []
    # Random masks may never show the place; the complementary ones that slots and likeness are taken from do.
    assert len(found.result.memory) == len(found.result.nearest) == 5
    assert all(0 < use["attention"] < 1 for use in found.result.memory)
    assert explainer.picture(found).startswith(b"\x89PNG")


def test_an_image_that_stopped_early_is_explained_by_passes_that_show_every_patch(tmp_path):
    config, model = judged_lake.judged(tmp_path)
    lake = Lake(config.lake.uri)
    explainer = Explainer.open(config, lake, model, Silent())
    uids = sorted(score_rows(lake, "cxr", model, "c"))[:6]
    whole = [explainer.explain("cxr", uid) for uid in uids]
    rows = lake.read(SCORES, SCHEMAS[SCORES].names, filter={"cohort": "cxr", "sop_instance_uid": uids})
    for name, value in (("passes_used", 2), ("scored_at", later(1))):
        field = SCHEMAS[SCORES].field(name)
        column = pa.array([value] * rows.num_rows, field.type)
        rows = rows.set_column(rows.column_names.index(name), field, column)
    lake.append(SCORES, rows)
    for before in whole:
        after = explainer.explain("cxr", before.result.sop_instance_uid)
        assert not np.array_equal(after.expected_HW, before.expected_HW)  # of the two passes alone
        # Two of four passes leave half of the patches unseen: those have no tokens that attend, and no likeness.
        for found, wanted in zip(after.result.memory, before.result.memory, strict=True):
            assert found == pytest.approx(wanted)
        places = [[(item["sop_instance_uid"], item["row"]) for item in one.result.nearest] for one in (after, before)]
        assert places[0] == places[1]
