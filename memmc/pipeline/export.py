"""Score rows for people and other programs: Parquet, CSV or JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.errors import DataError, UsageError
from memmc.pipeline.identity import held_key, home_directory

COLUMNS = (
    "source_key",
    "sop_instance_uid",
    "label",
    "split",
    "anomaly_score",
    "p_value",
    "is_abnormal",
    "model",
    "dataset_version",
    "preprocess_id",
    "scored_at",
    "stratum",
    "not_scored",
)


def export_scores(config: Config, cohort: str, model: str | None, out: Path | None) -> Any:
    """Return a cohort's newest score of each instance, and write it to `out` when given.

    `source_key` is the path an instance was ingested from, readable only to a
    caller who holds the identity key of the lake; null to everybody else.

    Returns:
        A `pyarrow.Table` with `COLUMNS`, ordered by descending anomaly score; last the instances without one, whose
        `not_scored` says why.

    Raises:
        DataError: the cohort has no scores.
        UsageError: `out` ends neither in .parquet nor in .csv.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memmc.dicom.deidentify import key_id, open_path
    from memmc.lake.tables import Lake
    from memmc.pipeline.select import scored_instances

    if out is not None and out.suffix not in {".parquet", ".csv"}:
        raise UsageError("--out must end in .parquet or .csv")
    lake = Lake(config.lake.uri)
    rows = scored_instances(config, lake, cohort, model)
    if not rows:
        raise DataError(f"cohort '{cohort}' has no scores; run `memmc score --cohort {cohort}`")
    key = held_key(config, home_directory())
    if key is not None and lake.key_id() != key_id(key):
        key = None
    for row in rows:
        row["source_key"] = None if key is None else open_path(key, row["source_ref"])
    rows.sort(key=lambda row: (row["not_scored"] is not None, -(row["anomaly_score"] or 0), row["sop_instance_uid"]))
    table = pa.table(
        {name: [row[name] for row in rows] for name in COLUMNS},
        schema=pa.schema(
            [
                ("source_key", pa.string()),
                ("sop_instance_uid", pa.string()),
                ("label", pa.string()),
                ("split", pa.string()),
                ("anomaly_score", pa.float64()),
                ("p_value", pa.float64()),
                ("is_abnormal", pa.bool_()),
                ("model", pa.string()),
                ("dataset_version", pa.int64()),
                ("preprocess_id", pa.string()),
                ("scored_at", pa.timestamp("us", tz="UTC")),
                ("stratum", pa.string()),
                ("not_scored", pa.string()),
            ]
        ),
    )
    if out is not None and out.suffix == ".parquet":
        pq.write_table(table, out)
    elif out is not None:
        out.write_text(rows_as_csv(table))
    return table


def rows_as_csv(table: Any) -> str:
    """Return the table as CSV text with a header line."""
    import pyarrow.csv as pa_csv

    sink = io.BytesIO()
    pa_csv.write_csv(table, sink)
    return sink.getvalue().decode()


def rows_as_json(table: Any, out: Path | None) -> str:
    """Return one JSON object: the rows, or where they were written."""
    if out is not None:
        return json.dumps({"path": str(out), "rows": table.num_rows, "columns": list(table.column_names)})
    rows = [{**row, "scored_at": row["scored_at"].isoformat()} for row in table.to_pylist()]
    return json.dumps({"rows": rows})
