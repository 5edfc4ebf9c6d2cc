"""The gate on a lake: what it flags, that it works once, and that training and evaluation leave it out."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from drawn_chests import TOP, chest

from memmc.config import Config, load_config
from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES, LABELS, QUALITY
from memmc.lake.tables import Lake
from memmc.pipeline.quality import flags_of, gate, kept_from_scores, preview
from memmc.pipeline.select import normal_table, normals

SPLITS = ("train", "train", "train", "calibrate", "test")


def rows(images: dict[str, np.ndarray], cohort: str = "c", label: str = "normal", **facts: object) -> pa.Table:
    made = [
        {
            "cohort": cohort,
            "object_key": f"{cohort}-{uid}",
            "source_ref": "s",
            "outcome": "stored",
            "split": SPLITS[number % 5],
            "content_key": uid,
            "size_bytes": 1,
            "patient_key": f"patient of {uid}",
            "sop_instance_uid": uid,
            "label": label,
            "preprocess_id": "p",
            "pixels": image.astype("<u2").tobytes(),
            "height": 64,
            "width": 64,
            "channels": 1,
            "bits": 16,
            "rows": 2000,
            "columns": 2000,
            "pixel_mean": 0.5,
            "pixel_std": 0.1,
            "ingest_run": "r",
            "ingested_at": datetime(2026, 1, 1, tzinfo=UTC),
            **facts,
        }
        for number, (uid, image) in enumerate(images.items())
    ]
    return pa.Table.from_pylist(made)


CHESTS = {f"n{number:03d}": chest(number) for number in range(150)}
BAD = {
    "turned": (chest(500)[::-1, ::-1], ("QC_ORIENTATION",)),
    "inverted": (TOP - chest(501), ("QC_ORIENTATION",)),
    "noise": (np.random.default_rng(0).integers(0, TOP, (64, 64)), ("QC_OOD",)),
    "grey": (np.full((64, 64), 99), ("QC_CONSTANT",)),
    "copy": (np.rint(chest(7) * 0.9 + 500), ("QC_DUPLICATE_PIXELS",)),
}


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])


@pytest.fixture
def lake(config: Config) -> Lake:
    lake = Lake(config.lake.uri)
    lake.append(INSTANCES, rows(CHESTS), "first")
    return lake


def test_the_gate_flags_what_is_new_once_and_what_is_flagged_is_not_learned_from(config, lake):
    assert preview(config, "c").counts == {"instances": 150, "flagged": 0, "to look at": 150}
    first = gate(config, "c")
    assert (first.instances, first.gated) == (150, 150)
    assert first.flagged <= 2
    lake.append(INSTANCES, rows({uid: image for uid, (image, _) in BAD.items()}, split="train"), "second")
    second = gate(config, "c")
    assert (second.instances, second.gated) == (155, 5)
    flags = flags_of(lake, "c")
    assert {uid: flags.get(uid) for uid in BAD} == {uid: expected for uid, (_, expected) in BAD.items()}
    assert second.flagged == len(flags) <= len(BAD) + 2
    assert sum(second.flags.values()) == sum(map(len, flags.values()))
    learned = normal_table(lake, "c", "train")["sop_instance_uid"].to_pylist()
    assert set(learned) == {f"n{n:03d}" for n in range(150) if n % 5 < 3} - flags.keys()
    stored = lake.read(INSTANCES, ["sop_instance_uid"], filter={"cohort": "c", "split": "train", "outcome": "stored"})
    assert learned == [uid for uid in stored["sop_instance_uid"].to_pylist() if uid not in flags]  # in their order
    assert [row["sop_instance_uid"] for row in normals(lake, "c", "train")] == learned
    rows_before, version = lake.read(QUALITY, ["sop_instance_uid"]).num_rows, lake.version(QUALITY)
    third = gate(config, "c")
    assert (third.gated, third.flags, third.version) == (0, second.flags, version)
    assert lake.read(QUALITY, ["sop_instance_uid"]).num_rows == rows_before
    assert lake.history(QUALITY)[0]["metadata"]["cohort"] == "c"


def test_other_rules_look_again_and_the_newest_verdict_holds(config, lake):
    gate(config, "c")
    strict = load_config(overrides=[f"lake.uri={config.lake.uri}", "quality.min_side_px=3000"])
    assert gate(strict, "c").flags["QC_TOO_SMALL"] == 150
    with pytest.raises(DataError, match="keeps out all 90 normal images"):
        normals(lake, "c", "train")
    assert "QC_TOO_SMALL" not in gate(config, "c").flags
    assert len(normals(lake, "c", "train")) >= 88


def test_a_cohort_without_normals_is_compared_with_those_of_another(config, lake):
    gate(config, "c")
    ward = {uid: image for uid, (image, _) in BAD.items() if uid != "copy"} | {"new": chest(900)}
    lake.append(INSTANCES, rows(ward, "ward", "unknown"), "ward")
    alone = gate(config, "ward")
    assert alone.flags == {"QC_CONSTANT": 1}  # nothing to compare with
    assert gate(config, "ward", reference="c").gated == 5
    assert flags_of(lake, "ward") == {uid: expected for uid, (_, expected) in BAD.items() if uid != "copy"}
    assert gate(config, "ward", reference="c").gated == gate(config, "ward").gated == 0
    assert gate(config, "c", reference="ward").gated == 0  # has normals of its own
    assert gate(config, "ward", reference="nobody").flags == {"QC_CONSTANT": 1}


def test_a_label_outweighs_suspicion_where_images_are_scored_and_never_where_they_are_learned(config, lake):
    gate(config, "c")
    lake.append(INSTANCES, rows({uid: image for uid, (image, _) in BAD.items()}, label="unknown", split="train"), "bad")
    gate(config, "c")
    assert {uid: kept_from_scores(lake, "c").get(uid) for uid in BAD} == {uid: BAD[uid][1][0] for uid in BAD}
    said = {"turned": "normal", "noise": "abnormal", "grey": "normal", "copy": "unknown"}
    row = {"cohort": "c", "source": "person", "labelled_at": datetime(2026, 2, 1, tzinfo=UTC)}
    labels = [{**row, "sop_instance_uid": uid, "label": label} for uid, label in said.items()]
    lake.append(LABELS, pa.Table.from_pylist(labels), "labels")
    assert {uid for uid in BAD if uid in kept_from_scores(lake, "c")} == {"inverted", "grey", "copy"}
    assert not {row["sop_instance_uid"] for row in normals(lake, "c", "train")} & set(BAD)


def test_a_cohort_with_nothing_in_it_is_refused(config, lake):
    with pytest.raises(DataError, match="no stored images"):
        gate(config, "other")
    assert flags_of(lake, "other") == {}
