"""A whole ingest in its own sandboxes: no cluster, order, prefetching, interrupts, objects that fail for a while."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from dicom_instances import dataset, encoded, texture

from memmc.config import Config, load_config
from memmc.dicom.convert import rejected
from memmc.dicom.reasons import OVERLOADED
from memmc.dicom.sandbox import Sandbox
from memmc.errors import DataError, StorageError
from memmc.lake.tables import Lake
from memmc.pipeline import convert_all, convert_chunk
from memmc.pipeline import ingest as ingest_module
from memmc.pipeline.convert_chunk import rows_of
from memmc.pipeline.ingest import check_quarantined, ingest, plan
from memmc.pipeline.progress import Silent
from memmc.sources import folder_s3


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder of three instances, and a working directory beside it; a cluster may not be started."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        put(tmp_path / "in", str(number), SOPInstanceUID=f"1.2.3.{number}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_all, "ray_cluster", lambda *_, **__: pytest.fail("a cluster was started"))
    return tmp_path


def put(folder: Path, name: str, **attributes: object) -> None:
    (folder / name).write_bytes(encoded(dataset(**attributes)))


def settings(*overrides: str) -> Config:
    return load_config(overrides=["deid.text=class", *overrides])


def children() -> list[str]:
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "memmc.dicom.worker" in line]


def test_what_goes_to_a_cluster():
    few, named = settings(), settings("ray.address=auto")
    assert not convert_all.needs_cluster(few, 9_999) and convert_all.needs_cluster(few, 10_000)
    assert convert_all.needs_cluster(named, 1) and convert_all.needs_cluster(settings("ray.ingest_from=0"), 1)


def test_a_small_ingest_starts_no_cluster_and_leaves_no_process(place):
    before = children()
    account = ingest(settings("ingest.objects_per_task=1"), "in", "c")
    assert (account.seen, account.stored) == (3, 3)
    assert children() == before
    again = ingest(settings(), "in", "c")
    assert (again.duplicate, again.version) == (3, account.version)


def test_the_first_of_two_copies_is_stored_though_it_comes_back_last(place, monkeypatch):
    (place / "in" / "1").write_bytes((place / "in" / "0").read_bytes())
    real = convert_all.convert_objects

    def late(job, objects, sandbox):
        listed = list(objects)
        time.sleep(0.5 * (listed[0].path == "0"))
        return real(job, listed, sandbox)

    monkeypatch.setattr(convert_all, "convert_objects", late)
    monkeypatch.setattr(convert_all, "cores", lambda: 2)
    ingest(settings("ingest.objects_per_task=1"), "in", "c")
    rows = Lake("lake").read("instances", ["outcome", "object_key"]).to_pylist()
    outcome = {row["object_key"]: row["outcome"] for row in rows}
    keys = [row["object_key"] for row in planned_rows(place)]
    assert [outcome[key] for key in keys] == ["stored", "duplicate", "stored"]


def planned_rows(place: Path) -> list[dict]:
    """Rows of the folder in listing order, made by themselves."""
    planned = plan(settings(), "in", "other", None, None, Silent())
    return list(rows_of(planned.job, planned.new))


def test_no_cursor_is_looked_for_where_a_source_has_none(place, monkeypatch):
    monkeypatch.setattr("memmc.pipeline.ingest.last_cursor", lambda *_: pytest.fail("the log was read"))
    assert ingest(settings(), "in", "c").stored == 3
    assert plan(settings(), "in", "c", None, None, Silent()).known == 3


def test_an_interrupt_commits_nothing_and_leaves_no_process(place):
    class Interrupted(Silent):
        def advance(self, done: float, detail: str = "") -> None:
            raise KeyboardInterrupt

    before = children()
    with pytest.raises(KeyboardInterrupt):
        ingest(settings("ingest.objects_per_task=1"), "in", "c", progress=Interrupted())
    assert not Lake("lake").exists("instances")
    assert children() == before
    assert ingest(settings(), "in", "c").stored == 3


def test_the_next_object_is_fetched_while_one_is_converted(place, monkeypatch):
    fetched = threading.Event()
    planned = plan(settings(), "in", "c", None, None, Silent())

    class Source(type(planned.job.source)):
        def fetch(self, obj, max_bytes, *refuse):
            if obj.path == "1":
                fetched.set()
            return super().fetch(obj, max_bytes, *refuse)

    seen: list[bool] = []

    class Waiting:
        def convert(self, data):
            seen.append(fetched.wait(patience))
            return rejected("FILE_NOT_DICOM")

    source = Source(*(getattr(planned.job.source, field.name) for field in dataclasses.fields(planned.job.source)))
    job, patience = dataclasses.replace(planned.job, source=source), 5.0
    next(rows_of(job, planned.new, Waiting()))
    assert seen == [True]
    fetched.clear()
    monkeypatch.setattr(convert_chunk, "LARGE_BYTES", 1)  # of large ones a process holds one at a time
    patience, rows = 0.2, rows_of(job, planned.new, Waiting())
    next(rows)
    assert seen == [True, False] and convert_chunk._ONE_LARGE.locked()
    assert len(list(rows)) == 2 and not convert_chunk._ONE_LARGE.locked()


def test_a_task_that_fails_lets_go_of_its_large_object(place, monkeypatch):
    def full(*_: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(convert_chunk, "LARGE_BYTES", 1)
    monkeypatch.setattr(convert_chunk, "MOST_HELD_BYTES", 1)
    monkeypatch.setattr(convert_chunk, "write_partition", full)
    with pytest.raises(StorageError, match="full") as caught:
        ingest(settings("ingest.objects_per_task=1"), "in", "c")
    assert caught.value.__traceback__ and not convert_chunk._ONE_LARGE.locked()


def test_a_task_writes_what_it_has_before_its_frames_add_up(place, monkeypatch):
    def stored(cohort: str) -> list[dict]:
        ingest(settings("select.frames=each"), "in", cohort)
        rows = Lake("lake").read("instances", ["sop_instance_uid", "pixels"], filter={"cohort": cohort}).to_pylist()
        return sorted(rows, key=lambda row: row["sop_instance_uid"])

    frames = np.stack([texture() // number for number in range(1, 6)]).astype("<u2").tobytes()
    put(place / "in", "3", NumberOfFrames=5, PixelData=frames, SOPInstanceUID="1.2.3.3")
    whole, written = stored("a"), []
    write = convert_chunk.write_partition
    monkeypatch.setattr(convert_chunk, "MOST_HELD_BYTES", 2 * 64 * 64 * 2)
    monkeypatch.setattr(convert_chunk, "write_partition", lambda *given: written.append(len(given[3])) or write(*given))
    assert stored("b") == whole and len(whole) == 8
    assert written == [2, 2, 2, 2]


def test_an_object_that_cannot_be_read_for_a_while_is_tried_again(place, monkeypatch):
    opened, failing = os.open, {"1"}

    def refuse(path, flags, mode=0o777, *, dir_fd=None):
        if dir_fd is not None and os.fsdecode(path) in failing:
            raise OSError(5, "Input/output error")
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(folder_s3.os, "open", refuse)
    first = ingest(settings(), "in", "c")
    assert (first.stored, first.quarantined, first.reasons) == (2, 1, {"FILE_UNREADABLE": 1})
    same = ingest(settings(), "in", "c")  # nothing learnt, so nothing committed
    assert (same.seen, same.duplicate, same.version) == (3, 2, first.version)
    assert (same.quarantined, same.reasons) == (1, {"FILE_UNREADABLE": 1, "already_ingested": 2})
    failing.clear()
    healed = ingest(settings(), "in", "c")
    assert (healed.stored, healed.duplicate) == (1, 2)
    last = ingest(settings(), "in", "c")
    assert (last.duplicate, last.version) == (3, healed.version)


def test_a_file_of_several_reads_is_whole(tmp_path, monkeypatch):
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data)
    (item,) = folder_s3.list_objects(str(tmp_path))
    monkeypatch.setattr(folder_s3, "READ_CHUNK_BYTES", 64)
    assert folder_s3.fetch(str(tmp_path), item, 1 << 20) == data


@pytest.mark.parametrize("reason", sorted(OVERLOADED))
def test_an_object_that_a_loaded_machine_did_not_convert_is_tried_again(place, monkeypatch, reason):
    real, failing = Sandbox.convert, [True]

    def convert(self, data):
        return rejected(reason) if failing and bytes(data) == (place / "in" / "1").read_bytes() else real(self, data)

    monkeypatch.setattr(Sandbox, "convert", convert)
    first = ingest(settings(), "in", "c")
    assert (first.stored, first.quarantined, first.reasons) == (2, 1, {reason: 1})
    same = ingest(settings(), "in", "c")
    assert (same.version, same.quarantined, same.reasons) == (first.version, 1, {reason: 1, "already_ingested": 2})
    with monkeypatch.context() as later:
        later.setattr(ingest_module, "_TRIED_FOR", timedelta(0))
        given_up = ingest(settings(), "in", "c")
    assert (given_up.version, given_up.duplicate, given_up.quarantined) == (first.version, 3, 0)
    failing.clear()
    healed = ingest(settings(), "in", "c")
    assert (healed.stored, healed.duplicate) == (1, 2)


def test_a_source_that_is_broken_as_a_whole_ends_in_an_error_with_its_rows_committed(place, monkeypatch):
    for number in range(3):
        (place / "in" / f"{number}.txt").write_bytes(b"no image " * number)
    monkeypatch.setattr(ingest_module, "_LEAST_JUDGED", 6)
    with pytest.raises(DataError, match=r"3 of 6 new .*FILE_NOT_DICOM 2, FILE_EMPTY 1.*max_quarantined = 0.25"):
        ingest(settings(), "in", "c")
    assert Lake("lake").read("instances", ["outcome"]).num_rows == 6
    again = ingest(settings(), "in", "c")
    assert (again.seen, again.duplicate) == (6, 6)  # nothing new, nothing to say of it
    assert ingest(settings("ingest.max_quarantined=0.5"), "in", "d").quarantined == 3


def test_a_share_of_quarantined_objects_is_told_from_a_few(caplog):
    told: list[str] = []

    class Told(Silent):
        def message(self, text: str) -> None:
            told.append(text)

    def check(quarantined: int, healthy: int, most: float = 0.25) -> None:
        bad = {"outcome": "quarantined", "reason": "PARSE_LENGTH"}
        check_quarantined([bad] * quarantined + [{"outcome": "excluded", "reason": "x"}] * healthy, most, Told())

    check(199, 0)  # too few to tell
    check(10, 190)
    assert told == []
    check(11, 190)
    check(50, 150)
    check(200, 0, most=1)
    assert [text.split(";")[0] for text in told] == [
        "11 of 201 new objects are quarantined (PARSE_LENGTH 11)",
        "50 of 200 new objects are quarantined (PARSE_LENGTH 50)",
        "200 of 200 new objects are quarantined (PARSE_LENGTH 200)",
    ]
    with pytest.raises(DataError, match=r"51 of 200 .* raise the setting"):
        check(51, 149)
