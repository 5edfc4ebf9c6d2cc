"""Score tables and calibrations written before later columns: read, judged by, and written on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from lake_rows import NOW, instance_rows
from test_pipeline_score_ledger import ledger, shard

from memmc.errors import DataError
from memmc.lake import schemas
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline.localise import localise_masks
from memmc.pipeline.models import OpenModel
from memmc.pipeline.score_plan import plan_scores
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.scoring.early_stop import StopRule
from memmc.scoring.regions import region_judge
from memmc.scoring.strata import judge_of
from memmc.scoring.studies import study_rows

LATER = {
    SCORES: {"stratum", "not_scored", "uncertainty_map", "regions", "passes_used"},
    CALIBRATIONS: {
        "passes", "strata_columns", "strata", "study_p_values", "map_level", "normal_peaks", "early_stop",
    },
}  # fmt: skip
MODEL = OpenModel("m/1", "d", Path("nowhere"), {"cohort": "a", "dataset_version": 0})


def first_schema(table: str) -> pa.Schema:
    """Return a table's schema as it first was; every score had a value then."""
    known = [field for field in SCHEMAS[table] if field.name not in LATER[table]]
    return pa.schema([field.with_nullable(False) if field.name == "anomaly_score" else field for field in known])


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A lake of the first version: four instances stored in two shards, two of them scored."""
    lake = Lake(tmp_path)
    for start in (0, 6):
        rows = instance_rows(start)
        count = rows.num_rows
        rows = rows.append_column("preprocess_id", pa.array(["p"] * count))
        lake.append(INSTANCES, rows)
    keys = {"cohort": "a", "model": "m/1", "model_digest": "d", "dataset_version": 0, "preprocess_id": "p"}
    keys |= {"calibration_id": "c", "scorer": "l1"}
    scores = [
        {
            **keys,
            "sop_instance_uid": uid,
            "patient_key": uid,
            "anomaly_score": value,
            "p_value": p,
            "is_abnormal": p < 0.1,
        }
        | {"scored_at": NOW, "run": "r", "study_uid": "s"}
        for uid, value, p in (("uid0", 1.0, 0.5), ("uid1", 3.0, 0.05))
    ]
    calibration = {**keys, "false_positive_rate": 0.1, "threshold": 2.0, "num_normals": 10, "map_scale": 1.0}
    calibration |= {"normal_scores": [0.2 * n for n in range(1, 11)], "scorer_state": b"x", "created_at": NOW}
    with monkeypatch.context() as patched:
        first = {**SCHEMAS, SCORES: first_schema(SCORES), CALIBRATIONS: first_schema(CALIBRATIONS)}
        patched.setattr(schemas, "SCHEMAS", first)
        patched.setattr("memmc.lake.tables.SCHEMAS", first)
        lake.append(SCORES, pa.Table.from_pylist(scores))
        lake.append(CALIBRATIONS, pa.Table.from_pylist([calibration]))
    for table in (SCORES, CALIBRATIONS):
        found = {field.name for field in DeltaTable(tmp_path / table).schema().fields}
        assert found == set(SCHEMAS[table].names) - LATER[table]
    return Lake(tmp_path)


def test_old_scores_are_read_and_counted_as_done(old):
    rows = score_rows(old, "a", MODEL, "c", ("regions", "passes_used"))
    assert {uid: row["anomaly_score"] for uid, row in rows.items()} == {"uid0": 1.0, "uid1": 3.0}
    assert all(row["not_scored"] is row["regions"] is row["passes_used"] is None for row in rows.values())
    known = ledger(old)
    assert known.scored == {"uid0", "uid1"} and known.abnormal == 1
    plan = plan_scores(old, "a", known)
    assert (plan.stored, plan.scored, plan.to_score) == (6, 2, 4)
    wanted = ledger(old, model_digest="another")
    assert plan_scores(old, "a", wanted).to_score == 6  # the negative control: it is the old rows that count


def test_an_old_calibration_judges_without_what_came_later(old):
    calibration = newest_calibration(old, MODEL)
    assert judge_of(calibration).judge([2.5, 0.1], ["pooled"] * 2).is_abnormal_B.tolist() == [True, False]
    assert StopRule.from_row(calibration["early_stop"]) is None
    assert region_judge(calibration, None) is None
    rows = [{**row, "label": "normal", "split": "test"} for row in score_rows(old, "a", MODEL, "c").values()]
    (study,) = study_rows(rows, calibration["study_p_values"], 0.1)
    assert study["worst_instance"] == "uid1" and study["p_value"] is None
    with pytest.raises(DataError, match="no level for maps"):
        localise_masks([], [], calibration, 0)


def test_scores_of_today_go_into_the_old_table(old, tmp_path):
    writer = ledger(old)
    reason = writer.commit([shard(old, ["uid3"], not_scored="SELECT_VIEW")], "r2", 1)
    added = writer.commit([shard(old, ["uid1", "uid2"])], "r2", 2)
    assert reason and reason.not_scored == 1
    assert added and added.scored == 1  # uid1 has its old score, and keeps it
    rows = score_rows(old, "a", MODEL, "c", without_score=True)
    found = {uid: (row["anomaly_score"], row["not_scored"]) for uid, row in rows.items()}
    wanted = {"uid0": (1.0, None), "uid1": (3.0, None), "uid2": (1.0, None), "uid3": (None, "SELECT_VIEW")}
    assert found == wanted
    delta = DeltaTable(tmp_path / SCORES)
    assert {field.name for field in delta.schema().fields} == set(SCHEMAS[SCORES].names)
    plain = delta.to_pyarrow_table(columns=["sop_instance_uid", "passes_used"])  # other tools see the same
    assert sorted(plain["sop_instance_uid"].to_pylist()) == ["uid0", "uid1", "uid2", "uid3"]
