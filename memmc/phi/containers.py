"""What a file holds, taken out of whatever it is packed in: Parquet, SQLite, zip and compressed streams.

Each file is also searched as it lies on disk: footers, free pages and what
stands between the parts are in no logical view.
"""

from __future__ import annotations

import bz2
import lzma
import os
import shutil
import sqlite3
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memmc.phi.patterns import CHUNK_BYTES, LEAST_BINARY_BYTES

MAX_DEPTH: Final = 5
MAX_UNPACKED_BYTES: Final = 16 << 30
"""Of one compressed stream; more is an error, not a pass."""

_SMALL_BYTES = 1 << 20  # up to here even short patterns are searched in binary data
_IN_MEMORY_BYTES = 32 << 20
_SQLITE = b"SQLite format 3\0"
_DATES_COLUMN = "acquisition_date"
_COUNTS = frozenset(("size_bytes", "dataset_version", "num_normals"))  # numbers that only look like identifiers
_SPACER = b"\n"
_ANY_HEADER = zlib.MAX_WBITS | 32
_WEAK_MAGICS = frozenset(("zlib", "bz2"))  # letters that a text may begin with


class Unreadable(Exception):
    """A container could not be opened; holds no text of it."""


@dataclass(frozen=True)
class View:
    """One run of bytes to search.

    Attributes:
        inside: where in the file: `file`, `column pixels`, `zip member 3`, ...
        chunks: its bytes.
        least_bytes: shorter patterns would occur by chance.
        shifted_dates: dates that stand here since they were moved on purpose; equal ones are counted apart.
    """

    inside: str
    chunks: Iterable[bytes]
    least_bytes: int = 0
    shifted_dates: frozenset[str] = frozenset()


def views(file: IO[bytes], inside: str = "file", depth: int = 0) -> Iterator[View]:
    """Yield every view of a seekable file, packed ones unpacked; consume each before the next.

    Raises:
        Unreadable: it begins like a container that cannot be opened, or is nested too deep.
    """
    head = _at(file, 0, 16)
    size = file.seek(0, os.SEEK_END)
    if depth > MAX_DEPTH:
        raise Unreadable
    if head[:4] == b"PAR1" and _at(file, max(0, size - 4), 4) == b"PAR1":
        yield from _parquet(file, inside, size)
        return
    yield View(inside, _chunks(file), _least(head, size))
    if zipfile.is_zipfile(file):
        yield from _zip(file, inside, depth)
    elif (stream := _decompressed(file, head)) is not None:
        content, whole = _unpacked(stream)
        with content:
            if content.tell() or whole:
                yield from views(content, f"{inside}, decompressed", depth + 1)
            if not whole and (content.tell() or _magic(head) not in _WEAK_MAGICS):
                raise Unreadable


def _at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _least(head: bytes, size: int) -> int:
    text = head.startswith(_SQLITE) or b"\0" not in head
    return 0 if (text and _magic(head) is None) or size <= _SMALL_BYTES else LEAST_BINARY_BYTES


# --- compressed streams -------------------------------------------------------------------------------------------


def _magic(head: bytes) -> str | None:
    for name, magics in (
        ("gzip", (b"\x1f\x8b",)),
        ("zstd", (b"\x28\xb5\x2f\xfd",)),
        ("lz4", (b"\x04\x22\x4d\x18",)),
        ("bz2", (b"BZh",)),
        ("xz", (b"\xfd7zXZ",)),
        ("zlib", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")),
    ):
        if head.startswith(magics):
            return name
    return None


def _decompressed(file: IO[bytes], head: bytes) -> IO[bytes] | None:
    """Return a stream of what a compressed file holds, None when it is none."""
    name = _magic(head)
    file.seek(0)
    if name == "bz2":
        return bz2.BZ2File(file)  # type: ignore[return-value]
    if name == "xz":
        return lzma.LZMAFile(file)  # type: ignore[return-value]
    if name in ("zstd", "lz4"):
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), name)  # type: ignore[return-value]
    return _Inflated(file) if name in ("zlib", "gzip") else None  # type: ignore[return-value]


class _Inflated:
    """Zlib or gzip streams in a row; gives what there is before it fails, which the library's own file does not."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._inflate, self._input = file, zlib.decompressobj(_ANY_HEADER), b""

    def read(self, size: int) -> bytes:
        while True:
            if self._inflate.eof:
                self._input = self._inflate.unused_data or self._file.read(CHUNK_BYTES)
                if _magic(self._input[:4]) not in ("zlib", "gzip"):
                    return b""  # what follows is no stream; it was searched as it lies
                self._inflate = zlib.decompressobj(_ANY_HEADER)
            data = self._input or self._file.read(CHUNK_BYTES)
            if not data:
                raise EOFError
            out = self._inflate.decompress(data, size)
            self._input = self._inflate.unconsumed_tail
            if out:
                return out


def _unpacked(stream: Any) -> tuple[IO[bytes], bool]:
    """Copy a stream into memory or, where it is large, into a file that has no name.

    Returns:
        What could be unpacked, and whether that is all of it.
    """
    content = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        while chunk := stream.read(CHUNK_BYTES):
            content.write(chunk)
            if content.tell() > MAX_UNPACKED_BYTES:
                return content, False  # type: ignore[return-value]
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException):
        return content, False  # type: ignore[return-value]
    return content, True  # type: ignore[return-value]


def _zip(file: IO[bytes], inside: str, depth: int) -> Iterator[View]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            yield View(
                f"{inside}, zip names", ["\n".join(member.filename for member in members).encode("utf-8", "replace")]
            )
            for number, member in enumerate(members):
                if not member.is_dir():
                    with archive.open(member) as stream:
                        content, whole = _unpacked(stream)
                    with content:
                        yield from views(content, f"{inside}, zip member {number}", depth + 1)
                    if not whole:
                        raise Unreadable
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError):
        raise Unreadable from None


# --- Parquet ------------------------------------------------------------------------------------------------------


def _parquet(file: IO[bytes], inside: str, size: int) -> Iterator[View]:
    """Yield every column's values unpacked, the footer, and the file as it lies.

    Raises:
        Unreadable: not the Parquet it seems.
    """
    footer = int.from_bytes(_at(file, size - 8, 4), "little") + 8
    try:
        with pq.ParquetFile(file, pre_buffer=False) as parquet:
            dates = _dates(parquet)
            for index in range(parquet.num_row_groups):
                for field in parquet.schema_arrow:
                    column = parquet.read_row_group(index, [field.name], use_threads=False)[field.name]
                    excused = dates if field.name == _DATES_COLUMN else frozenset[str]()
                    yield from _column(field.name, column, inside, excused)
            for key, value in (parquet.schema_arrow.metadata or {}).items():
                yield View(f"{inside}, footer metadata", [key, _SPACER, value])
            for field in parquet.schema_arrow:
                yield View(f"{inside}, footer metadata", [_SPACER.join([field.name.encode(), *_flat(field.metadata)])])
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise Unreadable from None
    yield View(f"{inside}, footer", [_at(file, max(0, size - footer), footer)], 0, dates)
    yield View(inside, _chunks(file), LEAST_BINARY_BYTES, dates)


def _flat(metadata: dict[bytes, bytes] | None) -> list[bytes]:
    return [part for pair in (metadata or {}).items() for part in pair]


def _dates(parquet: pq.ParquetFile) -> frozenset[str]:
    if _DATES_COLUMN not in parquet.schema_arrow.names:
        return frozenset()
    return frozenset(value for value in parquet.read([_DATES_COLUMN])[_DATES_COLUMN].unique().to_pylist() if value)


def _column(name: str, column: pa.ChunkedArray, inside: str, excused: frozenset[str]) -> Iterator[View]:
    where = f"{inside}, column {name}"
    for array in column.chunks:
        while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            array = array.flatten()
        if pa.types.is_struct(array.type):
            for child, values in zip(array.type, array.flatten(), strict=True):
                yield from _column(f"{name}.{child.name}", pa.chunked_array([values]), inside, excused)
        elif pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
            yield from _blobs(array, where)
        elif pa.types.is_integer(array.type) and name not in _COUNTS:
            yield View(where, _lines(pc.cast(array.unique(), pa.string())))
        elif pa.types.is_dictionary(array.type):
            yield from _column(name, pa.chunked_array([array.dictionary_decode()]), inside, excused)
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            yield View(where, _lines(array.unique()), 0, excused)


def _lines(array: pa.Array) -> Iterator[bytes]:
    """Yield the values with a line's end behind each, some thousands at a time."""
    for start in range(0, len(array), 8192):
        values = array.slice(start, 8192).to_pylist()
        yield "".join(f"{value}\n" for value in values if value is not None).encode("utf-8", "replace")


def _blobs(array: pa.Array, where: str) -> Iterator[View]:
    """Yield binary values: one after the other as they are, and unpacked where one opens as a compressed stream."""
    values = array.buffers()[2]
    if values is not None:
        data = memoryview(values)
        least = LEAST_BINARY_BYTES if data.nbytes > _SMALL_BYTES else 0
        pieces = (bytes(data[start : start + CHUNK_BYTES]) for start in range(0, data.nbytes, CHUNK_BYTES))
        yield View(where, pieces, least)
    for value in array:
        if value.is_valid:
            yield from _packed(memoryview(value.as_buffer()), where)


def _packed(data: memoryview, where: str) -> Iterator[View]:
    head = bytes(data[:16])
    if _magic(head) is None and not head.startswith((b"PAR1", b"PK\x03\x04")):
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as content:
        content.write(data)
        try:
            yield from views(content, f"{where}, unpacked", 1)  # type: ignore[arg-type]
        except Unreadable:  # pixels may begin like anything
            return


# --- SQLite -------------------------------------------------------------------------------------------------------


def is_sqlite(path: Path) -> bool:
    """Say whether a file is an SQLite database."""
    with path.open("rb") as file:
        return file.read(16) == _SQLITE


def sqlite_views(path: Path) -> Iterator[View]:
    """Yield the cells of a database with its write-ahead log applied; the database itself is not touched.

    The raw bytes miss values that lie on several pages.

    Raises:
        Unreadable: it does not open.
    """
    with tempfile.TemporaryDirectory(prefix="scan-phi-") as folder:
        copy = Path(folder) / "copy.db"
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        try:
            connection = sqlite3.connect(copy)
            connection.text_factory = bytes
            try:
                tables = [
                    row[0].decode() for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                ]
                for table in tables:
                    name = table.replace('"', '""')
                    yield from _cells(connection.execute(f'SELECT * FROM "{name}"'), f"table {table}")
            finally:
                connection.close()
        except sqlite3.Error:
            raise Unreadable from None


def _cells(cursor: sqlite3.Cursor, where: str) -> Iterator[View]:
    while rows := cursor.fetchmany(512):
        yield View(where, [_SPACER.join(_text(value) for row in rows for value in row if value is not None)])
        for row in rows:
            for value in row:
                if isinstance(value, bytes):
                    yield from _packed(memoryview(value), where)


def _text(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
