"""What may change in a table's schema: optional columns are added, required ones become optional, nothing else.

Shards are read by column name. So code of yesterday reads a table of today, whose further columns it does not
ask for, and code of today reads a table of yesterday, whose shards give nulls for the columns they lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from memmc.errors import DataError
from memmc.lake.schemas import PARTITION_BY, schema_of

if TYPE_CHECKING:
    from deltalake import DeltaTable


def optional_columns(table: str) -> pa.Schema:
    """Return the columns that a shard may lack, and which it then gives as nulls."""
    return pa.schema([field for field in schema_of(table) if field.nullable])


def evolve(table: str, delta: DeltaTable) -> bool:
    """Give a committed table the columns that this code writes; what it has besides stays.

    Args:
        table: name.
        delta: the table as it was committed, perhaps by code of another version.

    Returns:
        Whether anything was to be done; the table then has versions more, without rows, and is to be opened again.

    Raises:
        DataError: a column was renamed, removed, retyped or added as required, or the partition columns changed;
            nothing may be written.
        DeltaError: another writer was first; open the table again.
    """
    from deltalake import Schema

    new, loosened = _difference(table, pa.schema(delta.schema()), list(delta.metadata().partition_columns))
    if new:
        delta.alter.add_columns(Schema.from_arrow(pa.schema(new)).fields)
    for name in loosened:
        delta.alter.drop_column_not_null(name)
    return bool(new or loosened)


def _difference(table: str, found: pa.Schema, partition_by: list[str]) -> tuple[list[pa.Field], list[str]]:
    """Return the columns to add to those found, and the names of those that become optional."""
    known = schema_of(table)
    new = [field for field in known if field.name not in found.names]
    foreign = [field for field in found if field.name not in known.names]
    shared = [(field, found.field(field.name)) for field in known if field.name in found.names]
    for here, there in shared:
        if here.type != there.type:
            raise _refusal(table, f"column '{here.name}' is of type {there.type} there and {here.type} here")
    required = sorted(field.name for field in [*new, *foreign] if not field.nullable)
    if required:
        raise _refusal(table, f"required columns {required} are on one side alone")
    if new and foreign:
        names = [sorted(field.name for field in fields) for fields in (foreign, new)]
        raise _refusal(table, f"{names[0]} are there alone and {names[1]} here alone, as after a renaming")
    if partition_by != list(PARTITION_BY.get(table, ())):
        raise _refusal(table, "it is partitioned by other columns")
    return new, [here.name for here, there in shared if here.nullable and not there.nullable]


def _refusal(table: str, found: str) -> DataError:
    return DataError(
        f"table '{table}' does not fit this version of memmc: {found}; only optional columns may be added, and "
        "required ones become optional: use the version that wrote the lake, or ingest into a new lake"
    )
