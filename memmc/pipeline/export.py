"""Score rows for people and other programs: Parquet, CSV or JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from memmc.config import Config
from memmc.dicom.deidentify import key_id, open_path
from memmc.errors import DataError, UsageError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.models import open_model
from memmc.pipeline.select import newest_calibration, scored_instances
from memmc.scoring.studies import study_rows

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
    "calibration_id",
)


STUDY_COLUMNS = (
    "study_uid",
    "label",
    "split",
    "num_instances",
    "num_scored",
    "worst_instance",
    "anomaly_score",
    "min_p_value",
    "p_value",
    "is_abnormal",
    "model",
    "not_scored",
)
Level = Literal["instance", "study"]
_TYPES: Mapping[str, pa.DataType] = {
    "anomaly_score": pa.float64(),
    "min_p_value": pa.float64(),
    "p_value": pa.float64(),
    "is_abnormal": pa.bool_(),
    "dataset_version": pa.int64(),
    "num_instances": pa.int64(),
    "num_scored": pa.int64(),
    "scored_at": pa.timestamp("us", tz="UTC"),
}  # every other column is text


@recorded("scores", lambda done: {"rows": done.num_rows})
def export_scores(
    config: Config, cohort: str, model: str | None, out: Path | None, level: Level = "instance"
) -> pa.Table:
    """Return a cohort's newest score of each instance, or of each study, and write it to `out` when given.

    `source_key` is the path an instance was ingested from, readable only to a
    caller who holds the identity key of the lake; null to everybody else.

    Returns:
        A table with `COLUMNS` or `STUDY_COLUMNS`, the most abnormal first; last those without a score, whose
        `not_scored` says why. Scores of two calibrations cannot be compared: instances that the newest has not scored
        yet come after those that it has. A study is judged by the newest alone, on which it needs an instance.

    Raises:
        DataError: the cohort has no scores.
        UsageError: `out` ends neither in .parquet nor in .csv.
    """
    import pyarrow.parquet as pq

    if out is not None and out.suffix not in {".parquet", ".csv"}:
        raise UsageError("--out must end in .parquet or .csv")
    lake = Lake(config.lake.uri)
    rows = scored_instances(config, lake, cohort, model)
    if not rows:
        raise DataError(f"cohort '{cohort}' has no scores; run `memmc score --cohort {cohort}`")
    if level == "study":
        names, rows = STUDY_COLUMNS, _studies(config, lake, cohort, model, rows)
    else:
        names, rows = COLUMNS, _instances(config, lake, cohort, model, rows)
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in names])
    table = pa.table({name: [row[name] for row in rows] for name in names}, schema=schema)
    if out is not None and out.suffix == ".parquet":
        pq.write_table(table, out)
    elif out is not None:
        out.write_text(rows_as_csv(table))
    return table


def _instances(
    config: Config, lake: Lake, cohort: str, model: str | None, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    newest = newest_calibration(lake, open_model(config, home_directory(), model, cohort))["calibration_id"]
    key = held_key(config, home_directory())
    if key is not None and lake.key_id() != key_id(key):
        key = None
    for row in rows:
        row["source_key"] = None if key is None else open_path(key, row["source_ref"])

    def place(row: dict[str, Any]) -> tuple[bool, bool, float, str]:
        old = row["calibration_id"] != newest
        return row["not_scored"] is not None, old, -(row["anomaly_score"] or 0.0), row["sop_instance_uid"]

    return sorted(rows, key=place)


def _studies(
    config: Config, lake: Lake, cohort: str, model: str | None, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return studies as the newest calibration judges them; only rows that it judged can be compared."""
    calibration = newest_calibration(lake, open_model(config, home_directory(), model, cohort))
    mine = [row for row in rows if row["calibration_id"] == calibration["calibration_id"]]
    if not mine:
        raise DataError("no scores of the newest calibration; run `memmc score` again, then ask for studies")
    return study_rows(mine, calibration["study_p_values"], calibration["false_positive_rate"], _sizes(lake, cohort))


def _sizes(lake: Lake, cohort: str) -> Counter[str]:
    """Return the number of instances of each study, those without a score included."""
    where: dict[str, Any] = {"cohort": cohort, "outcome": ("stored", "excluded", "quarantined")}
    rows = lake.read(INSTANCES, ["sop_instance_uid", "study_uid"], filter=where).to_pylist()
    studies = {row["sop_instance_uid"]: row["study_uid"] or row["sop_instance_uid"] for row in rows}
    return Counter(study for uid, study in studies.items() if uid is not None)


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
    rows = table.to_pylist()
    for row in rows:
        if "scored_at" in row:
            row["scored_at"] = row["scored_at"].isoformat()
    return json.dumps({"rows": rows})
