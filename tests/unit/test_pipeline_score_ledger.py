"""Scores are committed once per instance, whatever runs beside each other and wherever they are cut."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyarrow as pa
import pytest
from lake_rows import NOW, instance_rows

from memmc.errors import DataError, UsageError
from memmc.lake.schemas import INSTANCES, QUALITY, SCORES
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.tables import Lake
from memmc.pipeline.score_ledger import ScoreLedger
from memmc.pipeline.score_plan import plan_scores
from memmc.scoring.actor import complete

FIXED = {
    "cohort": "a", "model": "m/1", "model_digest": "d", "calibration_id": "c", "dataset_version": 0,
    "preprocess_id": "p", "scorer": "l1", "run": "r", "scored_at": NOW,
}  # fmt: skip


def shard(lake: Lake, uids: list[str], abnormal: bool = False, not_scored: str | None = None) -> ShardFile:
    columns = {"sop_instance_uid": pa.array(uids), "patient_key": pa.array(uids)}
    if not_scored is None:
        columns["anomaly_score"] = pa.array([1.0] * len(uids))
        columns["is_abnormal"] = pa.array([abnormal] * len(uids))
    return write_shard(lake.storage, SCORES, complete(columns, len(uids), {**FIXED, "not_scored": not_scored}))


def ledger(lake: Lake, **where: str) -> ScoreLedger:
    keys = {"cohort": "a", "model_digest": "d", "calibration_id": "c", **where}
    return ScoreLedger(lake, **keys)


def uids_of(lake: Lake) -> list[str]:
    return sorted(lake.read(SCORES, ["sop_instance_uid"])["sop_instance_uid"].to_pylist())


def test_a_run_drops_what_another_committed_since_it_looked(tmp_path):
    lake = Lake(tmp_path)
    first, second = ledger(lake), ledger(lake)
    added = first.commit([shard(lake, ["u1", "u2"], abnormal=True)], "r1", 1)
    assert added and (added.scored, added.abnormal) == (2, 2)
    added = second.commit([shard(lake, ["u2", "u3"]), shard(lake, ["u1"])], "r2", 1)
    assert added and (added.scored, added.abnormal) == (1, 0)
    assert second.commit([shard(lake, ["u1", "u3"])], "r2", 2) is None
    assert uids_of(lake) == ["u1", "u2", "u3"]
    assert first.refresh() and first.scored == {"u1", "u2", "u3"} and not first.refresh()


def test_without_turns_the_same_two_runs_would_score_an_instance_twice(tmp_path):
    """The negative control: it is the ledger that keeps them apart."""
    lake = Lake(tmp_path)
    lake.commit(SCORES, [shard(lake, ["u1", "u2"])], "r1")
    lake.commit(SCORES, [shard(lake, ["u2", "u3"])], "r2")
    assert uids_of(lake) == ["u1", "u2", "u2", "u3"]


def test_other_models_and_calibrations_do_not_count(tmp_path):
    lake = Lake(tmp_path)
    ledger(lake).commit([shard(lake, ["u1"])], "r1", 1)
    for other in ({"calibration_id": "c2"}, {"model_digest": "d2"}, {"cohort": "b"}):
        assert not ledger(lake, **other).scored


def test_a_reason_gives_way_to_a_score_and_not_the_other_way(tmp_path):
    lake = Lake(tmp_path)
    one = ledger(lake)
    one.commit([shard(lake, ["u1", "u2"], not_scored="SELECT_VIEW")], "r1", 1)
    assert one.commit([shard(lake, ["u1"], not_scored="SELECT_VIEW")], "r1", 2) is None
    added = one.commit([shard(lake, ["u1"])], "r1", 3)
    assert added and added.scored == 1
    assert one.commit([shard(lake, ["u1"], not_scored="SELECT_VIEW")], "r1", 4) is None
    assert (one.scored, one.not_scored) == ({"u1"}, {"u1", "u2"})


def test_many_runs_at_once_each_cut_at_random_leave_every_instance_once(tmp_path):
    lake, uids = Lake(tmp_path), [f"u{index:02d}" for index in range(40)]

    def run(number: int, *, cut: bool) -> None:
        rng, mine = random.Random(number), ledger(lake)
        todo = [uid for uid in uids if uid not in mine.scored]
        rng.shuffle(todo)
        for step, start in enumerate(range(0, len(todo), 10), start=1):
            written = shard(lake, todo[start : start + 10])
            if cut and rng.random() < 0.3:
                return  # the shard stays behind, written and never committed
            mine.commit([written], f"run{number}", step)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: run(number, cut=True), range(9)))
    run(99, cut=False)
    assert uids_of(lake) == uids


def gate(lake: Lake, uid: str, flags: list[str]) -> None:
    row = {"cohort": "a", "sop_instance_uid": uid, "patient_key": "p", "flags": flags, "gated_at": NOW}
    lake.append(QUALITY, pa.Table.from_pylist([{**row, "perceptual_hash": "0" * 16, "thumbnail": b"", "gate_id": "g",
                                                "run": "r"}]))  # fmt: skip


def test_every_instance_is_either_to_be_scored_or_gets_a_reason(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=12))
    gate(lake, "uid1", ["QC_BLANK"])
    plan = plan_scores(lake, "a", ledger(lake))
    assert (plan.stored, plan.scored, plan.to_score) == (6, 0, 5)
    reasons = {row["sop_instance_uid"]: row["not_scored"] for row in plan.not_scored.to_pylist()}
    kept_out = {f"uid{index}": "FILE_EMPTY" for index in (4, 5, 10, 11)}  # excluded and quarantined; no duplicate
    assert reasons == {"uid1": "QC_BLANK", **kept_out}


def test_an_object_under_the_uid_of_a_stored_one_gets_no_row_of_its_own(tmp_path):
    lake, rows = Lake(tmp_path), instance_rows(num=6).to_pylist()
    rows[5]["sop_instance_uid"] = "uid0"
    lake.append(INSTANCES, pa.Table.from_pylist(rows))
    plan = plan_scores(lake, "a", ledger(lake))
    assert plan.not_scored["sop_instance_uid"].to_pylist() == ["uid4"]


def test_what_is_done_is_not_planned_again_and_a_limit_bounds_the_rest(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=12))
    mine = ledger(lake)
    mine.commit([shard(lake, ["uid0", "uid6"]), shard(lake, ["uid4"], not_scored="FILE_EMPTY")], "r1", 1)
    plan = plan_scores(lake, "a", mine)
    assert (plan.stored, plan.scored, plan.to_score) == (6, 2, 4)
    assert "uid4" not in plan.not_scored["sop_instance_uid"].to_pylist()
    assert plan_scores(lake, "a", mine, limit=3).to_score == 3
    assert len({key for unit in plan.units for key in unit.keys.to_pylist()}) == 4


def test_since_takes_a_version_or_a_date(tmp_path):
    lake = Lake(tmp_path)
    first = lake.append(INSTANCES, instance_rows())
    later = instance_rows(start=6).to_pylist()
    for row in later:
        row["ingested_at"] = NOW + timedelta(days=10)
    lake.append(INSTANCES, pa.Table.from_pylist(later))
    assert plan_scores(lake, "a", ledger(lake)).to_score == 6
    for since in (str(first), "2026-01-05", "2026-01-12T03:04:05+00:00"):
        plan = plan_scores(lake, "a", ledger(lake), since)
        assert (plan.to_score, plan.not_scored.num_rows) == (3, 2)
    with pytest.raises(DataError, match="since then"):
        plan_scores(lake, "a", ledger(lake), "2027-01-01")
    with pytest.raises(UsageError, match="--since"):
        plan_scores(lake, "a", ledger(lake), "yesterday")
