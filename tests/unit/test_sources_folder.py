import inspect
import os
import pickle
import socket
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from memmc.config import SourceConfig
from memmc.dicom.read import read_instance, refused_by_head
from memmc.dicom.reasons import Rejected
from memmc.errors import UsageError
from memmc.sources import folder_s3, objects
from memmc.sources import open as opening
from memmc.sources.folder_s3 import fetch, list_objects
from memmc.sources.objects import LARGE_BYTES, FetchFailed, SourceObject
from memmc.sources.open import open_source

LIMIT = 1 << 20


def put(root: Path, name: str, data: bytes = b"x") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def reason(source: object, obj: SourceObject, limit: int = LIMIT) -> str:
    with pytest.raises(FetchFailed) as caught:
        fetch(str(source), obj, limit)
    assert caught.value.args == (caught.value.reason,)
    return caught.value.reason


def test_every_file_is_listed_in_a_fixed_order(tmp_path):
    names = ["b/2.dcm", "b/1.dcm", "a.dcm", ".hidden", "DICOMDIR", "b/c/d/x", "leer zeichen/ü.dcm", "z#?%41"]
    for index, name in enumerate(names):
        put(tmp_path, name, bytes(index))
    (tmp_path / "empty").mkdir()
    objects = list(list_objects(str(tmp_path)))
    expected = [".hidden", "DICOMDIR", "a.dcm", "b/1.dcm", "b/2.dcm", "b/c/d/x", "leer zeichen/ü.dcm", "z#?%41"]
    assert [obj.path for obj in objects] == expected
    assert {obj.path: obj.size for obj in objects} == {name: index for index, name in enumerate(names)}
    assert objects == list(list_objects(tmp_path.as_uri())) == list(list_objects(f"{tmp_path}/"))
    for obj in objects:
        assert obj.problem is None and obj.modified == str((tmp_path / obj.path).stat().st_mtime_ns)
        assert fetch(str(tmp_path), pickle.loads(pickle.dumps(obj)), LIMIT) == bytes(obj.size)


def test_names_that_are_not_text(tmp_path):
    put(tmp_path, os.fsdecode(b"bad\xff.dcm"), b"data")
    (obj,) = list_objects(str(tmp_path))
    assert obj.path == "bad\\xff.dcm"
    obj.path.encode()
    obj.uri.encode("ascii")
    assert fetch(str(tmp_path), obj, LIMIT) == b"data"


def test_what_is_no_file_is_listed_with_a_reason(tmp_path):
    root = tmp_path / "root"
    put(root, "good")
    put(tmp_path, "outside/secret", b"secret")
    (root / "link").symlink_to(tmp_path / "outside/secret")
    (root / "dir-link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "sock"))
    objects = {obj.path: obj for obj in list_objects(str(root))}
    assert {path: obj.problem for path, obj in objects.items()} == {
        "dangling": "FILE_SYMLINK",
        "dir-link": "FILE_SYMLINK",
        "fifo": "FILE_NOT_REGULAR",
        "good": None,
        "link": "FILE_SYMLINK",
        "loop": "FILE_SYMLINK",
        "sock": "FILE_NOT_REGULAR",
    }
    for path, obj in objects.items():
        if obj.problem:
            assert reason(root, obj) == obj.problem
            # Also when the listing was made before the link or FIFO took the file's place.
            lied = SourceObject(path, obj.uri, obj.size, obj.modified)
            assert reason(root, lied) == obj.problem


def test_a_folder_swapped_for_a_link_is_not_followed(tmp_path):
    root = tmp_path / "root"
    put(root, "a/x", b"data")
    (obj,) = list_objects(str(root))
    (root / "a").rename(tmp_path / "a")
    (root / "a").symlink_to(tmp_path / "a")
    assert reason(root, obj) == "FILE_SYMLINK"


def test_paths_outside_the_root_are_refused(tmp_path):
    root = tmp_path / "root"
    put(root, "x")
    secret = put(tmp_path, "secret")
    found = secret.stat()
    for uri in (
        secret.as_uri(),
        f"{root.as_uri()}/../secret",
        f"{root.as_uri()}/%2e%2e/secret",
        f"{root.as_uri()}-2/x",
    ):
        obj = SourceObject("x", uri, found.st_size, str(found.st_mtime_ns))
        assert reason(root, obj) == "FILE_PATH_ESCAPE"


def test_limits_and_changes(tmp_path, monkeypatch):
    path = put(tmp_path, "x", b"12345")
    (obj,) = list_objects(str(tmp_path))
    assert reason(tmp_path, obj, 4) == "FILE_TOO_LARGE"
    assert fetch(str(tmp_path), obj, 5) == b"12345"
    put(tmp_path, "x", b"123456")
    assert reason(tmp_path, obj) == "FILE_CHANGED_DURING_READ"
    path.write_bytes(b"54321")
    os.utime(path, ns=(1, int(obj.modified) + 1))
    assert reason(tmp_path, obj) == "FILE_CHANGED_DURING_READ"

    os.utime(path, ns=(1, int(obj.modified)))
    read = os.readv

    def grow(descriptor: int, buffers: list[memoryview]) -> int:
        count = read(descriptor, buffers)
        with path.open("ab") as file:
            file.write(b"!")
        return count

    monkeypatch.setattr(folder_s3.os, "readv", grow)
    assert reason(tmp_path, obj) == "FILE_CHANGED_DURING_READ"
    monkeypatch.undo()
    path.unlink()
    assert reason(tmp_path, obj) == "FILE_CHANGED_DURING_READ"
    failure = FetchFailed("FILE_CHANGED_DURING_READ")
    assert failure.retriable and pickle.loads(pickle.dumps(failure)).reason == failure.reason
    assert not FetchFailed("FILE_SYMLINK").retriable


HEADS = {
    b"text": "FILE_NOT_DICOM",
    b"PK\x03\x04": "FILE_ARCHIVE_NESTED",
    b"MZ".ljust(128) + b"DICM": "FILE_PREAMBLE_EXEC",
    bytes(64): "FILE_NOT_DICOM",
    bytes(128) + b"DICM": "FILE_NOT_DICOM",
    bytes(128) + b"DICM\x02\x00\x00\x00UL": None,
    b"\x08\x00\x16\x00UI": None,
}


def large(folder: Path, head: bytes) -> SourceObject:
    """A sparse file of a byte more than what is taken for small."""
    path = put(folder, "large", head)
    os.truncate(path, LARGE_BYTES + 1)
    (obj,) = list_objects(str(folder))
    return obj


@pytest.mark.parametrize(("head", "code"), HEADS.items())
def test_a_large_file_that_is_no_instance_is_given_up_by_its_head(tmp_path, monkeypatch, head, code):
    class Read(Exception):
        pass

    def read(*_: object) -> int:
        raise Read

    monkeypatch.setattr(folder_s3.os, "readv", read)
    with pytest.raises(Read if code is None else FetchFailed) as caught:
        fetch(str(tmp_path), large(tmp_path, head), 1 << 30, refused_by_head)
    assert code is None or (caught.value.reason, caught.value.retriable) == (code, False)
    with pytest.raises(Rejected) as found:
        read_instance(head.ljust(4096, b"\0"))
    assert code is None or found.value.reason == code  # as the sandbox says of the whole


def test_a_large_file_is_held_once(tmp_path):
    obj = large(tmp_path, b"\x08\x00\x16\x00UI")
    tracemalloc.start()
    try:
        data = fetch(str(tmp_path), obj, 1 << 30, refused_by_head)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) == obj.size and data[:6] == b"\x08\x00\x16\x00UI"
    assert most < obj.size + (1 << 20)


def test_a_body_is_judged_by_its_whole_head_however_it_drips(monkeypatch):
    monkeypatch.setattr(objects, "LARGE_BYTES", 1500)
    body = (bytes(128) + b"DICM\x02\x00\x00\x00UL").ljust(2000, b"x")
    drops = [body[start : start + 100] for start in range(0, 2000, 100)]
    assert folder_s3._gathered(drops, 2000, refused_by_head) == body
    given: list[int] = []
    text = (given.append(1) or b"t" * 100 for _ in range(20))
    with pytest.raises(FetchFailed, match="FILE_NOT_DICOM"):
        folder_s3._gathered(text, 2000, refused_by_head)
    assert len(given) == 11
    assert folder_s3._gathered([b"t" * 100], 100, refused_by_head) == b"t" * 100
    assert folder_s3._gathered([], 0, refused_by_head) == b""


@pytest.mark.parametrize(("uri", "more"), [("s3://b/x.zip", {}), ("s3://b/x", {"open_archives": True})])
def test_zip_files_in_a_bucket_are_refused_not_passed_over(uri, more):
    with pytest.raises(UsageError, match="ZIP files are opened where they lie on a local path alone"):
        open_source(uri, SourceConfig(**more), {})
    assert open_source("s3://b/x", SourceConfig(), {}).uri == "s3://b/x"


def test_empty_files_are_left_to_the_reader(tmp_path):
    put(tmp_path, "empty", b"")
    (obj,) = list_objects(str(tmp_path))
    assert fetch(str(tmp_path), obj, LIMIT) == b""


def test_unreadable_places_are_listed(tmp_path, monkeypatch):
    put(tmp_path, "closed/x")
    put(tmp_path, "open/x")
    entries = folder_s3._entries

    def refuse(folder: bytes):
        if folder.endswith(b"closed"):
            raise PermissionError
        return entries(folder)

    monkeypatch.setattr(folder_s3, "_entries", refuse)
    assert [(obj.path, obj.problem) for obj in list_objects(str(tmp_path))] == [
        ("closed", "FILE_UNREADABLE"),
        ("open/x", None),
    ]


def test_one_file_as_the_source(tmp_path):
    path = put(tmp_path, "one.dcm", b"data")
    put(tmp_path, "two.dcm")
    (obj,) = list_objects(str(path))
    assert (obj.path, obj.size, obj.problem) == ("one.dcm", 4, None)
    assert fetch(str(path), obj, LIMIT) == b"data"
    os.mkfifo(tmp_path / "fifo")
    (fifo,) = list_objects(str(tmp_path / "fifo"))
    assert fifo.problem == "FILE_NOT_REGULAR"


@pytest.mark.parametrize("uri", ["/nowhere/at/all", "http://host/x", "ftp://host/x", "file://host/x", "s3:///key"])
def test_sources_that_are_not_there(uri):
    with pytest.raises(UsageError) as caught:
        list_objects(uri)
    assert "nowhere" not in str(caught.value)


def test_folders_deeper_than_python_recurses(tmp_path):
    path = put(tmp_path, "/".join(["d"] * 200 + ["x"]), b"data")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        (obj,) = list_objects(str(tmp_path))
        assert fetch(str(tmp_path), obj, LIMIT) == b"data"
    finally:
        sys.setrecursionlimit(limit)
    assert tmp_path / obj.path == path


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_devices_are_never_read(device, tmp_path):
    (obj,) = list_objects(device)
    assert obj.problem == "FILE_NOT_REGULAR"
    lied = SourceObject(obj.path, obj.uri, obj.size, obj.modified)  # listed before it became a device
    assert reason(device, lied) == "FILE_NOT_REGULAR"
    (tmp_path / "link.dcm").symlink_to(device)
    (link,) = list_objects(str(tmp_path))
    assert link.problem == "FILE_SYMLINK"


def test_the_number_of_listed_objects_is_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "TOLD_EVERY", 2)
    for number in range(5):
        put(tmp_path, str(number))
    told: list[tuple[int, str]] = []
    place = open_source(str(tmp_path), SourceConfig(), {})
    listing = place.listing(None, lambda _: True, lambda done, note: told.append((done, note)))
    assert [obj.path for obj in listing.objects] == ["0", "1", "2", "3", "4"]
    assert told == [(2, "2 objects"), (4, "4 objects")]


def test_a_zip_file_in_a_folder_is_one_object_for_the_reader_to_refuse(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("x", b"data")
    (obj,) = open_source(str(tmp_path), SourceConfig(), {}).listing(None, lambda _: True).objects
    assert (obj.path, obj.problem) == ("a.zip", None)
    data = fetch(str(tmp_path), obj, LIMIT)
    assert data == (tmp_path / "a.zip").read_bytes()
    with pytest.raises(Rejected, match="FILE_ARCHIVE_NESTED"):
        read_instance(data)
