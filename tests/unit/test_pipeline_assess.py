"""Scores without a model: the same numbers however few images are read at a time, and never more of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from watched_lake import START, batch, later

from memmc.config import Config, load_config
from memmc.errors import DataError, MissingClassError, PreprocessMismatch
from memmc.evaluation.controls import FittedControls, control_scores
from memmc.lake.schemas import INSTANCES, LABELS, QUALITY, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline import assess
from memmc.pipeline import select as selection
from memmc.pipeline.images import image_batches, read_images
from memmc.pipeline.models import OpenModel
from memmc.pipeline.progress import Silent
from memmc.pipeline.select import normals

CALIBRATION = {"cohort": "cxr", "dataset_version": 1}
MODEL = OpenModel("memmc-cxr/1", "d", Path(), {**CALIBRATION, "preprocess_id": "p"})


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])


@pytest.fixture
def lake(config) -> Lake:
    lake = Lake(config.lake.uri)
    lake.append(INSTANCES, batch(1, 100, START))
    lake.append(INSTANCES, batch(2, 30, START, label="abnormal", split="test"))
    return lake


def unmet(lake: Lake) -> list[str]:
    """The test share, in another order than it lies in."""
    rows = lake.read(INSTANCES, ["sop_instance_uid"], filter={"split": "test"})
    return sorted(rows["sop_instance_uid"].to_pylist())


def test_controls_are_the_same_in_batches_and_stand_in_the_order_asked_for(config, lake, monkeypatch):
    uids, sizes = unmet(lake), []
    whole = assess.scores_without_model(config, lake, MODEL, CALIBRATION, "cxr", uids)
    real = FittedControls.scores

    def scores(self, test):
        sizes.append(len(test))
        return real(self, test)

    monkeypatch.setattr(FittedControls, "scores", scores)
    monkeypatch.setattr(assess, "_AT_ONCE", 7)
    some = assess.scores_without_model(config, lake, MODEL, CALIBRATION, "cxr", uids)
    assert max(sizes) == 7 and sum(sizes) == len(uids) == 70
    assert whole.keys() == some.keys() == {"pca_8x8", "knn_8x8", "mean_intensity", "sharpness", "mean_image"}
    for name, values in whole.items():
        np.testing.assert_allclose(some[name], values, rtol=1e-4)  # the mean image is scored in float32
    train = read_images(lake, "cxr", sorted(row["sop_instance_uid"] for row in normals(lake, "cxr", "train", 1)), 1)
    expected = control_scores(train.mean(axis=-1), read_images(lake, "cxr", uids).mean(axis=-1))
    for name, values in expected.items():
        np.testing.assert_allclose(some[name], values, rtol=1e-9)


def test_batches_hold_every_image_once(lake):
    uids = unmet(lake)
    batches = list(image_batches(lake, "cxr", uids, 16))
    assert max(len(names) for names, _ in batches) == 16
    assert sorted(name for names, _ in batches for name in names) == uids
    images = {name: image for names, some in batches for name, image in zip(names, some, strict=True)}
    np.testing.assert_array_equal(np.stack([images[uid] for uid in uids]), read_images(lake, "cxr", uids))
    with pytest.raises(DataError, match="1 of 71 instances have no pixels"):
        list(image_batches(lake, "cxr", [*uids, "absent"], 16))


def split_of(lake: Lake, split: str) -> list[dict]:
    columns = ["sop_instance_uid", "patient_key"]
    return lake.read(INSTANCES, columns, 1, {"cohort": "cxr", "split": split}).to_pylist()


@pytest.mark.parametrize("split", ["train", "calibrate"])
def test_a_learned_image_that_a_reviewer_calls_abnormal_is_no_unseen_abnormal(lake, split):
    one = split_of(lake, split)[0]
    label = {"cohort": "cxr", "sop_instance_uid": one["sop_instance_uid"], "label": "abnormal", "source": "review"}
    lake.append(LABELS, pa.Table.from_pylist([{**label, "labelled_at": later(9)}], schema=SCHEMAS[LABELS]))
    assert one["patient_key"] in selection.met_patients(lake, MODEL)
    assert one["sop_instance_uid"] not in {row["sop_instance_uid"] for row in selection.unmet(lake, MODEL, "cxr")}


def test_the_copy_of_another_patients_picture_is_not_unseen(lake):
    """A label lets it be scored; it does not make it new."""
    copy = split_of(lake, "test")[0]["sop_instance_uid"]
    assert copy in {row["sop_instance_uid"] for row in selection.unmet(lake, MODEL, "cxr")}
    row = {"cohort": "cxr", "sop_instance_uid": copy, "patient_key": "x", "flags": ["QC_DUPLICATE_PIXELS"]}
    row |= {"gate_id": "g", "run": "r", "gated_at": START, "perceptual_hash": "0" * 16, "thumbnail": b""}
    lake.append(QUALITY, pa.Table.from_pylist([row], schema=SCHEMAS[QUALITY]))
    assert copy not in {row["sop_instance_uid"] for row in selection.unmet(lake, MODEL, "cxr")}


def test_a_missing_class_has_an_error_of_its_own(config, lake):
    lake.append(INSTANCES, batch(3, 10, START, cohort="calm", split="test"))
    with pytest.raises(MissingClassError, match="10 normal and 0 abnormal"):
        selection.unmet(lake, MODEL, "calm")


def test_masks_are_refused_where_they_cannot_be_placed(config, lake, tmp_path):
    with pytest.raises(PreprocessMismatch, match=r"--masks are placed by the settings data.*call with those"):
        assess.assess(config, lake, MODEL, "cxr", tmp_path / "m.csv", Silent())


@pytest.mark.parametrize(("count", "fitted"), [(9, False), (10, True)])
def test_the_mean_image_is_left_out_where_its_score_cannot_be_fitted(config, tmp_path, count, fitted):
    lake = Lake(config.lake.uri)
    lake.append(INSTANCES, batch(1, 12, START, split="train"))
    lake.append(INSTANCES, batch(2, count, START, split="calibrate"))
    lake.append(INSTANCES, batch(3, 4, START, split="test"))
    found = assess.scores_without_model(config, lake, MODEL, {**CALIBRATION, "dataset_version": 3}, "cxr", unmet(lake))
    assert ("mean_image" in found) == fitted


def test_what_the_model_it_began_from_had_learned_is_not_unseen(lake):
    other = replace(MODEL, info={"cohort": "ward", "dataset_version": 0})
    assert not selection.met_patients(lake, other)
    begun = replace(other, ancestors=replace(MODEL, info=CALIBRATION).learned_from)
    learned = {row["patient_key"] for row in normals(lake, "cxr", "train", 1)}
    assert selection.met_patients(lake, begun) == learned
    assert begun.learned_from == {"cxr": 1, "ward": 0}
    assert lake.version(INSTANCES) < 99  # versions of another lake say nothing here, and stop nothing
    foreign = replace(begun, ancestors={"cxr": 99, "elsewhere": 99, "ward": 99})
    assert learned <= selection.met_patients(lake, foreign)
