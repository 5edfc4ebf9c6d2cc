"""Duplicates, accounting and labels of an ingest, without Ray."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from memmc.config import Config
from memmc.dicom.convert import ConvertPolicy
from memmc.errors import AccountingError, DataError
from memmc.lake.shards import read_shard
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.pipeline.convert_chunk import (
    IngestJob,
    objects_from_json,
    objects_to_json,
    shards_from_json,
    shards_to_json,
    write_partition,
)
from memmc.pipeline.labels import StatedLabels
from memmc.pipeline.settle import check_balance, publish, settle
from memmc.pipeline.training_job import pooled_statistics
from memmc.sources.objects import SourceObject
from memmc.sources.open import open_source


@pytest.fixture
def job(tmp_path):
    config = Config()
    return IngestJob(
        run="r",
        cohort="c",
        source=open_source(str(tmp_path), config.source, {}),
        storage=Storage.open(str(tmp_path / "lake")),
        policy=ConvertPolicy.from_config(config, b"k" * 32),
        split=config.split,
        labels=StatedLabels(),
        preprocess_id=config.preprocess_id,
        started=datetime(2026, 1, 1, tzinfo=UTC),
    )


def row(number: int, uid: str, content: str) -> dict:
    return {
        "cohort": "c",
        "object_key": f"{number:064x}",
        "source_ref": "s",
        "outcome": "stored",
        "split": "train",
        "content_key": content,
        "size_bytes": 1,
        "label": "normal",
        "sop_instance_uid": uid,
        "pixels": b"\0\1",
        "ingest_run": "r",
        "ingested_at": datetime(2026, 1, 1, tzinfo=UTC),
    }


def outcomes(job, shards):
    return {
        r["object_key"][-1]: (s.file.partition["outcome"], r["reason"], r["pixels"])
        for s in shards
        for r in read_shard(job.storage, s.file.path).to_pylist()
    }


def test_the_first_of_two_copies_is_stored_and_the_other_is_a_duplicate(job):
    first = write_partition(job.storage, "stored", "train", [row(1, "u", "x"), row(2, "v", "y")])
    second = write_partition(job.storage, "stored", "train", [row(3, "u", "x"), row(4, "w", "z")])
    settled = settle(job, [first, second], {})
    assert outcomes(job, settled) == {
        "1": ("stored", None, b"\0\1"),
        "2": ("stored", None, b"\0\1"),
        "3": ("duplicate", "same_object", None),
        "4": ("stored", None, b"\0\1"),
    }
    assert first in settled  # a shard without duplicates is not written again
    check_balance(4, [r["object_key"] for s in settled for r in s.account])


def test_a_copy_of_an_erased_object_leaves_a_tombstone(job):
    rows = [row(1, "u", "x"), {**row(2, "v", "y"), "patient_key": "p", "study_uid": "s"}]
    settled = settle(job, [write_partition(job.storage, "stored", "train", rows)], {}, erased={"y"})
    assert outcomes(job, settled) == {"1": ("stored", None, b"\0\1"), "2": ("excluded", "erased", None)}
    check_balance(2, [r["object_key"] for s in settled for r in s.account])
    (stone,) = [r for s in settled for r in read_shard(job.storage, s.file.path).to_pylist() if r["reason"]]
    assert not {"p", "s", "v"} & {value for value in stone.values() if isinstance(value, str)}


def test_one_uid_with_two_contents_is_quarantined(job):
    shard = write_partition(job.storage, "stored", "train", [row(1, "u", "x")])
    settled = settle(job, [shard], {"u": "other"})
    assert outcomes(job, settled) == {"1": ("quarantined", "META_DUP_UID_CONFLICT", None)}


def test_of_two_ingests_of_one_tree_each_object_stays_once(job):
    """Both planned on the empty lake and converted everything; one of them has an object more."""
    jobs = [dataclasses.replace(job, run=f"run{number}") for number in range(2)]
    shards = [
        [write_partition(one.storage, "stored", "train", [row(1, "u", "x"), row(2, "v", "y")]) for one in jobs][0:1],
        [write_partition(jobs[1].storage, "stored", "train", [row(1, "u", "x"), row(2, "v", "y"), row(3, "w", "z")])],
    ]
    lake = Lake(job.storage.uri)
    first = publish(lake, jobs[0], shards[0], 2, {})
    second = publish(lake, jobs[1], shards[1], 3, {})
    assert (first[2], second[2]) == ([], ["already_ingested"] * 2)
    assert sorted(lake.read("instances", ["object_key"])["object_key"].to_pylist()) == [f"{n:064x}" for n in (1, 2, 3)]
    again = [write_partition(job.storage, "stored", "train", [row(1, "u", "x")])]
    assert publish(lake, dataclasses.replace(job, run="run2"), again, 1, {}) == (second[0], [], ["already_ingested"])


def test_what_fails_again_is_told_by_its_reason(job):
    failed = {**row(1, "u", ""), "outcome": "quarantined", "split": "none", "reason": "FILE_UNREADABLE"}
    refused = {**failed, "object_key": f"{2:064x}", "reason": "FILE_SYMLINK"}
    lake = Lake(job.storage.uri)
    for run, dropped in (("run0", []), ("run1", ["FILE_UNREADABLE", "already_ingested"])):
        shards = [write_partition(job.storage, "quarantined", "none", [failed, refused])]
        assert publish(lake, dataclasses.replace(job, run=run), shards, 2, {})[2] == dropped


def test_ingests_that_commit_at_the_same_moment_take_turns(job):
    lake = Lake(job.storage.uri)
    lake.commit("instances", [], "made")
    start = threading.Barrier(4)

    def run(number: int) -> int:
        one = dataclasses.replace(job, run=f"run{number}")
        shards = [
            write_partition(job.storage, "stored", "train", [row(1, "u", "x"), row(10 + number, f"n{number}", "y")])
        ]
        start.wait(30)
        return len(publish(lake, one, shards, 2, {})[2])

    with ThreadPoolExecutor(4) as pool:
        dropped = list(pool.map(run, range(4)))
    assert sorted(dropped) == [0, 1, 1, 1]
    keys = lake.read("instances", ["object_key"])["object_key"].to_pylist()
    assert sorted(keys) == sorted(f"{n:064x}" for n in (1, 10, 11, 12, 13))


def test_an_account_that_does_not_balance_fails():
    with pytest.raises(AccountingError, match="3 objects were listed, 2 rows"):
        check_balance(3, ["a", "b"])
    with pytest.raises(AccountingError):
        check_balance(2, ["a", "a"])


def test_chunks_survive_the_way_to_a_worker_and_back(job):
    objects = [SourceObject(path="a\udc80b", uri="file:///a", size=1, modified="2", problem=None)]
    assert objects_from_json(objects_to_json(objects)) == objects
    shards = [write_partition(job.storage, "stored", "train", [row(1, "u", "x")])]
    assert shards_from_json(shards_to_json(shards)) == shards


def test_a_job_does_not_show_its_key(job):
    assert b"k" * 32 not in repr(job).encode()
    assert "kkkk" not in repr(dataclasses.replace(job))


def test_labels_by_path_precede_labels_by_uid():
    labels = StatedLabels(default="unknown", by_path={"a": "normal"}, by_uid={"u": "abnormal"})
    assert [labels.of("a", "u"), labels.of("b", "u"), labels.of("b", None)] == ["normal", "abnormal", "unknown"]
    with pytest.raises(DataError):
        StatedLabels(by_path={"zz": "normal"}).check_against(["a"])


def test_pooled_statistics_are_those_of_all_pixels():
    import numpy as np

    images = np.random.default_rng(0).random((5, 8, 8)) * np.arange(1, 6)[:, None, None]
    rows = pa.Table.from_pylist([{"pixel_mean": float(i.mean()), "pixel_std": float(i.std())} for i in images])
    assert pooled_statistics(rows) == pytest.approx((images.mean(), images.std()))
