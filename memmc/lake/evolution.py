"""What may change in a table's schema: optional columns are added, and nothing else.

Shards are read by column name. So code of yesterday reads a table of today, whose further columns it does not
ask for, and code of today reads a table of yesterday, whose shards give nulls for the columns they lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from memmc.errors import DataError
from memmc.lake.schemas import PARTITION_BY, schema_of

if TYPE_CHECKING:
    from deltalake import DeltaTable, Field


def optional_columns(table: str) -> pa.Schema:
    """Return the columns that a shard may lack, and which it then gives as nulls."""
    return pa.schema([field for field in schema_of(table) if field.nullable])


def columns_to_add(table: str, delta: DeltaTable) -> list[Field]:
    """Return the optional columns that this code knows and the committed table does not have yet.

    Args:
        table: name.
        delta: the table as it was committed, perhaps by code of another version.

    Raises:
        DataError: a column was renamed, removed, retyped, made optional or required, or added as required, or
            the partition columns changed; nothing may be written.
    """
    from deltalake import Schema

    known = {field.name: field for field in Schema.from_arrow(schema_of(table)).fields}
    found = {field.name: field for field in delta.schema().fields}
    new = [field for name, field in known.items() if name not in found]
    foreign = [field for name, field in found.items() if name not in known]
    changed = [name for name in known.keys() & found.keys() if _form(known[name]) != _form(found[name])]
    if changed:
        name = min(changed)
        raise _refusal(table, f"column '{name}' is {_form(found[name])} there and {_form(known[name])} here")
    required = sorted(field.name for field in [*new, *foreign] if not field.nullable)
    if required:
        raise _refusal(table, f"required columns {required} are on one side alone")
    if new and foreign:
        names = [sorted(field.name for field in fields) for fields in (foreign, new)]
        raise _refusal(table, f"{names[0]} are there alone and {names[1]} here alone, as after a renaming")
    if list(delta.metadata().partition_columns) != list(PARTITION_BY.get(table, ())):
        raise _refusal(table, "it is partitioned by other columns")
    return new


def _form(field: Field) -> str:
    kind = str(getattr(field.type, "type", field.type))
    return f"{'optional' if field.nullable else 'required'} {kind}"


def _refusal(table: str, found: str) -> DataError:
    return DataError(
        f"table '{table}' does not fit this version of memmc: {found}; only optional columns may be added: "
        "use the version that wrote the lake, or ingest into a new lake"
    )
