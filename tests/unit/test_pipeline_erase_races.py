"""An erasure beside a run that scores: whoever commits when, no row of the patient comes back."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from lake_rows import NOW
from test_lake_erasure import bytes_of, instances, patient

from memmc.config import load_config
from memmc.lake import tables
from memmc.lake.commit import LostTurnError
from memmc.lake.erasure import TURN
from memmc.lake.schemas import INSTANCES, SCORES
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease
from memmc.pipeline import erase as module
from memmc.pipeline.erase import erase
from memmc.pipeline.score_ledger import ScoreLedger
from memmc.scoring.actor import complete

PATIENT = patient(1)
FIXED = {
    "cohort": "a", "model": "m/1", "model_digest": "d", "calibration_id": "c", "dataset_version": 0,
    "preprocess_id": "p", "scorer": "l1", "run": "r", "scored_at": NOW, "not_scored": None,
}  # fmt: skip


@pytest.fixture
def lake(tmp_path, monkeypatch) -> Lake:
    monkeypatch.chdir(tmp_path)
    lake = Lake(tmp_path / "lake")
    lake.append(INSTANCES, instances(range(12)))
    return lake


def scored(lake: Lake) -> ShardFile:
    """A shard of scores of everything that is stored now, not yet committed."""
    rows = lake.read(INSTANCES, ["sop_instance_uid", "patient_key"], filter={"outcome": "stored"})
    columns = {name: rows[name].combine_chunks() for name in rows.column_names}
    columns |= {"anomaly_score": pa.array([1.0] * rows.num_rows), "is_abnormal": pa.array([False] * rows.num_rows)}
    return write_shard(lake.storage, SCORES, complete(columns, rows.num_rows, FIXED))


def ledger(lake: Lake) -> ScoreLedger:
    return ScoreLedger(lake, "a", "d", "c")


def forget(lake: Lake) -> module.EraseResult:
    return erase(load_config(overrides=[f"lake.uri={lake.uri}"]), "patient", PATIENT)


def of_patient(lake: Lake) -> int:
    return lake.read(SCORES, ["patient_key"])["patient_key"].to_pylist().count(PATIENT)


def before_commit(monkeypatch: pytest.MonkeyPatch, table: str, run: str, action: Callable[[], object]) -> None:
    """Do something once, between a commit's last look and the commit itself."""
    real, done = Lake.commit, []

    def commit(self, name, files, run_id, *arguments, **more):
        if name == table and run_id.startswith(run) and not done:
            done.append(run_id)
            action()
        return real(self, name, files, run_id, *arguments, **more)

    monkeypatch.setattr(tables.Lake, "commit", commit)


def test_a_plan_made_before_the_erasure_brings_nothing_back(lake):
    mine = ledger(lake)
    shard = scored(lake)
    everyone = shard.num_rows
    forget(lake)
    added = mine.commit([shard], "score-1", 1)
    assert added and 0 < added.scored < everyone
    assert of_patient(lake) == 0
    assert PATIENT.encode() not in bytes_of(lake)


def test_an_erasure_between_the_last_look_and_the_commit(lake, monkeypatch):
    mine, shard = ledger(lake), scored(lake)
    with lease(lake, "score-1"):
        before_commit(monkeypatch, SCORES, "score-1", lambda: forget(lake))
        assert mine.commit([shard], "score-1", 1)
    assert of_patient(lake) == 0 and lake.turn(SCORES, TURN) == 1
    assert PATIENT.encode() not in bytes_of(lake)


def test_without_the_turn_the_same_run_brings_the_patient_back(lake, monkeypatch):
    """The negative control: a commit that does not hold the erasures' turn."""
    shard = scored(lake)
    before_commit(monkeypatch, SCORES, "score-1", lambda: forget(lake))
    lake.commit(SCORES, [shard], "score-1")
    assert of_patient(lake) > 0


def test_a_commit_between_the_scores_and_the_instances_is_taken_out_again(lake, monkeypatch):
    ledger(lake).commit([scored(lake)], "score-1", 1)
    mine = of_patient(lake)
    other = ScoreLedger(lake, "a", "d2", "c")
    shard = scored(lake)
    before_commit(monkeypatch, INSTANCES, "erase-", lambda: other.commit([shard], "score-2", 1))
    result = forget(lake)
    assert mine > 0 and of_patient(lake) == 0 and result.rows[SCORES] == 2 * mine
    assert lake.read(SCORES, ["patient_key"]).num_rows > 0
    assert PATIENT.encode() not in bytes_of(lake)


def test_a_held_turn_is_not_taken(lake):
    lake.commit(SCORES, [], "r1", holds={TURN: 0})
    lake.commit(SCORES, [], "r2", holds={TURN: 0})
    assert lake.turn(SCORES, TURN) == 0
    lake.commit(SCORES, [], "r3", turns={TURN: 0})
    with pytest.raises(LostTurnError):
        lake.commit(SCORES, [], "r4", holds={TURN: 0})
    lake.commit(SCORES, [], "r5", holds={TURN: 1})
