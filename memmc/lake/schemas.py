"""The Arrow schemas of the tables, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pyarrow as pa

from memmc.errors import DataError

INSTANCES: Final = "instances"
SCORES: Final = "scores"
CALIBRATIONS: Final = "calibrations"
LABELS: Final = "labels"
QUALITY: Final = "quality"
COHORTS: Final = "cohorts"
PATCHES: Final = "patches"
MONITORING: Final = "monitoring"
DECISIONS: Final = "decisions"
REVIEWS: Final = "reviews"


_TYPES: Final = {
    "str": pa.string(),
    "i32": pa.int32(),
    "i64": pa.int64(),
    "f64": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "f64s": pa.list_(pa.float64()),
    "strs": pa.list_(pa.string()),
    "strata": pa.list_(
        pa.struct(
            {
                "stratum": pa.string(),
                "num_normals": pa.int64(),
                "num_patients": pa.int64(),
                "normal_scores": pa.list_(pa.float64()),
                "refused": pa.string(),
                "thresholds": pa.list_(
                    pa.struct(
                        {
                            "rate": pa.float64(),
                            "threshold": pa.float64(),
                            "low": pa.float64(),
                            "high": pa.float64(),
                            "refused": pa.string(),
                        }
                    )
                ),
            }
        )
    ),
    "regions": pa.list_(
        pa.struct(
            {
                "x_px": pa.int32(),  # left, top and size of the box in the map, which has the stored pixels' geometry
                "y_px": pa.int32(),
                "width_px": pa.int32(),
                "height_px": pa.int32(),
                "area_px": pa.int32(),
                "peak": pa.float64(),
                "p_value": pa.float64(),  # against the highest map value of held-out normals
                "image_x_px": pa.float64(),  # the box in the original image; null where its geometry is not known
                "image_y_px": pa.float64(),
                "image_width_px": pa.float64(),
                "image_height_px": pa.float64(),
            }
        )
    ),
    "stop_rule": pa.struct(
        {
            "bound": pa.float64(),
            "thresholds": pa.list_(pa.struct({"stratum": pa.string(), "threshold": pa.float64()})),
            "stages": pa.list_(
                pa.struct(
                    {
                        "passes": pa.int32(),
                        "low": pa.float64(),
                        "high": pa.float64(),
                        "scorer_state": pa.binary(),  # safetensors
                    }
                )
            ),
        }
    ),
    "time": pa.timestamp("us", tz="UTC"),
}


def _schema(*columns: str) -> pa.Schema:
    """Build a schema from ``"name type"``; a type ending in ``?`` is optional, every other must hold a value."""
    pairs = [column.split() for column in columns]
    return pa.schema([pa.field(name, _TYPES[kind.rstrip("?")], nullable=kind.endswith("?")) for name, kind in pairs])


SCHEMAS: Final[Mapping[str, pa.Schema]] = {
    INSTANCES: _schema(
        "cohort str",
        "object_key str",  # HMAC of source, path, size and modification time
        "source_ref str",  # the path, encrypted under the identity key
        "outcome str",
        "split str",
        "reason str?",
        "content_key str",  # HMAC of the object's bytes
        "size_bytes i64",
        "patient_key str?",
        "study_uid str?",
        "series_uid str?",
        "sop_instance_uid str?",
        "label str",
        "preprocess_id str?",
        "pixels bytes?",  # unsigned little-endian, height x width x channels, C order
        "height i32?",
        "width i32?",
        "channels i32?",
        "bits i32?",
        "modality str?",
        "sop_class_uid str?",
        "transfer_syntax_uid str?",
        "photometric_interpretation str?",
        "manufacturer str?",
        "manufacturer_model str?",
        "view_position str?",
        "body_part str?",
        "laterality str?",
        "patient_sex str?",
        "patient_age_years i32?",  # 90 means 90 and over
        "acquisition_date str?",  # YYYYMMDD, shifted per patient
        "rows i32?",
        "columns i32?",
        "bits_stored i32?",
        "frame_number i32?",  # 1-based, of a multi-frame object
        "pixel_spacing_mm f64?",
        "lossy bool?",
        "pixel_mean f64?",
        "pixel_std f64?",
        "ingest_run str",
        "ingested_at time",
    ),
    SCORES: _schema(
        "cohort str",
        "sop_instance_uid str",
        "patient_key str?",
        "study_uid str?",
        "model str",  # name/version
        "model_digest str",
        "calibration_id str?",
        "dataset_version i64",
        "preprocess_id str",
        "scorer str",
        "anomaly_score f64?",  # higher is more abnormal; null where not_scored says why
        "p_value f64?",
        "is_abnormal bool?",
        "score_spread f64?",  # standard deviation over passes
        "anomaly_map bytes?",  # float16 little-endian, map_height x map_width
        "map_height i32?",
        "map_width i32?",
        "scored_at time",
        "run str",
        "stratum str?",  # of the calibration, by which p_value and is_abnormal were judged
        "not_scored str?",  # reason code of an instance that has no score
        "uncertainty_map bytes?",  # float16 like anomaly_map: standard deviation over passes, grey values in [0, 1]
        "regions regions?",  # connected parts of the map above the calibration's map_level, highest peak first
        "passes_used i32?",  # forward passes behind the score
    ),
    CALIBRATIONS: _schema(
        "calibration_id str",
        "model str",
        "model_digest str",
        "cohort str",
        "dataset_version i64",
        "preprocess_id str",
        "scorer str",
        "false_positive_rate f64",
        "threshold f64",
        "num_normals i64",
        "normal_scores f64s?",  # sorted
        "map_scale f64?",  # map value at the top of the colour scale
        "scorer_state bytes?",  # safetensors
        "created_at time",
        "passes i32?",  # per image
        "strata_columns strs?",  # columns of `instances` whose values make a stratum
        "strata strata?",  # thresholds with intervals, the pooled ones first
        "study_p_values f64s?",  # smallest p-value of each held-out normal study, sorted
        "map_level f64?",  # map value above which a region stands out
        "normal_peaks f64s?",  # highest map value of each held-out normal, sorted
        "early_stop stop_rule?",  # when an image needs no further pass; null where all get all
    ),
    LABELS: _schema("cohort str", "sop_instance_uid str", "label str", "source str", "labelled_at time"),
    COHORTS: _schema("name str", "bases strs", "rule str", "created_at time"),  # rule: JSON, column -> allowed values
    QUALITY: _schema(
        "cohort str",
        "sop_instance_uid str",
        "patient_key str",
        "flags strs",  # QC_* codes of `memmc.quality`; an empty list passes
        "perceptual_hash str",  # 64 bits as 16 hex digits
        "thumbnail bytes",  # uint8, square, C order
        "gate_id str",  # names the rules, and the reference cohort if it is another
        "run str",
        "gated_at time",
    ),
    DECISIONS: _schema(
        "decision_id str",
        "cohort str",
        "action str",  # promote, rollback, retrain
        "verdict str",
        "reason str",
        "name str",  # registered model
        "model str?",  # name/version the decision is about
        "champion str?",  # the champion when it was taken
        "dataset_version i64?",
        "facts str",  # JSON: what was looked at, gates included
        "rules str",  # JSON: the settings it was held against
        "author str?",  # began the training run
        "approver str?",
        "decided_at time",
    ),
    REVIEWS: _schema(
        "cohort str",
        "sop_instance_uid str",
        "patient_key str",
        "state str",  # of several rows of one instance the newest holds
        "p_value f64?",  # by which a model suspected it
        "model str?",
        "model_digest str?",
        "calibration_id str?",
        "reviewer str?",
        "reviewed_at time",
    ),
    MONITORING: _schema(
        "cohort str",
        "run str",  # one look at a cohort
        "checked_at time",
        "kind str",  # drift, canary, golden, watch
        "name str",
        "stratum str?",
        "model str?",
        "model_digest str?",
        "calibration_id str?",
        "baseline_version i64?",  # of `instances`
        "version i64?",
        "num_baseline i64?",
        "num_window i64?",
        "value f64?",  # drift: effect; canary: sensitivity; golden: largest difference
        "low f64?",
        "high f64?",
        "p_value f64?",
        "adjusted f64?",  # p_value after correction for all tests of the run
        "values f64s?",  # canary: sensitivity per scan
        "alarm str?",  # null where calm
        "found str?",  # in words, without patient data
    ),
    PATCHES: _schema(
        "cohort str",
        "sop_instance_uid str",
        "patient_key str",
        "model_digest str",
        "features bytes",  # float16 little-endian, num_patches x width, each patch of unit length
        "num_patches i32",
        "width i32",
        "made_at time",
    ),
}
"""Arrow schema of each table."""

PARTITION_BY: Final[Mapping[str, tuple[str, ...]]] = {INSTANCES: ("outcome", "split")}
"""Columns that stand in the path of a shard and not in its file."""

ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "outcome": ("stored", "duplicate", "excluded", "quarantined"),
    "split": ("train", "calibrate", "test", "none"),
    "label": ("normal", "abnormal", "unknown"),
    "state": ("suspect", "accepted", "rejected"),
}
"""Values of the columns that have a closed set of them."""


def schema_of(table: str) -> pa.Schema:
    """Return a table's Arrow schema.

    Raises:
        DataError: no table of this name.
    """
    if table not in SCHEMAS:
        raise DataError(f"no table '{table}'; tables are {', '.join(SCHEMAS)}")
    return SCHEMAS[table]


def conform(table: str, rows: pa.Table) -> pa.Table:
    """Return rows with exactly the table's columns, order and types; absent optional columns become null.

    Raises:
        DataError: an unknown column, a missing or null required value, or a value of another type.
    """
    schema = schema_of(table)
    unknown = sorted(set(rows.column_names) - set(schema.names))
    if unknown:
        raise DataError(f"table '{table}' has no columns {unknown}; its columns are {schema.names}")
    columns: list[pa.ChunkedArray] = []
    for field in schema:
        if field.name in rows.column_names:
            try:
                column = rows[field.name].cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                found = rows.schema.field(field.name).type
                raise DataError(
                    f"table '{table}', column '{field.name}': expected {field.type}, found {found}"
                ) from None
        else:
            column = pa.chunked_array([pa.nulls(rows.num_rows, field.type)])
        if not field.nullable and column.null_count:
            raise DataError(
                f"table '{table}', column '{field.name}': {column.null_count} rows hold no value; it is required"
            )
        allowed = ALLOWED.get(field.name)
        if allowed and not set(column.unique().to_pylist()) <= {*allowed, None}:
            raise DataError(f"table '{table}', column '{field.name}': a value is none of {', '.join(allowed)}")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)
