"""ZIP files as sources: every member gets an object, nothing is written, nothing inflates without a bound."""

import io
import os
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.config import SourceConfig
from memmc.dicom.read import refused_by_head
from memmc.errors import DataError
from memmc.sources import archive, objects
from memmc.sources.objects import FetchFailed
from memmc.sources.open import open_source

LIMIT = 1 << 28


def place(path: Path, **bounds):
    return open_source(str(path), SourceConfig(**bounds), {})


def listed(path: Path, **bounds):
    return place(path, **bounds).listing(None, lambda _: True).objects


def reason(path: Path, obj, limit: int = LIMIT) -> str:
    with pytest.raises(FetchFailed) as caught:
        place(path).fetch(obj, limit)
    return caught.value.reason


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def test_members_are_listed_and_read_in_place(tmp_path):
    members = {"a/1.dcm": b"one", "a/2.dcm": b"", "ü.dcm": os.urandom(3 << 20), "nested.zip": b"PK\x03\x04", "d/": b""}
    path = zipped(tmp_path / "Export.ZIP", members)
    objects = listed(path)
    assert [(obj.path, obj.problem) for obj in objects] == [(name, None) for name in members if name != "d/"]
    assert [place(path).fetch(obj, LIMIT) for obj in objects] == [members[obj.path] for obj in objects]
    assert objects == listed(path)
    assert reason(path, objects[2], 1 << 20) == "FILE_TOO_LARGE"
    assert [item.name for item in tmp_path.iterdir()] == ["Export.ZIP"]


def test_zip64(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out, out.open("a", "w", force_zip64=True) as member:
        member.write(b"data")
    (obj,) = listed(path)
    assert place(path).fetch(obj, LIMIT) == b"data"


def test_a_changed_archive_is_noticed(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a": b"one"})
    (obj,) = listed(path)
    assert place(path).fetch(obj, LIMIT) == b"one"
    zipped(path, {"a": b"two"})
    assert reason(path, obj) == "FILE_CHANGED_DURING_READ"
    path.write_bytes(b"no archive")
    assert reason(path, obj) == "FILE_CHANGED_DURING_READ"
    path.unlink()
    assert reason(path, obj) == "FILE_CHANGED_DURING_READ"
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(zipped(tmp_path / "elsewhere/x.zip", {"a": b"one"}))
    assert reason(path, obj) == "FILE_UNREADABLE"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "\\\\host\\x", "..\\x", "C:\\x", "c:/x", "a\0b.dcm"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    path = tmp_path / "x.zip"
    stand_in = "N" * len(name)
    zipped(path, {stand_in: b"data", "good": b"fine"})
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    bad, good = listed(path)
    assert (bad.problem, good.problem) == ("FILE_PATH_ESCAPE", None)
    assert reason(path, bad) == "FILE_PATH_ESCAPE"
    assert place(path).fetch(good, LIMIT) == b"fine"


def test_dots_and_colons_within_a_name_are_no_escape(tmp_path):
    path = zipped(tmp_path / "x.zip", {"1.2..3/a..dcm": b"x", "at 10:30/x": b"y"})
    assert [obj.problem for obj in listed(path)] == [None, None]


def test_what_is_no_regular_member_has_a_reason(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK, stat.S_IFREG):
            info = zipfile.ZipInfo(f"{kind:o}")
            info.external_attr = (kind | 0o644) << 16
            out.writestr(info, b"/etc/passwd")
    objects = listed(path)
    assert [obj.problem for obj in objects] == ["FILE_SYMLINK", "FILE_NOT_REGULAR", "FILE_NOT_REGULAR", None]
    assert reason(path, objects[0]) == "FILE_SYMLINK"


def test_encrypted_members_and_other_methods_have_a_reason(tmp_path):
    path = zipped(tmp_path / "x.zip", {"secret": b"data", "good": b"fine"})
    raw = bytearray(path.read_bytes())
    central = raw.index(b"PK\x01\x02")
    raw[6] |= 1
    raw[central + 8] |= 1
    path.write_bytes(raw)
    assert [obj.problem for obj in listed(path)] == ["FILE_ENCRYPTED", None]
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        (obj,) = listed(zipped(path, {"x": b"data"}, method))
        assert reason(path, obj) == "FILE_ARCHIVE_METHOD"


def test_bombs_do_not_inflate(tmp_path):
    path = zipped(tmp_path / "x.zip", {"bomb": bytes(64 << 20), "blank": bytes(8 << 20), "noise": os.urandom(9 << 20)})
    bomb, blank, noise = listed(path)
    assert (bomb.problem, blank.problem, noise.problem) == ("FILE_ARCHIVE_LIMIT", None, None)
    assert len(place(path).fetch(blank, LIMIT)) == 8 << 20
    assert [obj.problem for obj in listed(path, archive_ratio=2000)] == [None] * 3
    in_all = listed(path, archive_ratio=2000, archive_bytes=72 << 20)
    assert [obj.problem for obj in in_all] == [None, None, "FILE_ARCHIVE_LIMIT"]


def test_a_large_member_that_is_no_instance_is_given_up_by_its_head(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "LARGE_BYTES", 2 << 20)
    path = zipped(tmp_path / "x.zip", {"text": b"text" * (1 << 20), "bare": b"\x08\x00\x16\x00UI" + bytes(4 << 20)})
    text, bare = listed(path)
    tracemalloc.start()
    try:
        with pytest.raises(FetchFailed, match="FILE_NOT_DICOM"):
            place(path).fetch(text, LIMIT, refused_by_head)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 << 20
    assert len(place(path).fetch(bare, LIMIT, refused_by_head)) == bare.size


def test_a_member_that_inflates_to_more_than_it_claims_is_cut_off(tmp_path):
    path = zipped(tmp_path / "x.zip", {"liar": bytes(64 << 20)})
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, 1000)
    path.write_bytes(raw)
    (obj,) = listed(path)
    assert (obj.size, obj.problem) == (1000, None)
    tracemalloc.start()
    try:
        assert reason(path, obj) == "FILE_ARCHIVE_DAMAGED"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_members_that_share_bytes_are_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", {"kernel": os.urandom(1000), "other": b"fine"})
    raw = path.read_bytes()
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    entry = raw[start : start + 46 + len("kernel")]
    directory = raw[start:end] + entry.replace(b"kernel", b"copies")
    tail = bytearray(raw[end:])
    struct.pack_into("<HHI", tail, 8, 3, 3, len(directory))
    path.write_bytes(raw[:start] + directory + tail)
    problems = {obj.path: obj.problem for obj in listed(path)}
    assert problems == {"kernel": "FILE_ARCHIVE_DAMAGED", "other": None, "copies": "FILE_ARCHIVE_DAMAGED"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_two_objects(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        for data in (b"one", b"two", b"one"):
            out.writestr("same", data)
    objects = listed(path)
    assert len({(obj.path, obj.size, obj.modified) for obj in objects}) == 3
    assert [place(path).fetch(obj, LIMIT) for obj in objects] == [b"one", b"two", b"one"]


def test_too_many_members_and_no_archives_are_named(tmp_path):
    path = zipped(tmp_path / "x.zip", {str(number): b"" for number in range(11)})
    assert len(listed(path, archive_members=11)) == 11
    with pytest.raises(DataError, match="11 members"):
        listed(path, archive_members=10)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="no readable ZIP"):
        listed(path)
    path.write_bytes(b"no archive at all")
    assert [obj.path for obj in listed(path)] == ["x.zip"]  # left to the reader, which says what it is


def test_a_directory_beyond_its_bound_is_never_read_whole(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.zip", {"n" * 60_000 + str(number): b"" for number in range(50)})
    monkeypatch.setattr(archive, "READ_STEP_BYTES", 1 << 16)
    assert len(listed(path)) == 50
    with pytest.raises(DataError, match="no readable ZIP"):
        listed(path, archive_members=100)


def test_archives_in_a_folder_are_opened_on_request(tmp_path):
    (tmp_path / "sub").mkdir()
    zipped(tmp_path / "sub/e#%.zip", {"m": b"data"})
    (tmp_path / "sub/broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "z").write_bytes(b"file")
    assert [obj.path for obj in listed(tmp_path)] == ["sub/broken.zip", "sub/e#%.zip", "z"]
    opened = listed(tmp_path, open_archives=True)
    assert [obj.path for obj in opened] == ["sub/broken.zip", "sub/e#%.zip!/m", "z"]
    assert place(tmp_path, open_archives=True).fetch(opened[1], LIMIT) == b"data"
    assert place(tmp_path, open_archives=True).fetch(opened[2], LIMIT) == b"file"


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_damage_never_gives_other_bytes(data):
    content = bytes(range(256)) * 3
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a", content)
        out.writestr("b", content[::-1])
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"memmc-damage-{os.getpid()}.zip"
    try:
        path.write_bytes(raw)
        try:
            objects = listed(path)
        except DataError:
            return
        for obj in objects:
            try:
                found = place(path).fetch(obj, LIMIT)
            except FetchFailed:
                continue
            assert found in (content, content[::-1], bytes(raw))
    finally:
        path.unlink()
