"""Scores without a model: the same numbers however few images are read at a time, and never more of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from watched_lake import START, batch

from memmc.config import Config, load_config
from memmc.errors import DataError
from memmc.evaluation.controls import FittedControls, control_scores
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline import assess
from memmc.pipeline.images import image_batches, read_images
from memmc.pipeline.models import OpenModel
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
