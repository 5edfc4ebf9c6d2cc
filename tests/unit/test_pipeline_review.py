"""Normals under review: out of the training share until accepted, out of every share once rejected."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lake_rows import NOW

from memmc.config import Config, load_config
from memmc.errors import DataError, UsageError
from memmc.lake.schemas import INSTANCES, REVIEWS, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.pins import Pins
from memmc.pipeline.review import reviews, settle, suspects
from memmc.pipeline.select import normals

NUM = 12


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])


@pytest.fixture
def lake(config) -> Lake:
    """Normals of twelve patients, every third held out; uid0 (training) and uid2 (held out) are suspect."""
    lake = Lake(config.lake.uri)
    rows = [
        {
            "cohort": "a",
            "object_key": f"{number:064x}",
            "source_ref": "",
            "outcome": "stored",
            "split": "calibrate" if number % 3 == 2 else "train",
            "content_key": f"{number:064x}",
            "size_bytes": 1,
            "patient_key": f"p{number}",
            "sop_instance_uid": f"uid{number}",
            "label": "normal",
            "preprocess_id": "p",
            "pixels": bytes(16),
            "height": 4,
            "width": 4,
            "channels": 1,
            "bits": 8,
            "pixel_mean": 0.5,
            "pixel_std": 0.1,
            "ingest_run": "run",
            "ingested_at": NOW,
        }
        for number in range(NUM)
    ]
    lake.append(INSTANCES, pa.Table.from_pylist(rows))
    odd = [
        {"cohort": "a", "sop_instance_uid": f"uid{n}", "patient_key": f"p{n}", "state": "suspect", "p_value": 0.001}
        | {"model": "m/1", "reviewed_at": NOW}
        for n in (0, 2)
    ]
    lake.append(REVIEWS, pa.Table.from_pylist(odd, schema=SCHEMAS[REVIEWS]))
    return lake


def learned(lake, split, pins=None):
    return {row["sop_instance_uid"] for row in normals(lake, "a", split, None, pins)}


def every(split):
    return {f"uid{n}" for n in range(NUM) if (n % 3 == 2) == (split == "calibrate")}


def test_suspects_are_not_learned_and_stay_among_the_held_out(lake, config):
    assert learned(lake, "train") == every("train") - {"uid0"}
    assert learned(lake, "calibrate") == every("calibrate")
    assert [row["sop_instance_uid"] for row in reviews(config, "a").instances] == ["uid0", "uid2"]


def test_accepted_ones_are_learned_and_rejected_ones_are_normal_nowhere(lake, config):
    pinned = Pins.now(lake)
    assert settle(config, "a", ["uid0"], "accepted").counts == {"accepted": 1, "suspect": 1}
    assert learned(lake, "train") == every("train")
    settle(config, "a", ["uid2", "uid4"], "rejected", label="abnormal")
    assert learned(lake, "train") == every("train") - {"uid4"}
    assert learned(lake, "calibrate") == every("calibrate") - {"uid2"}
    labels = lake.read("labels").to_pylist()
    assert {(row["sop_instance_uid"], row["label"]) for row in labels} == {("uid2", "abnormal"), ("uid4", "abnormal")}
    assert reviews(config, "a").instances == []
    assert {row["state"] for row in reviews(config, "a", every=True).instances} == {"accepted", "rejected"}
    # As pinned before, the same rows as then; through tags and back.
    again = Pins.of_tags(pinned.as_tags())
    assert again == pinned
    assert learned(lake, "train", again) == every("train") - {"uid0"}
    assert learned(lake, "calibrate", again) == every("calibrate")


def test_what_cannot_be_settled_is_said_and_nothing_is_written(lake, config):
    before = lake.version(REVIEWS)
    with pytest.raises(DataError, match="not stored"):
        settle(config, "a", ["uid0", "uid99"], "accepted")
    with pytest.raises(DataError, match="not under review"):
        settle(config, "a", ["uid1"], "accepted")
    with pytest.raises(UsageError, match="at least one"):
        settle(config, "a", [], "rejected")
    assert lake.version(REVIEWS) == before


@given(st.lists(st.floats(0.0001, 1)), st.floats(0.001, 0.5))
def test_the_limit_parts_suspects_from_the_rest(values, limit):
    rows = [{"p_value": value, "stratum": None} for value in values]
    odd = suspects(rows, limit, {"pooled": 10_000})
    assert odd == [row for row in rows if row["p_value"] <= limit + 1e-12]


def test_an_image_of_a_small_stratum_can_be_suspect():
    rows = [{"p_value": 1 / 101, "stratum": stratum} for stratum in ("few", "pooled", None)]
    assert suspects(rows, 0.001, {"pooled": 5000, "few": 100}) == rows[:1]
