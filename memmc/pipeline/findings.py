"""The table `monitoring`: what each look at a cohort found."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from memmc.lake.schemas import MONITORING, SCHEMAS
from memmc.lake.tables import Lake

Kind = Literal["drift", "canary", "golden", "watch"]
Row = dict[str, Any]


def record(
    lake: Lake, cohort: str, run: str, kind: Kind, rows: Sequence[Row], moment: datetime | None = None, **shared: Any
) -> int | None:
    """Append findings of one kind; return the table's version, None where there is nothing to append.

    Args:
        lake: whose table.
        cohort: looked at.
        run: names the look; a run and kind that the table holds adds nothing.
        kind: of finding.
        rows: columns by name, at least `name`.
        moment: of the look, now when absent.
        shared: columns that all rows share.
    """
    if not rows:
        return None
    fixed = {"cohort": cohort, "run": run, "kind": kind, "checked_at": moment or datetime.now(UTC), **shared}
    table = pa.Table.from_pylist([{**fixed, **row} for row in rows], schema=SCHEMAS[MONITORING])
    return lake.append(MONITORING, table, f"{run}-{kind}", {"cohort": cohort, "kind": kind})


def recorded(lake: Lake, cohort: str, kind: Kind | None = None, model_digest: str | None = None) -> list[Row]:
    """Return the findings of a cohort, oldest first."""
    if not lake.exists(MONITORING):
        return []
    # In a tuple, the name of a view is not replaced by its cohorts: findings stand under the name that was looked at.
    where = {"cohort": (cohort,), "kind": kind, "model_digest": model_digest}
    chosen = {name: value for name, value in where.items() if value is not None}
    rows = lake.read(MONITORING, None, None, chosen).to_pylist()
    return sorted(rows, key=lambda row: (row["checked_at"], row["kind"], row["name"]))
