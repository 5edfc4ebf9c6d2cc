"""Whom monitoring looks at: the instances of a window of time, and those of a model's baseline, one a patient."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import MonitorConfig
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.models import OpenModel
from memmc.pipeline.score_plan import newer, since_limits
from memmc.pipeline.select import calibrated_on

Row = dict[str, Any]

WORDS = (
    "modality", "photometric_interpretation", "transfer_syntax_uid", "manufacturer", "manufacturer_model",
    "view_position", "body_part", "laterality", "patient_sex", "bits_stored", "lossy",
)  # fmt: skip
NUMBERS = ("rows", "columns", "pixel_spacing_mm", "patient_age_years")
_KEYS = ("object_key", "sop_instance_uid", "patient_key", "preprocess_id", "split", "label", "ingested_at")
_COLUMNS = list(dict.fromkeys([*_KEYS, *WORDS, *NUMBERS]))
_HELD_OUT = ("calibrate", "test")


def window_rows(
    lake: Lake, cohort: str, model: OpenModel, since: str | None, rules: MonitorConfig, now: datetime
) -> pa.Table:
    """Return the stored instances of a window, without pixels, every one of a patient.

    Args:
        lake: holds the cohort.
        cohort: or a view.
        model: what it has learned from, or was calibrated on, is never part of a window.
        since: a date or a version of `instances`; the last `monitor.window_days` when absent.
        rules: settings.
        now: end of the window.

    Raises:
        UsageError: `since` is neither a date nor a version.
    """
    rows = lake.instances_with_labels(_COLUMNS, None, {"cohort": cohort, "outcome": "stored"})
    moment, older = since_limits(lake, cohort, since)
    if since is None:
        moment = now - timedelta(days=rules.window_days)
    met = lake.read(INSTANCES, ["object_key"], model.dataset_version, {"cohort": model.cohort, "outcome": "stored"})
    return without_calibrated(without(newer(rows, moment, older), "object_key", met["object_key"]), lake, model)


def without_calibrated(rows: pa.Table, lake: Lake, model: OpenModel) -> pa.Table:
    """Return the rows without the held-out shares that the model was calibrated on, those of other cohorts among them.

    Args:
        rows: with `object_key`.
    """
    for cohort, version in calibrated_on(lake, model):
        where = {"cohort": cohort, "outcome": "stored", "split": "calibrate"}
        rows = without(rows, "object_key", lake.read(INSTANCES, ["object_key"], version, where)["object_key"])
    return rows


def baseline_rows(lake: Lake, model: OpenModel) -> pa.Table:
    """Return the instances that the model's cohort held when it was trained and that it did not learn from.

    Of any label: a stream in which some scans are abnormal has changed when their share has.
    """
    where = {"cohort": model.cohort, "outcome": "stored", "split": _HELD_OUT}
    return lake.instances_with_labels(_COLUMNS, model.dataset_version, where)


def one_each(rows: pa.Table) -> pa.Table:
    """Return one instance of each patient, that of the first keyed UID, in the order of these."""
    uids = rows["sop_instance_uid"]
    owners = pc.call_function("coalesce", [rows["patient_key"], uids])
    first = pa.table({"owner": owners, "uid": uids}).group_by("owner").aggregate([("uid", "min")])["uid_min"]
    return with_only(rows, "sop_instance_uid", first).sort_by("sop_instance_uid")


def drawn(rows: pa.Table, most: int, seed: int) -> pa.Table:
    """Return at most so many rows, in order, drawn by the seed."""
    if rows.num_rows <= most:
        return rows
    return rows.take(np.sort(np.random.default_rng(seed).choice(rows.num_rows, most, replace=False)))


def with_only(rows: pa.Table, column: str, values: Any) -> pa.Table:
    """Return the rows whose value is among those of a column or list."""
    return rows.filter(_among(rows[column], values))


def without(rows: pa.Table, column: str, values: Any) -> pa.Table:
    """Return the rows whose value is not among those of a column or list."""
    return rows.filter(pc.call_function("invert", [_among(rows[column], values)]))


def _among(column: Any, values: Any) -> Any:
    known = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(list(values), pa.string())
    return pc.call_function("is_in", [column], pc.SetLookupOptions(value_set=known))
