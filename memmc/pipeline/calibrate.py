"""Calibrate: fit the score to held-out normals, set the threshold, without touching the weights."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from memmc.config import Config
from memmc.errors import GateRefused
from memmc.lake.schemas import CALIBRATIONS, SCHEMAS
from memmc.lake.stream import stream
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import gate
from memmc.pipeline.results import CalibrationResult
from memmc.pipeline.select import normals, one_preparation
from memmc.scoring.actor import ScoringJob, model_files
from memmc.scoring.bulk import Keys, features_of, join_features, score_columns
from memmc.scoring.calibration import smallest_rate, threshold_at
from memmc.scoring.strata import Judge, Stratum, fit_strata
from memmc.scoring.studies import normal_study_minima

# The fits that judge hold-out scores lack 1/20 of the normals, so they are hardly stricter than the final one.
_FOLDS = 20


@recorded(
    "calibrate",
    lambda done: {
        "cohort": done.cohort,
        "model": done.model,
        "calibration_id": done.calibration_id,
        "threshold": done.threshold,
        "normals": done.num_normals,
    },
)
def calibrate(
    config: Config, cohort: str | None = None, model: str | None = None, *, progress: Progress | None = None
) -> CalibrationResult:
    """Calibrate a model on the normals of a cohort's calibration share.

    Args:
        cohort: the model's own when absent.
        model: the champion when absent.

    Raises:
        GateRefused: fewer held-out normals than `calibrate.min_normals`, or than the rate needs.
        DataError: no held-out normals.
    """
    progress = progress or Silent()
    home = home_directory()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home, model)
    gate(config, cohort or opened.cohort, progress=progress)
    with ray_cluster(config, home, training=False) as ray:
        return calibrate_model(config, ray, lake, opened, cohort or opened.cohort, progress)


def calibrate_model(
    config: Config, ray: Any, lake: Lake, model: OpenModel, cohort: str, progress: Progress
) -> CalibrationResult:
    """Calibrate an opened model on a connected cluster; see `calibrate`."""
    from memmc.scoring.scorer import fit_and_calibrate, make_scorer

    version = model.dataset_version if cohort == model.cohort else lake.version("instances")
    rows = normals(lake, cohort, "calibrate", version)
    model.require({str(one_preparation(rows)["preprocess_id"])})
    if len(rows) < config.calibrate.min_normals:
        raise GateRefused(
            f"{len(rows)} held-out normal images, at least {config.calibrate.min_normals} are needed "
            "(calibrate.min_normals); ingest more normals or raise split.calibrate"
        )
    progress.stage("calibrate", len(rows))
    features, keys = _features(config, ray, lake, model, cohort, version, rows, progress)
    fitted = fit_and_calibrate(make_scorer(config.score), features, keys.patients, folds=_FOLDS, seed=config.train.seed)
    settings = config.calibrate
    strata = fit_strata(
        fitted.normal_scores_N,
        keys.strata,
        keys.patients,
        settings.rates,
        settings.false_positive_rate,
        settings.min_stratum_normals,
    )
    identifier = uuid.uuid4().hex[:16]
    row = {
        "calibration_id": identifier,
        "model": model.ref,
        "model_digest": model.digest,
        "cohort": cohort,
        "dataset_version": version,
        "preprocess_id": model.preprocess_id,
        "scorer": config.score.scorer,
        "false_positive_rate": settings.false_positive_rate,
        "threshold": threshold_at(fitted.normal_scores_N, settings.false_positive_rate),
        "num_normals": len(rows),
        "normal_scores": list(strata[0].normal_scores),
        "map_scale": fitted.map_scale,
        "map_level": threshold_at(fitted.normal_peaks_N, max(settings.region_rate, smallest_rate(len(rows)))),
        "normal_peaks": sorted(fitted.normal_peaks_N.tolist()),
        "scorer_state": fitted.scorer.state_to_bytes(),
        "created_at": datetime.now(UTC),
        "passes": config.score.passes,
        "strata_columns": list(settings.strata),
        "strata": [stratum.as_row() for stratum in strata],
        "study_p_values": normal_study_minima(
            Judge.of(settings.false_positive_rate, settings.strata, strata),
            fitted.normal_scores_N,
            keys.strata,
            keys.studies,
        ).tolist(),
    }
    lake.append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]), f"calibrate-{identifier}")
    return as_result(row, len(set(keys.patients)))


def as_result(row: dict[str, Any], num_patients: int) -> CalibrationResult:
    """Return what `memmc calibrate` says of a row of `calibrations`."""
    pooled, *own = [Stratum.from_row(item) for item in row["strata"]]
    return CalibrationResult(
        calibration_id=row["calibration_id"],
        model=row["model"],
        cohort=row["cohort"],
        scorer=row["scorer"],
        false_positive_rate=row["false_positive_rate"],
        threshold=float(row["threshold"]),
        num_normals=row["num_normals"],
        num_patients=num_patients,
        thresholds=[asdict(item) for item in pooled.thresholds],
        strata=[_summary(item) for item in own],
    )


def _summary(stratum: Stratum) -> dict[str, Any]:
    """Return a stratum without its scores."""
    return {name: value for name, value in stratum.as_row().items() if name != "normal_scores"}


def _features(
    config: Config,
    ray: Any,
    lake: Lake,
    model: OpenModel,
    cohort: str,
    version: int,
    rows: list[dict[str, Any]],
    progress: Progress,
) -> tuple[Any, Keys]:
    """Return the features of held-out normals and whose they are."""
    files = lake.files("instances", version, {"outcome": "stored", "split": "calibrate", "cohort": cohort})
    strata = config.calibrate.strata
    keys = [row["object_key"] for row in rows]
    dataset = stream(lake.storage, files, score_columns(strata), parallelism=len(files), keys=keys)
    job = ScoringJob(model_files(model.folder), config.score, use_gpu=has_gpu(ray, config), strata=strata)
    tables: list[pa.Table] = []
    for table in features_of(ray, dataset, job):
        if table.num_rows:
            tables.append(table)
            progress.advance(sum(part.num_rows for part in tables))
    return join_features(tables)


def has_gpu(ray: Any, config: Config) -> bool:
    """Return whether every scoring actor can have a GPU of its own."""
    return ray.cluster_resources().get("GPU", 0) >= config.score.num_actors
