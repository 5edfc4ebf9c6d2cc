"""Whom monitoring looks at: the instances of a window of time, and those of a model's baseline, one a patient."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from memmc.config import MonitorConfig
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.models import OpenModel
from memmc.pipeline.score_plan import newer, since_limits

Row = dict[str, Any]

WORDS = (
    "modality", "photometric_interpretation", "transfer_syntax_uid", "manufacturer", "manufacturer_model",
    "view_position", "body_part", "laterality", "patient_sex", "bits_stored", "lossy",
)  # fmt: skip
NUMBERS = ("rows", "columns", "pixel_spacing_mm", "patient_age_years")
_KEYS = ("object_key", "sop_instance_uid", "patient_key", "preprocess_id", "split", "label", "ingested_at")
_HELD_OUT = ("calibrate", "test")


def window_rows(
    lake: Lake, cohort: str, model: OpenModel, since: str | None, rules: MonitorConfig, now: datetime
) -> list[Row]:
    """Return the stored instances of a window, without pixels, every one of a patient.

    Args:
        lake: holds the cohort.
        cohort: or a view.
        model: what it has learned from is never part of a window.
        since: a date or a version of `instances`; the last `monitor.window_days` when absent.
        rules: settings.
        now: end of the window.

    Raises:
        UsageError: `since` is neither a date nor a version.
    """
    columns = list(dict.fromkeys([*_KEYS, *WORDS, *NUMBERS]))
    rows = lake.instances_with_labels(columns, None, {"cohort": cohort, "outcome": "stored"})
    moment, older = since_limits(lake, cohort, since)
    if since is None:
        moment = now - timedelta(days=rules.window_days)
    met = lake.read(INSTANCES, ["object_key"], model.dataset_version, {"cohort": model.cohort, "outcome": "stored"})
    known = set(met["object_key"].to_pylist())
    return [row for row in newer(rows, moment, older).to_pylist() if row["object_key"] not in known]


def baseline_rows(lake: Lake, model: OpenModel) -> list[Row]:
    """Return the instances that the model's cohort held when it was trained and that it did not learn from.

    Of any label: a stream in which some scans are abnormal has changed when their share has.
    """
    columns = list(dict.fromkeys([*_KEYS, *WORDS, *NUMBERS]))
    where = {"cohort": model.cohort, "outcome": "stored", "split": _HELD_OUT}
    return lake.instances_with_labels(columns, model.dataset_version, where).to_pylist()


def one_each(rows: Sequence[Row]) -> list[Row]:
    """Return one instance of each patient, that of the first keyed UID, in the order of these."""
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["sop_instance_uid"]):
        first.setdefault(row["patient_key"] or row["sop_instance_uid"], row)
    return list(first.values())


def drawn(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """Return at most so many rows, in order, drawn by the seed."""
    if len(rows) <= most:
        return list(rows)
    index = np.random.default_rng(seed).choice(len(rows), most, replace=False)
    return [rows[place] for place in sorted(index)]
