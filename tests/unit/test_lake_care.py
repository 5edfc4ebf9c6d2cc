"""verify, history, vacuum: what they find, what they must not touch."""

import json
import os
import time
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from lake_rows import instance_rows
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.errors import DataError, StorageError
from memmc.lake import vacuum as vacuums
from memmc.lake.files import write_rows
from memmc.lake.schemas import INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.lake.vacuum import LEASES, lease, vacuum
from memmc.lake.verify import shard_problem, verify


def score_rows(uids: list[str], calibration: str = "c") -> pa.Table:
    same = {"cohort": "a", "patient_key": "p", "model": "m/1", "model_digest": "d", "dataset_version": 1}
    same |= {"preprocess_id": "x", "scorer": "l1", "anomaly_score": 0.5, "run": "r", "calibration_id": calibration}
    same |= {"scored_at": datetime(2026, 1, 1, tzinfo=UTC)}
    return pa.Table.from_pylist([{**same, "sop_instance_uid": uid} for uid in uids])


@pytest.fixture
def lake(tmp_path):
    lake = Lake(tmp_path / "lake")
    lake.append(INSTANCES, instance_rows(), "run-1", {"seen": 6})
    lake.append(SCORES, score_rows(["uid0", "uid1", "uid2"]), "score-1")
    return lake


def age(lake: Lake, name: str, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(lake.storage.local_path(name), (then, then))


def memmc(lake: Lake, *words: str):
    return CliRunner().invoke(app, ["lake", *words, "--lake", lake.uri])


def test_a_whole_lake(lake):
    seen: list[tuple[int, int]] = []
    verdict = verify(lake, lambda done, total: seen.append((done, total)))
    assert not verdict.damages and seen[-1][0] == seen[-1][1] == sum(t["bytes"] for t in verdict.tables.values())
    assert verdict.cohorts == {"a": {"stored": 3, "duplicate": 1, "excluded": 1, "quarantined": 1}}
    assert {name: found["rows"] for name, found in verdict.tables.items()} == {INSTANCES: 6, SCORES: 3}
    done = memmc(lake, "verify", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["whole"] is True
    assert "6 objects = 1 duplicate, 1 excluded, 1 quarantined, 3 stored" in memmc(lake, "verify").stdout


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: None, "absent"),
        (lambda data: data[:-1], "bytes,"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "SHA-256"),
    ],
)
def test_damaged_shards_are_named(lake, damage, problem):
    hurt = lake.files(INSTANCES)[2].path
    path = lake.storage.local_path(hurt)
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    (found,) = verify(lake).damages
    assert found.shard == hurt and problem in found.problem
    done = memmc(lake, "verify", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["damages"][0]["shard"] == hurt
    done = memmc(lake, "verify")
    assert done.exit_code == 1 and hurt in done.stdout and "Restore" in done.stdout


def test_a_shard_of_another_tool_and_a_wrong_row_count(lake):
    (file, *_) = lake.files(SCORES)
    lake.storage.write("scores/plain.parquet", lake.storage.read(file.path))
    renamed = type(file)("scores/plain.parquet", file.size, file.num_rows, file.partition)
    longer = type(file)(file.path, file.size, file.num_rows + 1, file.partition)
    assert shard_problem(lake.storage, SCORES, file) is None
    assert "another tool" in shard_problem(lake.storage, SCORES, renamed)
    assert "rows" in shard_problem(lake.storage, SCORES, longer)
    assert "no columns" in shard_problem(lake.storage, INSTANCES, file)


def test_an_account_that_does_not_balance(lake):
    lake.append(INSTANCES, instance_rows(num=1), "again")
    lake.append(SCORES, score_rows(["uid1", "uid4", "nobody"]), "score-2")
    problems = {damage.problem for damage in verify(lake).damages}
    assert problems == {
        "cohort 'a': 1 object keys stand more than once",
        "cohort 'a': 1 stored instances stand more than once",
        "cohort 'a': 2 scores are of no stored instance",
        "cohort 'a': 1 instances are scored twice by one model and calibration",
    }
    assert memmc(lake, "verify").exit_code == 1


def test_a_row_that_says_why_there_is_no_score_is_no_score(lake):
    reasons = score_rows(["uid0", "uid1", "uid4", "nobody"])
    reasons = reasons.append_column("not_scored", pa.array(["SELECT_LATERAL_VIEW"] * reasons.num_rows))
    lake.append(SCORES, reasons, "score-2")
    assert verify(lake).damages == []


def test_other_cohorts_and_other_calibrations_are_no_doubles(lake):
    lake.append(INSTANCES, instance_rows(cohort="b"), "other")
    lake.append(SCORES, score_rows(["uid0"], calibration="later"), "score-2")
    assert not verify(lake).damages


def test_history(lake):
    lake.append(INSTANCES, instance_rows(6), "run-2")
    found = json.loads(memmc(lake, "history", "--table", INSTANCES, "--limit", "2", "--json").stdout)["commits"]
    assert [commit["run"] for commit in found] == ["run-2", "run-1"]
    assert (found[0]["rows_added"], found[0]["shards_removed"], found[1]["metadata"]) == (6, 0, {"seen": 6})
    assert {"instances", "scores"} <= {line.split()[1] for line in memmc(lake, "history").stdout.splitlines()}
    assert memmc(lake, "history", "--table", "nothing").exit_code != 0


def test_versions_stay_readable_for_years(tmp_path):
    """The log of the deltalake package forgets entries a month old at a checkpoint, unless told not to."""
    lake, schema = Lake(tmp_path), SCHEMAS[INSTANCES]
    lake.append(INSTANCES, instance_rows(), "run-1")
    lake._open(INSTANCES).alter.set_table_properties({"delta.checkpointInterval": "5"})
    for number in range(12):
        lake.commit(INSTANCES, [], f"empty-{number}")
    for name in lake.storage.list(f"{INSTANCES}/_delta_log"):
        age(lake, name, 24 * 60)
    for number in range(6):
        lake.commit(INSTANCES, [], f"later-{number}")
    assert lake.read(INSTANCES, ["object_key"], version=1).num_rows == 6
    assert lake.history(INSTANCES)[-2]["run"] == "run-1"
    for _ in range(6):  # the same commits without it: the version is gone
        delta = lake._open(INSTANCES)
        delta.create_write_transaction([], mode="append", schema=schema, partition_by=["outcome", "split"])
    with pytest.raises(DataError, match="no version 1"):
        lake.read(INSTANCES, ["object_key"], version=1)


def test_vacuum_takes_what_is_old_and_nobodys(lake):
    orphans = [file.path for file in write_rows(lake.storage, INSTANCES, instance_rows(6))]
    recent = [file.path for file in write_rows(lake.storage, INSTANCES, instance_rows(12))]
    for name in (f"{INSTANCES}/.tmp-dead", f"{INSTANCES}/_delta_log/_commit_0.json.tmp", f"{SCORES}/.tmp-young"):
        lake.storage.local_path(name).write_bytes(b"x")
    for name in [
        *orphans,
        *lake.storage.list(),
        f"{INSTANCES}/.tmp-dead",
        f"{INSTANCES}/_delta_log/_commit_0.json.tmp",
    ]:
        if name not in recent:
            age(lake, name, 25)
    before = lake.storage.list()
    done = json.loads(memmc(lake, "vacuum", "--dry-run", "--json").stdout)
    assert done["deleted"] is False and done["shards"] == sorted(orphans) and done["uploads"] == 0
    assert lake.storage.list() == before
    assert f"{len(orphans)} shards, 2 unfinished" in memmc(lake, "vacuum").stdout
    assert set(before) - set(lake.storage.list()) == {*orphans, f"{INSTANCES}/_delta_log/_commit_0.json.tmp"}
    assert not lake.storage.local_path(f"{INSTANCES}/.tmp-dead").exists()
    assert lake.storage.local_path(f"{SCORES}/.tmp-young").exists()
    assert not verify(lake).damages


def test_a_running_writer_keeps_its_old_shards(lake):
    with lease(lake, "slow-run"):
        files = write_rows(lake.storage, INSTANCES, instance_rows(6))
        vacuums._write_lease(lake.storage, f"{LEASES}/slow-run.json", time.time() - 50 * 3600)
        for file in files:
            age(lake, file.path, 49)
        assert vacuum(lake, 24).hours > 49
        lake.commit(INSTANCES, files, "slow-run")
    assert lake.storage.list(LEASES) == [] and lake.read(INSTANCES, ["object_key"]).num_rows == 12
    assert not verify(lake).damages


def test_a_dead_writers_lease_runs_out_and_its_shards_cannot_be_committed(lake):
    files = write_rows(lake.storage, INSTANCES, instance_rows(6))
    lake.storage.write(f"{LEASES}/dead.json", json.dumps({"since": 0, "seen": time.time() - 25 * 3600}).encode())
    lake.storage.write(f"{LEASES}/unreadable.json", b"{")
    for file in files:
        age(lake, file.path, 25)
    assert len(vacuum(lake, 24, dry_run=True).shards) == len(lake.storage.list(LEASES)) + 4 == 6
    assert sorted(vacuum(lake, 24).shards) == sorted(file.path for file in files) and lake.storage.list(LEASES) == []
    with pytest.raises(StorageError, match="6 of 6 shards"):
        lake.commit(INSTANCES, files, "dead")
    assert not verify(lake).damages


def test_replaced_shards_go_after_the_retention_and_their_versions_with_them(lake):
    old, version = lake.files(INSTANCES), lake.version(INSTANCES)
    lake.commit(INSTANCES, write_rows(lake.storage, INSTANCES, instance_rows(6)), "replace", remove=old)
    for file in old:
        age(lake, file.path, 25)
    assert vacuum(lake, 24).shards == []  # replaced a moment ago: versions within the retention still hold them
    assert lake.read(INSTANCES, ["object_key"], version=version).num_rows == 6
    assert len(lake._open(INSTANCES).vacuum(0, dry_run=True, enforce_retention_duration=False, full=True)) == 6


def test_the_least_retention_is_guarded(lake):
    assert memmc(lake, "vacuum", "--set", "lake.vacuum_hours=1").exit_code != 0
    assert memmc(Lake(f"{lake.uri}/nowhere"), "vacuum").exit_code != 0


def test_a_lease_is_kept_up(lake, monkeypatch):
    monkeypatch.setattr(vacuums, "LEASE_REFRESH_S", 0.02)
    with lease(lake, "run"):
        first = json.loads(lake.storage.read(f"{LEASES}/run.json"))
        time.sleep(0.3)
        later = json.loads(lake.storage.read(f"{LEASES}/run.json"))
    assert later["since"] == first["since"] and later["seen"] > first["seen"]
