"""Rows of normals in one share of a cohort, with what training reads of them."""

from __future__ import annotations

import pyarrow as pa
from watched_lake import START, batch


def normal_rows(seed: int, count: int, split: str, cohort: str = "cxr") -> pa.Table:
    """Return rows of `instances` of 32 px, one a patient; another seed gives other patients."""
    rows = batch(seed, count, START, cohort=cohort, split=split)
    for name, value in (("pixel_mean", 0.5), ("pixel_std", 0.2)):
        column = pa.array([value] * count, pa.float64())
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return rows
