"""A whole ingest in its own sandboxes: no cluster, order, prefetching, interrupts, objects that fail for a while."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from dicom_instances import dataset, encoded

from memmc.config import Config, load_config
from memmc.dicom.convert import rejected
from memmc.dicom.reasons import OVERLOADED
from memmc.dicom.sandbox import Sandbox
from memmc.lake.tables import Lake
from memmc.pipeline import convert_all
from memmc.pipeline.convert_chunk import rows_of
from memmc.pipeline.ingest import ingest, plan
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


def test_the_next_object_is_fetched_while_one_is_converted(place):
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
            seen.append(fetched.wait(5))
            return rejected("FILE_NOT_DICOM")

    source = Source(*(getattr(planned.job.source, field.name) for field in dataclasses.fields(planned.job.source)))
    rows = rows_of(dataclasses.replace(planned.job, source=source), planned.new, Waiting())
    next(rows)
    assert seen == [True]


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
    assert (same.seen, same.duplicate, same.version) == (3, 3, first.version)
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
    assert ingest(settings(), "in", "c").version == first.version
    failing.clear()
    healed = ingest(settings(), "in", "c")
    assert (healed.stored, healed.duplicate) == (1, 2)
