"""Cursors and the account of sources that fail, without Ray."""

from __future__ import annotations

import dataclasses
import zipfile
from datetime import UTC, datetime

import pytest
from dicom_instances import KEY, dataset, encoded, policy

from memmc.config import Config, SourceConfig
from memmc.dicom.deidentify import object_key
from memmc.dicom.sandbox import Sandbox
from memmc.errors import StorageError
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.pipeline import convert_chunk, cursor
from memmc.pipeline.convert_chunk import IngestJob, rows_of
from memmc.pipeline.cursor import cursor_entry, last_cursor
from memmc.pipeline.ingest import check_source
from memmc.pipeline.labels import StatedLabels
from memmc.sources.dicomweb import DicomWebSource
from memmc.sources.http import Access
from memmc.sources.objects import Cursor, FetchFailed, Refuse, SourceObject, refuse_nothing
from memmc.sources.open import open_source

SOURCE = "orthanc+http://host:8042"


def test_the_newest_cursor_of_a_source_and_cohort_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "_LOOKS", (1, 4, None))
    lake = Lake(tmp_path / "lake")
    assert last_cursor(lake, KEY, SOURCE, "a") is None
    commits = [
        ("a", SOURCE, Cursor("7 x")),
        ("b", SOURCE, Cursor("8 y")),
        ("a", f"{SOURCE}1", Cursor("9 z")),
        ("a", SOURCE, Cursor("10 w")),
        ("a", "f", None),
    ]
    for number, (cohort, source, reached) in enumerate(commits):
        lake.commit("instances", [], f"run{number}", cursor_entry(KEY, source, cohort, reached))
    for number in range(4):
        lake.commit("instances", [], f"other{number}")
    assert last_cursor(lake, KEY, SOURCE, "a") == Cursor("10 w")
    assert last_cursor(lake, KEY, SOURCE, "b") == Cursor("8 y")
    assert last_cursor(lake, KEY, f"{SOURCE}1", "a") == Cursor("9 z")
    assert last_cursor(lake, KEY, "f", "a") is None
    assert last_cursor(lake, bytes(32), SOURCE, "a") is None
    logs = b"".join(path.read_bytes() for path in (tmp_path / "lake").rglob("*.json"))
    assert b"10 w" not in logs and b"host" not in logs


def test_a_cursor_names_what_is_to_be_listed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "MOST_AGAIN", 3)
    lake = Lake(tmp_path / "lake")
    named = Cursor("7 x", ("path-1",))
    lake.commit("instances", [], "run", cursor_entry(KEY, SOURCE, "a", named, ["path-2", "path-1"]))
    assert last_cursor(lake, KEY, SOURCE, "a") == Cursor("7 x", ("path-1", "path-2"))
    too_many = cursor_entry(KEY, SOURCE, "a", named, ["path-2", "path-3", "path-4"])
    assert too_many == {}
    lake.commit("instances", [], "run2", too_many)
    assert last_cursor(lake, KEY, SOURCE, "a") == Cursor("7 x", ("path-1", "path-2"))
    logs = b"".join(path.read_bytes() for path in (tmp_path / "lake").rglob("*.json"))
    assert b"7 x" not in logs and b"path-" not in logs


def test_a_table_that_was_restored_forgets_its_cursors(tmp_path):
    from deltalake import DeltaTable

    lake = Lake(tmp_path / "lake")
    lake.commit("instances", [], "run", cursor_entry(KEY, SOURCE, "a", Cursor("7 x")))
    lake.commit("instances", [], "run2", cursor_entry(KEY, SOURCE, "a", Cursor("9 x")))
    DeltaTable(str(tmp_path / "lake/instances")).restore(1)
    assert last_cursor(lake, KEY, SOURCE, "a") is None
    lake.commit("instances", [], "run3", cursor_entry(KEY, SOURCE, "a", Cursor("3 x")))
    assert last_cursor(lake, KEY, SOURCE, "a") == Cursor("3 x")


@pytest.mark.parametrize(
    ("uri", "has"),
    [("/data", False), ("s3://bucket/x", False), ("dicomweb+http://host", False), ("orthanc+http://host", True)],
)
def test_which_sources_have_a_cursor(uri, has):
    assert open_source(uri, SourceConfig(), {}).has_cursor is has


class Failing(DicomWebSource):
    """A server that refuses one instance after the other."""

    def fetch(self, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> bytes:
        raise FetchFailed(obj.uri)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_chunk, "sandbox_for", lambda _policy: None)  # nothing is fetched that it could convert
    config = Config()
    return IngestJob(
        run="ingest-1",
        cohort="c",
        source=Failing("dicomweb+http://host", "http://host", Access(authorization="Basic hunter2")),
        storage=Storage.open(str(tmp_path / "lake")),
        policy=policy(),
        split=config.split,
        labels=StatedLabels(),
        preprocess_id=config.preprocess_id,
        started=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_a_passing_failure_does_not_stand_for_the_object(job):
    for reason, modified, tried_again in (
        ("FILE_CHANGED_DURING_READ", "", True),
        ("FILE_UNREADABLE", "", True),
        ("FILE_TOO_LARGE", "", False),
        ("FILE_UNREADABLE", "1700000000", True),
        ("FILE_CHECKSUM", "attachment", True),
        ("STORE_AUTH", "", True),
        ("STORE_TIMEOUT", "", True),
    ):
        item = SourceObject("1/2/3", reason, 0, modified)
        (row,), (again,) = rows_of(job, [item]), rows_of(dataclasses.replace(job, run="ingest-2"), [item])
        assert (row["outcome"], row["reason"]) == ("quarantined", reason)
        listed = object_key(KEY, job.source.uri, item.path, item.size, item.modified)
        assert (row["object_key"] != listed) is tried_again
        assert row["object_key"] == again["object_key"]  # by which the later run sees that it learnt nothing new
    assert "hunter2" not in repr(job)


def test_every_member_of_a_zip_file_gets_one_row(job, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_chunk, "sandbox_for", lambda policy: sandbox)
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/1.dcm", encoded(dataset()))
        out.writestr("../2.dcm", encoded(dataset()))
        out.writestr("nested.zip", b"PK\x03\x04" + bytes(300))
        out.writestr("readme.txt", b"no image\n" * 99)
    place = open_source(str(path), SourceConfig(), {})
    with Sandbox(job.policy) as sandbox:
        rows = list(rows_of(dataclasses.replace(job, source=place), place.listing(None, lambda _: True).objects))
    assert [(row["outcome"], row["reason"]) for row in rows] == [
        ("stored", None),
        ("quarantined", "FILE_PATH_ESCAPE"),
        ("quarantined", "FILE_ARCHIVE_NESTED"),
        ("quarantined", "FILE_NOT_DICOM"),
    ]
    assert len({row["object_key"] for row in rows}) == 4


def failing(reason: str, count: int) -> list[SourceObject]:
    return [SourceObject(f"1/2/{number}", reason, 0, "") for number in range(count)]


@pytest.mark.parametrize(("reason", "most"), [("STORE_AUTH", 10), ("STORE_TIMEOUT", 3), ("STORE_TLS", 3)])
def test_a_store_that_fails_ends_the_run(job, reason, most):
    with pytest.raises(StorageError, match=reason):
        list(rows_of(job, failing(reason, most)))


@pytest.mark.parametrize(("reason", "most"), [("STORE_AUTH", 10), ("STORE_TIMEOUT", 3), ("STORE_TLS", 3)])
def test_single_objects_that_the_store_does_not_give_are_rows(job, reason, most):
    items = failing(reason, most)
    another = SourceObject("1/2/another", "FILE_UNREADABLE", 0, "")
    rows = list(rows_of(job, [*items[1:], another, items[0]]))
    assert {(row["outcome"], row["reason"]) for row in rows if row["reason"] != "FILE_UNREADABLE"} == {
        ("quarantined", reason)
    }
    assert len({row["object_key"] for row in rows}) == most + 1
    before = frozenset(row["object_key"] for row in rows)
    again = list(rows_of(dataclasses.replace(job, failed_before=before), items))
    assert {row["object_key"] for row in again} < before and len(again) == most


class Shard:
    """A shard's account, by the reasons of its rows."""

    def __init__(self, *reasons: str | None) -> None:
        self.account = [{"reason": reason, "object_key": f"{number}"} for number, reason in enumerate(reasons)]


def test_a_server_that_fails_on_many_objects_has_failed_itself(job):
    lost, fine = "FILE_UNREADABLE", None
    check_source(job, [Shard(lost, lost)], 2)  # too few to tell
    check_source(job, [Shard(lost, lost), Shard(lost, *[fine] * 9)], 12)
    check_source(job, [Shard(*["FILE_NOT_DICOM"] * 9)], 9)
    with pytest.raises(StorageError, match=r"3 of 11 objects.*FILE_CHECKSUM, FILE_UNREADABLE, STORE_AUTH"):
        check_source(job, [Shard(lost, "FILE_CHECKSUM"), Shard("STORE_AUTH", *[fine] * 8)], 11)


def test_a_bucket_that_refuses_many_objects_has_failed_itself(job):
    bucket = dataclasses.replace(job, source=open_source("s3://bucket/x", SourceConfig(), {}))
    check_source(bucket, [Shard(*["FILE_UNREADABLE"] * 9)], 9)  # they are archived, and the bucket is well
    check_source(bucket, [Shard(*["STORE_AUTH"] * 3, *[None] * 9)], 12)
    with pytest.raises(StorageError, match="3 of 11 objects"):
        check_source(bucket, [Shard("STORE_AUTH", *["STORE_TIMEOUT"] * 2, *[None] * 8)], 11)


def test_what_failed_before_says_nothing_new_of_the_source(job):
    lost = "FILE_UNREADABLE"
    known = dataclasses.replace(job, failed_before=frozenset("012"))
    check_source(known, [Shard(lost, lost, lost, None)], 4)
    check_source(known, [Shard(lost, lost, lost, lost, lost)], 5)
    with pytest.raises(StorageError, match="3 of 3 objects"):
        check_source(known, [Shard(*[lost] * 6)], 6)


def test_settings_have_bounds():
    for bad in ({"quiet_seconds": -1}, {"connect_seconds": 0}, {"archive_members": 0}, {"study_dates": "2026"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SourceConfig(**bad)
