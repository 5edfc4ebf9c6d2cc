"""Members of a ZIP file as objects, read where they lie: nothing is ever written to a disk.

Names are only names here, so a member called ``../../x`` can harm nobody; it is refused all the same, since an archive
that holds one is not what a scanner or an archive exports. What a member claims about itself is not believed: it is
read in steps, up to its claimed size, and its CRC is checked.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO
from urllib.parse import quote, unquote_to_bytes

from memmc.config import SourceConfig
from memmc.errors import DataError
from memmc.sources.folder_s3 import opened
from memmc.sources.objects import (
    FILE_ARCHIVE_DAMAGED,
    FILE_ARCHIVE_LIMIT,
    FILE_ARCHIVE_METHOD,
    FILE_CHANGED_DURING_READ,
    FILE_ENCRYPTED,
    FILE_NOT_REGULAR,
    FILE_PATH_ESCAPE,
    FILE_SYMLINK,
    FILE_TOO_LARGE,
    FILE_UNREADABLE,
    Data,
    FetchFailed,
    Refuse,
    SourceObject,
    check_head,
    refuse_nothing,
)

READ_STEP_BYTES = 1 << 20
RATIO_FREE_BYTES = 16 << 20  # smaller members may be of any ratio: a blank image deflates a thousandfold
DIRECTORY_BYTES_PER_MEMBER = 256  # a central directory of longer entries is taken for a bomb of names
_LOCAL_HEADER_BYTES = 30
# zipfile inflates other methods without a bound per step, and DICOM media use none of them (PS3.12 Annex V).
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_DRIVE = re.compile(r"[A-Za-z]:")
_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000


def is_zip(path: bytes) -> bool:
    """Return whether a file is named and begins like a ZIP file."""
    if not path.lower().endswith(b".zip"):
        return False
    try:
        with _open_regular(path) as file:
            return file.read(4) in _MAGIC
    except OSError:
        return False


def list_members(path: bytes, settings: SourceConfig, prefix: str = "") -> Iterator[SourceObject]:
    """Yield one object per member, in the order of the directory; what cannot be read has a reason.

    Args:
        path: the ZIP file.
        settings: its bounds.
        prefix: stands before the members' names.

    Raises:
        DataError: no ZIP file, or one of more than `source.archive_members` members.
    """
    try:
        with _open_regular(path) as file:
            members = _archive(file, settings.archive_members).infolist()
    except OSError:
        raise DataError("the ZIP file cannot be read; check its permissions") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise DataError("the archive is no readable ZIP file; check that it was copied whole") from None
    if len(members) > settings.archive_members:
        raise DataError(
            f"the ZIP file has {len(members)} members, at most {settings.archive_members} are read; "
            "split it, or raise source.archive_members"
        )
    overlapping = _overlapping(members)
    names: Counter[str] = Counter()
    inflated = 0
    for info in members:
        if info.filename.endswith("/") and not info.file_size:
            continue
        problem = _problem(info)
        if info.header_offset in overlapping:
            problem = problem or FILE_ARCHIVE_DAMAGED
        inflated += info.file_size
        too_much = inflated > settings.archive_bytes or (
            info.file_size > RATIO_FREE_BYTES and info.file_size > settings.archive_ratio * info.compress_size
        )
        problem = problem or (FILE_ARCHIVE_LIMIT if too_much else None)
        # Two members of one name are two objects.
        number = names[info.filename]
        names[info.filename] += 1
        modified = f"{info.CRC:08x}" + (f" {number}" if number else "")
        uri = f"file://{quote(path)}#{info.header_offset}"
        yield SourceObject(prefix + (_text(info.filename) or "?"), uri, info.file_size, modified, problem)


def fetch_member(obj: SourceObject, max_bytes: int, max_members: int, refuse: Refuse = refuse_nothing) -> Data:
    """Return a member's bytes, whose CRC was checked.

    Args:
        obj: what `list_members` gave.
        max_bytes: larger members are refused before they are read.
        max_members: as for the listing.
        refuse: is asked about a large member's head before the rest is inflated.

    Raises:
        FetchFailed: with a reason code.
    """
    if obj.problem is not None:
        raise FetchFailed(obj.problem)
    if obj.size > max_bytes:
        raise FetchFailed(FILE_TOO_LARGE)
    path, _, offset = obj.uri.removeprefix("file://").rpartition("#")
    try:
        archive, members = _members(os.getpid(), unquote_to_bytes(path), max_members, *_version(unquote_to_bytes(path)))
        info = members.get(int(offset))
        if info is None or (info.file_size, f"{info.CRC:08x}") != (obj.size, obj.modified.partition(" ")[0]):
            raise FetchFailed(FILE_CHANGED_DURING_READ)
        return _inflated(archive, info, refuse)
    except FileNotFoundError:
        raise FetchFailed(FILE_CHANGED_DURING_READ) from None
    except OSError:
        raise FetchFailed(FILE_UNREADABLE) from None


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo, refuse: Refuse) -> bytearray:
    data = bytearray()
    try:
        with archive.open(info) as member:
            while chunk := member.read(min(READ_STEP_BYTES, info.file_size + 1 - len(data))):
                data += chunk
                if len(data) == len(chunk):
                    check_head(data, info.file_size, refuse)
                if len(data) > info.file_size:
                    raise FetchFailed(FILE_ARCHIVE_DAMAGED)
    # What zipfile and its decompressors raise on damaged members: a wrong CRC or header, a cut stream.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        raise FetchFailed(FILE_ARCHIVE_DAMAGED) from None
    if len(data) != info.file_size:
        raise FetchFailed(FILE_ARCHIVE_DAMAGED)
    return data


@functools.lru_cache(maxsize=1)
def _members(
    _pid: int, path: bytes, max_members: int, _size: int, _modified: int
) -> tuple[zipfile.ZipFile, dict[int, zipfile.ZipInfo]]:
    """Return this process's open archive and its members by offset; read anew when the file has changed."""
    try:
        archive = _archive(_open_regular(path), max_members)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise FetchFailed(FILE_CHANGED_DURING_READ) from None
    return archive, {info.header_offset: info for info in archive.infolist()}


def _version(path: bytes) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - bytes path
    return found.st_size, found.st_mtime_ns


def _open_regular(path: bytes) -> IO[bytes]:
    """Open a regular file by its real path; a link or FIFO that took the place of any part of it is refused."""
    try:
        with opened(b"/", path.strip(b"/").split(b"/")) as descriptor:
            return os.fdopen(os.dup(descriptor), "rb")
    except FetchFailed:
        raise OSError from None


class _Bounded(io.BufferedIOBase):
    """A file of which no single read may exceed a bound: `zipfile` reads a central directory in one."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit = file, limit
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._file.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self._limit:
            raise zipfile.BadZipFile
        return self._file.read(wanted)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _archive(file: IO[bytes], max_members: int) -> zipfile.ZipFile:
    limit = max(2 * READ_STEP_BYTES, max_members * DIRECTORY_BYTES_PER_MEMBER)
    return zipfile.ZipFile(_Bounded(file, limit))  # type: ignore[arg-type]


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Say why a member is refused by what its entry says."""
    parts = info.filename.replace("\\", "/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if parts[0] == "" or ".." in parts or _DRIVE.match(parts[0]) or "\0" in info.orig_filename:
        return FILE_PATH_ESCAPE
    if kind == stat.S_IFLNK:
        return FILE_SYMLINK
    if kind not in {0, stat.S_IFREG} or info.filename.endswith("/"):
        return FILE_NOT_REGULAR
    if info.flag_bits & _ENCRYPTED_FLAGS:
        return FILE_ENCRYPTED
    return None if info.compress_type in _METHODS else FILE_ARCHIVE_METHOD


def _overlapping(members: list[zipfile.ZipInfo]) -> set[int]:
    """Return the offsets of members that share bytes with another: one stream counted many times over."""
    found: set[int] = set()
    end, last = -1, -1
    for info in sorted(members, key=lambda info: (info.header_offset, info.compress_size)):
        if info.header_offset < end:
            found |= {last, info.header_offset}
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        stop = info.header_offset + _LOCAL_HEADER_BYTES + len(name) + info.compress_size
        if stop > end:
            end, last = stop, info.header_offset
    return found


def _text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
