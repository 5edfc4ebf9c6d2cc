"""Shards: plain Parquet files whose every byte can be checked.

A shard carries a checksum per page, and in its name the SHA-256 of its footer
and of the whole file: ``<lineage>-<footer>-<whole>.parquet``. A read of small
columns verifies pages and footer, a read of pixels the whole file, so a shard
that rotted, was cut, or was swapped for another never becomes a batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from memmc.errors import IntegrityError
from memmc.lake.storage import Storage

ROW_GROUP_BYTES = 32 << 20
TAIL_BYTES = 64 << 10
BULK_COLUMNS = frozenset({"pixels", "anomaly_map", "uncertainty_map", "thumbnail", "features"})
"""Columns of image size; never read unless named."""

_STATISTICS_COLUMNS = ("cohort", "model", "ingest_run", "run")
_REMEDY = "restore it from a copy or ingest again"
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)
_NAME = re.compile(r"^[0-9a-f]{16}-(?P<footer>[0-9a-f]{16})-(?P<sha256>[0-9a-f]{64})\.parquet$")


@dataclass(frozen=True)
class ShardFile:
    """A written, not yet committed shard.

    Attributes:
        path: name relative to the storage's root, POSIX.
        size: bytes.
        num_rows: rows.
        sha256: of the whole file, hex.
        partition: values of the partition columns, which the file itself does not hold.
        stats: Delta statistics of the file, JSON.
    """

    path: str
    size: int
    num_rows: int
    sha256: str
    partition: Mapping[str, str] = field(default_factory=dict[str, str])
    stats: str = "{}"


def write_shard(
    storage: Storage,
    rel_dir: str,
    table: pa.Table,
    partition: Mapping[str, str] | None = None,
    lineage: str | None = None,
) -> ShardFile:
    """Write one shard under a new name; it is part of no table until committed.

    Args:
        storage: the lake's storage.
        rel_dir: folder of the table, relative to the storage's root.
        table: rows; columns that `partition` names are dropped from the file.
        partition: one value per partition column, shared by all rows.
        lineage: of the shard that this one replaces (`lineage_of`); one of its own when absent.

    Raises:
        StorageError: the place cannot be written.
    """
    partition = dict(partition or {})
    table = table.drop_columns([name for name in partition if name in table.column_names])
    data = _to_parquet(table)
    digest = hashlib.sha256(data).hexdigest()
    folder = "/".join([rel_dir, *(f"{key}={value}" for key, value in partition.items())])
    path = f"{folder}/{lineage or uuid.uuid4().hex[:16]}-{_footer_digest(data)}-{digest}.parquet"
    storage.write(path, data)
    return ShardFile(path, len(data), table.num_rows, digest, partition, _statistics(table))


def read_shard(
    storage: Storage, path: str, columns: Sequence[str] | None = None, optional: pa.Schema | None = None
) -> pa.Table:
    """Return a shard's rows, all columns when `columns` is None; partition columns are not in it.

    Args:
        optional: columns that a shard of an older schema may lack; they come as nulls.

    Raises:
        IntegrityError: the bytes are not those that were written; the shard is named.
        StorageError: the shard is absent or the place cannot be read.
    """
    tables = list(iter_shard(storage, path, columns, optional))
    return pa.concat_tables(tables)


def iter_shard(
    storage: Storage, path: str, columns: Sequence[str] | None = None, optional: pa.Schema | None = None
) -> Iterator[pa.Table]:
    """Yield a shard's rows in order as one or more tables; arguments and errors are those of `read_shard`."""
    if columns is not None and not BULK_COLUMNS.intersection(columns):
        table = _read_small_columns(storage, path, columns, optional)
        if table is not None:
            yield table
            return
    data = storage.read(path)
    digest = named_digest(path)
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"shard {path}: SHA-256 differs from its name; {_REMEDY}")
    yield from parse_shard(path, data, columns, optional)


def named_digest(path: str) -> str | None:
    """Return the SHA-256 that a shard's name carries, hex; None for a file that another tool wrote."""
    named = _NAME.match(PurePosixPath(path).name)
    return named["sha256"] if named else None


def lineage_of(path: str) -> str:
    """Return what a shard has in common with those that replace it, less some rows: the start of its name."""
    name = PurePosixPath(path).name
    return name[:16] if _NAME.match(name) else path


def parse_shard(
    path: str, data: bytes, columns: Sequence[str] | None = None, optional: pa.Schema | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of a shard's bytes, page checksums verified; arguments and errors are those of `read_shard`."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        wanted, present = _columns_of(file, path, columns, optional)
        for index in range(file.num_row_groups):
            yield _in_order(file.read_row_group(index, columns=present, use_threads=False), wanted, optional)
        if not file.num_row_groups:
            yield _in_order(file.schema_arrow.empty_table(), wanted, optional)
    except _UNREADABLE:
        # The decoder's own text is dropped: it may quote values.
        raise IntegrityError(f"shard {path}: bytes differ from those written; {_REMEDY}") from None


def _read_small_columns(
    storage: Storage, path: str, columns: Sequence[str], optional: pa.Schema | None
) -> pa.Table | None:
    """Fetch only what the columns need; None when that fails, so that the whole file is fetched and judged."""
    tail, size = storage.read_range(path, -TAIL_BYTES, TAIL_BYTES)
    try:
        length = _footer_length(tail)
        if length > len(tail):
            tail, size = storage.read_range(path, -length, length)
        named = _NAME.match(PurePosixPath(path).name)
        if named and _footer_digest(tail) != named["footer"]:
            return None
        metadata = pq.read_metadata(pa.BufferReader(tail))
        source = pa.PythonFile(_Ranges(storage, path, size, tail), mode="r")
        with pq.ParquetFile(source, metadata=metadata, pre_buffer=True, page_checksum_verification=True) as file:
            wanted, present = _columns_of(file, path, columns, optional)
            table = _in_order(file.read(columns=present, use_threads=False), wanted, optional)
            return table if table.num_rows == metadata.num_rows else None
    except _UNREADABLE:
        return None


class _Ranges(io.RawIOBase):
    """A shard of which only what is asked for is fetched; its tail is at hand."""

    def __init__(self, storage: Storage, path: str, size: int, tail: bytes) -> None:
        super().__init__()
        self._storage, self._path, self._size, self._tail = storage, path, size, tail
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        length = max(0, self._size - self._at if size < 0 else min(size, self._size - self._at))
        start = self._at - (self._size - len(self._tail))
        if start >= 0:
            data = self._tail[start : start + length]
        else:
            data = self._storage.read_range(self._path, self._at, length)[0] if length else b""
        self._at += len(data)
        return data


def _footer_length(data: bytes) -> int:
    """Return the bytes from the footer's start to the file's end: footer, its length (4 bytes), the magic ``PAR1``."""
    if len(data) < 8:
        raise pa.ArrowInvalid("not a Parquet file")
    return int.from_bytes(data[-8:-4], "little") + 8


def _footer_digest(data: bytes) -> str:
    """Return 16 hex digits naming the footer that ends the data; too short a tail gives another name."""
    return hashlib.sha256(data[-_footer_length(data) :]).hexdigest()[:16]


def _columns_of(
    file: pq.ParquetFile, path: str, columns: Sequence[str] | None, optional: pa.Schema | None
) -> tuple[list[str], list[str]]:
    """Return the columns asked for, and those of them that the file holds."""
    names: list[str] = file.schema_arrow.names
    wanted = names if columns is None else list(columns)
    present = [name for name in wanted if name in names]
    missing = sorted(set(wanted) - {*names, *(optional.names if optional is not None else ())})
    if missing:
        raise IntegrityError(f"shard {path}: no columns {missing}; it is not of this table, or was changed")
    return wanted, present


def _in_order(rows: pa.Table, wanted: Sequence[str], optional: pa.Schema | None) -> pa.Table:
    """Return the columns in the order asked for, those the rows lack as nulls."""
    for name in wanted:
        if name not in rows.column_names and optional is not None:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, optional.field(name).type))
    return rows.select(list(wanted))


def _to_parquet(table: pa.Table) -> bytes:
    """Return Parquet bytes: page checksums, lz4, no dictionary and no statistics on binary columns."""
    small = [name for name, kind in zip(table.column_names, table.schema.types, strict=True) if not _is_binary(kind)]
    bytes_per_row = max(1, table.nbytes // max(1, table.num_rows))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // bytes_per_row),
        write_page_checksum=True,
        compression="lz4",
        use_dictionary=[name for name in small if pa.types.is_string(table.schema.field(name).type)],  # pyright: ignore[reportArgumentType]
        write_statistics=small,  # pyright: ignore[reportArgumentType]
    )
    return sink.getvalue().to_pybytes()


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _statistics(table: pa.Table) -> str:
    """Return Delta file statistics: the row count, and the only value of columns that have just one."""
    only: dict[str, str] = {}
    for name in _STATISTICS_COLUMNS:
        if name in table.column_names and table.num_rows and not table[name].null_count:
            values = table[name].unique()
            if len(values) == 1:
                only[name] = values[0].as_py()
    return json.dumps(
        {"numRecords": table.num_rows, "minValues": only, "maxValues": only, "nullCount": dict.fromkeys(only, 0)}
    )
