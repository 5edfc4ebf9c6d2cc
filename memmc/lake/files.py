"""Between rows of a table and its shards: partitions, sizes, filters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from memmc.errors import DataError
from memmc.lake.evolution import optional_columns
from memmc.lake.schemas import PARTITION_BY, conform, schema_of
from memmc.lake.shards import ShardFile, read_shard, write_shard
from memmc.lake.storage import Storage
from memmc.s3 import AbsentError

T = TypeVar("T")

SHARD_BYTES = 128 << 20

Value = str | int | float | bool | None
Filter = Mapping[str, Value | Collection[Value]]
"""Column name -> the value, or the values, that a row may have; all names must hold."""


@dataclass(frozen=True)
class DataFile:
    """A committed shard.

    Attributes:
        path: name relative to the lake's root, POSIX.
        size: bytes.
        num_rows: rows.
        partition: values of the partition columns.
    """

    path: str
    size: int
    num_rows: int
    partition: Mapping[str, str]


def write_rows(storage: Storage, table: str, rows: pa.Table) -> list[ShardFile]:
    """Write rows as shards of a table, one or more per partition; a reader sees them once committed.

    Raises:
        DataError: rows do not fit the table (`conform`).
        StorageError: the place cannot be written.
    """
    rows = conform(table, rows)
    return [
        write_shard(storage, table, part, partition)
        for partition, group in _partitions(rows, PARTITION_BY.get(table, ()))
        for part in _bounded(group)
    ]


def _partitions(rows: pa.Table, by: Sequence[str]) -> Iterator[tuple[dict[str, str], pa.Table]]:
    if not by:
        yield {}, rows
        return
    for keys in (
        rows.select(by).group_by(list(by)).aggregate([]).sort_by([(name, "ascending") for name in by]).to_pylist()
    ):
        yield keys, select_rows(rows, keys)


def _bounded(rows: pa.Table) -> Iterator[pa.Table]:
    if not rows.num_rows:
        return
    step = max(1, SHARD_BYTES * rows.num_rows // max(1, rows.nbytes))
    yield from (rows.slice(start, step) for start in range(0, rows.num_rows, step))


def select_rows(rows: pa.Table, where: Filter) -> pa.Table:
    """Return the rows that the filter keeps, in their order.

    Raises:
        DataError: a value of the filter is not of its column's type.
    """
    mask: pa.ChunkedArray | None = None
    for name, value in where.items():
        column = rows[name]
        try:
            options = pc.SetLookupOptions(value_set=pa.array(values(value), column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise DataError(f"filter on column '{name}': expected values of type {column.type}") from None
        found = pc.call_function("is_in", [column], options)
        mask = found if mask is None else pc.call_function("and", [mask, found])
    return rows if mask is None else rows.filter(mask)


def values(value: Value | Collection[Value]) -> list[Value]:
    """Return the allowed values of one filter entry."""
    return [value] if value is None or isinstance(value, str | int | float) else list(value)


def read_file(storage: Storage, table: str, file: DataFile, columns: Sequence[str]) -> pa.Table:
    """Return columns of one committed shard, partition columns included."""
    stored = [name for name in columns if name not in file.partition]
    rows = read_shard(storage, file.path, stored, optional_columns(table)) if stored else None
    return with_partition(table, rows, file, columns)


def with_partition(table: str, rows: pa.Table | None, file: DataFile, columns: Sequence[str]) -> pa.Table:
    """Return rows of a shard with its partition columns added, in the order of `columns`; None rows = all of them.

    Raises:
        DataError: the shard's type of a column does not fit the one that this code gives it.
    """
    schema = schema_of(table)
    num_rows = file.num_rows if rows is None else rows.num_rows
    fields = [schema.field(name) for name in columns]
    arrays = [
        pa.chunked_array([pa.repeat(pa.scalar(file.partition[field.name], field.type), num_rows)])
        if rows is None or field.name in file.partition
        else _cast(table, rows[field.name], field)
        for field in fields
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _cast(table: str, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"table '{table}', column '{field.name}': the lake holds {column.type}, this version of memmc "
            f"expects {field.type}; use the version that wrote the lake"
        ) from None


def again_when_absent(look: Callable[[], T]) -> T:
    """Look once more where a file is gone that was listed: an erasure may have replaced it since.

    Raises:
        AbsentError: it is gone again.
    """
    try:
        return look()
    except AbsentError:
        return look()
