"""Erasure: nothing of the subject in any byte of the lake, everything of the others as it was."""

import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.lake import erasure
from memmc.lake.commit import LostTurnError
from memmc.lake.erasure import ERASED, Subject, count_rows, erase_rows, erased_contents, find_subject, purge
from memmc.lake.files import write_rows
from memmc.lake.schemas import INSTANCES, LABELS, SCORES
from memmc.lake.tables import Lake
from memmc.lake.verify import verify

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def patient(number: int) -> str:
    return f"{number:02x}" * 32


def pixels(index: int) -> bytes:
    return np.random.default_rng(index).bytes(64)


def instances(indexes: range | list[int], cohort: str = "a", patients: int = 4, lone: bool = False) -> pa.Table:
    rows = []
    for index in indexes:
        outcome = "quarantined" if index % 5 == 4 else "stored"
        number = index % patients
        rows.append(
            {
                "cohort": cohort,
                "object_key": f"{cohort}{index:063x}",
                "source_ref": f"sealed-{index:04}",
                "outcome": outcome,
                "split": "none" if outcome == "quarantined" else ("train", "calibrate")[number % 2],
                "content_key": f"content{index:057x}",
                "size_bytes": 1000 + index,
                "patient_key": patient(number),
                "study_uid": f"2.25.7000{number}{index % 2}",
                "sop_instance_uid": f"2.25.8000{cohort}{index:04}",
                "label": "normal",
                "pixels": pixels(index) if outcome == "stored" else None,
                "height": 8,
                "width": 8,
                "channels": 1,
                "bits": 8,
                "ingest_run": "r",
                "ingested_at": NOW,
            }
        )
    return pa.Table.from_pylist(rows)


def scores(rows: pa.Table) -> pa.Table:
    same = {"model": "m/1", "model_digest": "d", "dataset_version": 1, "preprocess_id": "x", "scorer": "l1"}
    same |= {"run": "s", "scored_at": NOW, "calibration_id": "c", "anomaly_score": 0.5}
    names = ("cohort", "sop_instance_uid", "patient_key", "study_uid")
    return pa.Table.from_pylist(
        [
            {**same, **{name: row[name] for name in names}, "anomaly_map": row["pixels"][::-1]}
            for row in rows.to_pylist()
            if row["outcome"] == "stored"
        ]
    )


def labels(rows: pa.Table) -> pa.Table:
    same = {"label": "abnormal", "source": "reader", "labelled_at": NOW}
    pairs = zip(rows["cohort"].to_pylist(), rows["sop_instance_uid"].to_pylist(), strict=True)
    return pa.Table.from_pylist([{**same, "cohort": cohort, "sop_instance_uid": uid} for cohort, uid in pairs])


@pytest.fixture
def lake(tmp_path):
    lake = Lake(tmp_path / "lake")
    for number, part in enumerate((instances(range(12)), instances(range(12, 20)), instances(range(8), "b"))):
        lake.append(INSTANCES, part, f"ingest-{number}")
        lake.append(SCORES, scores(part), f"score-{number}")
        lake.append(LABELS, labels(part), f"label-{number}")
    return lake


def erase(lake: Lake, subject: Subject, hours: int = 24) -> dict[str, int]:
    gone = {}
    for table in (SCORES, LABELS, INSTANCES):
        gone[table], removed = erase_rows(lake, table, subject, "erase-1", "ingest {}".format)
        assert purge(lake, table, subject, removed, hours)[1] == 0
    return gone


def everything(lake: Lake, table: str, version: int | None = None) -> list[dict]:
    from memmc.lake.schemas import SCHEMAS

    rows = lake.read(table, SCHEMAS[table].names, version).to_pylist()
    return sorted(rows, key=lambda row: (row["cohort"], row.get("object_key") or row["sop_instance_uid"]))


def bytes_of(lake: Lake) -> bytes:
    """Every byte of the lake, and of every shard the values without their compression."""
    import pyarrow.parquet as pq

    parts = []
    for path in sorted(Path(lake.uri).rglob("*")):
        if path.is_file():
            parts.append(path.read_bytes())
            if path.suffix == ".parquet":
                table = pq.ParquetFile(path).read()
                parts += [str(column.to_pylist()).encode() for column in table.columns]
                parts += [value for name in ("pixels", "anomaly_map") if name in table.column_names
                          for value in table[name].to_pylist() if value]  # fmt: skip
    return b"\0".join(parts)


def traces(lake: Lake, key: str) -> list[bytes]:
    rows = [row for row in everything(lake, INSTANCES) if row["patient_key"] == key]
    names = [
        row[name].encode() for row in rows for name in ("patient_key", "study_uid", "sop_instance_uid", "source_ref")
    ]
    images = [row["pixels"] for row in rows if row["pixels"]]
    return [*names, *images, *(image[::-1] for image in images)]


def test_nothing_of_a_patient_is_left_and_everything_of_the_others(lake):
    subject = find_subject(lake, "patient_key", patient(1), None)
    before = {table: everything(lake, table) for table in (INSTANCES, SCORES, LABELS)}
    found, other = traces(lake, patient(1)), traces(lake, patient(2))
    everywhere = bytes_of(lake)
    assert len(found) > 20 and all(trace in everywhere for trace in [*found, *other])  # the search finds
    counts = {table: count_rows(lake, table, subject) for table in before}
    assert erase(lake, subject) == counts == {INSTANCES: 7, SCORES: 6, LABELS: 7}
    left = bytes_of(lake)
    assert [trace for trace in found if trace in left] == [] and all(trace in left for trace in other)
    for table, rows in before.items():
        kept = [row for row in rows if row["sop_instance_uid"] not in subject.uids]
        assert [row for row in everything(lake, table) if row.get("reason") != ERASED] == kept
    assert not verify(lake).damages
    stones = [row for row in everything(lake, INSTANCES) if row["reason"] == ERASED]
    assert len(stones) == 7 and {row["outcome"] for row in stones} == {"excluded"}
    assert {row["object_key"] for row in everything(lake, INSTANCES)} == {
        row["object_key"] for row in before[INSTANCES]
    }
    assert {"content_key", "object_key", "cohort"} >= {
        name for row in stones for name, value in row.items() if isinstance(value, str) and len(value) > 12
    }
    assert len(erased_contents(lake, "a")) == 5


def test_old_versions_are_what_they_were_less_the_erased(lake):
    versions = range(1, lake.version(INSTANCES) + 1)
    before = {version: everything(lake, INSTANCES, version) for version in versions}
    erase(lake, find_subject(lake, "patient_key", patient(1), None))
    erase_rows(lake, INSTANCES, find_subject(lake, "patient_key", patient(2), None), "erase-2", str)
    for version, rows in before.items():
        kept = [row for row in rows if row["patient_key"] not in (patient(1), patient(2))]
        assert everything(lake, INSTANCES, version) == kept and len(kept) < len(rows)


def test_a_study_and_a_cohort(lake):
    study = everything(lake, INSTANCES)[1]["study_uid"]
    everywhere = find_subject(lake, "study_uid", study, None)
    one = find_subject(lake, "study_uid", study, "b")
    assert one.uids < everywhere.uids
    before = {table: everything(lake, table) for table in (SCORES, LABELS)}
    erase(lake, one)
    for table, rows in before.items():
        assert everything(lake, table) == [row for row in rows if row["sop_instance_uid"] not in one.uids]
    assert count_rows(lake, INSTANCES, find_subject(lake, "study_uid", study, "a")) == len(everywhere.uids - one.uids)


def test_a_uid_that_two_patients_claim_stays_with_the_one_that_is_stored(tmp_path):
    lake = Lake(tmp_path)
    rows = instances([0, 1, 4], patients=5).to_pylist()  # the last is quarantined, and says to be the first
    rows[2]["sop_instance_uid"] = rows[0]["sop_instance_uid"]
    lake.append(INSTANCES, pa.Table.from_pylist(rows))
    lake.append(SCORES, scores(instances([0, 1])))
    lake.append(LABELS, labels(instances([0, 1])))
    assert erase(lake, find_subject(lake, "patient_key", patient(4), None)) == {INSTANCES: 1, SCORES: 0, LABELS: 0}
    assert lake.read(SCORES).num_rows == 2 == lake.read(LABELS).num_rows


def test_a_whole_shard_may_go(tmp_path):
    lake = Lake(tmp_path)
    first = lake.append(INSTANCES, instances(range(4), patients=1))
    lake.append(INSTANCES, instances(range(5, 9), patients=3))
    erase_rows(lake, INSTANCES, find_subject(lake, "patient_key", patient(0), None), "e", str)
    assert lake.read(INSTANCES, ["object_key"], first).num_rows == 0
    assert {row["patient_key"] for row in everything(lake, INSTANCES)} == {None, patient(1), patient(2)}
    assert not verify(lake).damages


def test_killed_between_commit_and_deletion_the_rerun_finds_the_files(lake):
    subject, found = find_subject(lake, "patient_key", patient(1), None), traces(lake, patient(1))
    for table in (SCORES, LABELS, INSTANCES):
        erase_rows(lake, table, subject, "killed", str)
    assert found[0] in bytes_of(lake)
    again = find_subject(lake, "patient_key", patient(1), None)
    assert again.uids == frozenset()
    assert sum(purge(lake, table, again, (), 24)[0] for table in (SCORES, INSTANCES)) > 0
    left = bytes_of(lake)
    assert not [trace for trace in found if trace in left and not trace.startswith(b"2.25.8000")]


def test_files_of_a_running_writer_are_counted_and_stay_those_of_a_dead_one_go(lake):
    import os
    import time

    files = write_rows(lake.storage, INSTANCES, instances(range(20, 24)))
    subject = Subject("patient_key", patient(1))
    assert purge(lake, INSTANCES, subject, (), 24) == (0, 1)
    for file in files:
        os.utime(Path(lake.uri) / file.path, (time.time() - 90000,) * 2)
    assert purge(lake, INSTANCES, subject, (), 24) == (1, 0)
    assert sum(lake.storage.exists(file.path) for file in files) == len(files) - 1


def test_another_ingests_commit_is_met(lake, monkeypatch):
    """An ingest that commits between the look and the commit: the erasure looks again."""
    real, done = erasure._without, []

    def slow(*arguments):
        found = real(*arguments)
        if not done:
            done.append(lake.commit(INSTANCES, write_rows(lake.storage, INSTANCES, instances(range(20, 26))), "late",
                                    turns={"ingest a": lake.turn(INSTANCES, "ingest a")}))  # fmt: skip
        return found

    monkeypatch.setattr(erasure, "_without", slow)
    erase(lake, find_subject(lake, "patient_key", patient(1), None))
    assert done and patient(1).encode() not in bytes_of(lake)
    assert lake.read(INSTANCES, ["object_key"]).num_rows == 34 and not verify(lake).damages


@pytest.mark.parametrize("table", [SCORES, LABELS, INSTANCES])
def test_two_erasures_at_once(lake, monkeypatch, table):
    """The second commits while the first has written its shards and not yet committed them."""
    mine, other = (find_subject(lake, "patient_key", patient(number), None) for number in (1, 2))
    kept = [row for row in everything(lake, table) if row["sop_instance_uid"] not in mine.uids | other.uids]
    real, done = erasure._without, []

    def slow(*arguments):
        found = real(*arguments)
        if not done:
            done.append(1)
            _, removed = erase_rows(lake, table, other, "other", "ingest {}".format)
            purge(lake, table, other, removed, 24)
        return found

    monkeypatch.setattr(erasure, "_without", slow)
    _, removed = erase_rows(lake, table, mine, "mine", "ingest {}".format)
    purge(lake, table, mine, removed, 24)
    assert [row for row in everything(lake, table) if row.get("reason") != ERASED] == kept
    assert not [
        damage for damage in verify(lake).damages if damage.table == table and "more than once" in damage.problem
    ]


def test_what_was_replaced_is_not_replaced_again(lake):
    (old, *_), subject = lake.files(LABELS), find_subject(lake, "patient_key", patient(1), None)
    erase_rows(lake, LABELS, subject, "first", str)
    with pytest.raises(LostTurnError):
        lake.commit(LABELS, [], "second", remove=[old])


def erased_by_another(lake: Lake, table: str) -> None:
    subject = find_subject(lake, "patient_key", patient(2), None)
    _, removed = erase_rows(lake, table, subject, "other", str)
    purge(lake, table, subject, removed, 24)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_reader_meets_an_erasure(lake, monkeypatch, pinned):
    from memmc.lake import tables

    real, done = tables.read_file, []
    version = lake.version(LABELS) if pinned else None

    def slow(*arguments):
        if not done:
            done.append(1)
            erased_by_another(lake, LABELS)
        return real(*arguments)

    monkeypatch.setattr(tables, "READ_THREADS", 1)
    monkeypatch.setattr(tables, "read_file", slow)
    assert lake.read(LABELS, version=version).num_rows == 28 - 7 and done


def test_verify_meets_an_erasure(lake, monkeypatch):
    from memmc.lake import verify as module

    real, done = module.shard_problem, []

    def slow(*arguments):
        if not done:
            done.append(1)
            erased_by_another(lake, SCORES)
        return real(*arguments)

    monkeypatch.setattr(module, "VERIFY_THREADS", 1)
    monkeypatch.setattr(module, "shard_problem", slow)
    assert not verify(lake).damages and done


def test_counting_meets_an_erasure(lake, monkeypatch):
    real, done = erasure._count, []

    def slow(*arguments):
        if not done:
            done.append(1)
            erased_by_another(lake, SCORES)
        return real(*arguments)

    monkeypatch.setattr(erasure, "_count", slow)
    assert count_rows(lake, SCORES, find_subject(lake, "patient_key", patient(1), None)) == 6


def test_appends_at_once_are_never_lost(lake):
    threads = [
        threading.Thread(target=lake.append, args=(SCORES, scores(instances([100 + 10 * n])), f"late-{n}"))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    gone, _ = erase_rows(lake, SCORES, find_subject(lake, "patient_key", patient(1), None), "e", str)
    for thread in threads:
        thread.join()
    assert lake.read(SCORES).num_rows == 23 + 4 - gone and gone == 6


@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), who=st.integers(1, 4), patients=st.integers(2, 5))
def test_any_patient_of_any_lake(tmp_path_factory, sizes, who, patients):
    """Patient 0 is left out: its pseudonym is all zeros, which stand in padded keys as well."""
    lake, start = Lake(tmp_path_factory.mktemp("lake")), 0
    for size in sizes:
        lake.append(INSTANCES, instances(range(start, start + size), patients=patients))
        start += size
    before = everything(lake, INSTANCES)
    subject = find_subject(lake, "patient_key", patient(who), None)
    gone, removed = erase_rows(lake, INSTANCES, subject, "e", str)
    purge(lake, INSTANCES, subject, removed, 24)
    assert gone == sum(row["patient_key"] == patient(who) for row in before)
    assert patient(who).encode() not in bytes_of(lake)
    kept = [row for row in before if row["patient_key"] != patient(who)]
    assert [row for row in everything(lake, INSTANCES) if row["reason"] != ERASED] == kept
