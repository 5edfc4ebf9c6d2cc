"""Calibrate: fit the score to held-out normals, set the threshold, without touching the weights."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from memmc.config import Config
from memmc.errors import GateRefused
from memmc.lake.schemas import CALIBRATIONS, SCHEMAS
from memmc.lake.stream import stream
from memmc.lake.tables import Lake
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import CalibrationResult
from memmc.pipeline.select import normals, one_preparation
from memmc.scoring.bulk import SCORE_COLUMNS, ScoringJob, features_of, join_features, model_files

# The fits that judge hold-out scores lack 1/20 of the normals, so they are hardly stricter than the final one.
_FOLDS = 20


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
    with ray_cluster(config, home, training=False) as ray:
        return calibrate_model(config, ray, lake, opened, cohort or opened.cohort, progress)


def calibrate_model(
    config: Config, ray: Any, lake: Lake, model: OpenModel, cohort: str, progress: Progress
) -> CalibrationResult:
    """Calibrate an opened model on a connected cluster; see `calibrate`."""
    import pyarrow as pa

    from memmc.scoring.calibration import threshold_at
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
    files = lake.files("instances", version, {"outcome": "stored", "split": "calibrate", "cohort": cohort})
    dataset = stream(
        lake.storage, files, SCORE_COLUMNS, parallelism=len(files), keys=[row["object_key"] for row in rows]
    )
    job = ScoringJob(model_files=model_files(model.folder), score=config.score, use_gpu=has_gpu(ray, config))
    tables: list[Any] = []
    for table in features_of(ray, dataset, job):
        tables.append(table)
        progress.advance(sum(part.num_rows for part in tables))
    features, patients = join_features(tables)
    fitted = fit_and_calibrate(make_scorer(config.score), features, patients, folds=_FOLDS, seed=config.train.seed)
    threshold = threshold_at(fitted.normal_scores_N, config.calibrate.false_positive_rate)
    identifier = uuid.uuid4().hex[:16]
    lake.append(
        CALIBRATIONS,
        pa.Table.from_pylist(
            [
                {
                    "calibration_id": identifier,
                    "model": model.ref,
                    "model_digest": model.digest,
                    "cohort": cohort,
                    "dataset_version": version,
                    "preprocess_id": model.preprocess_id,
                    "scorer": config.score.scorer,
                    "false_positive_rate": config.calibrate.false_positive_rate,
                    "threshold": threshold,
                    "num_normals": len(rows),
                    "normal_scores": sorted(float(value) for value in fitted.normal_scores_N),
                    "map_scale": fitted.map_scale,
                    "scorer_state": fitted.scorer.state_to_bytes(),
                    "created_at": datetime.now(UTC),
                }
            ],
            schema=SCHEMAS[CALIBRATIONS],
        ),
        run_id=f"calibrate-{identifier}",
    )
    return CalibrationResult(
        calibration_id=identifier,
        model=model.ref,
        cohort=cohort,
        scorer=config.score.scorer,
        false_positive_rate=config.calibrate.false_positive_rate,
        threshold=float(threshold),
        num_normals=len(rows),
        num_patients=len(set(patients)),
    )


def has_gpu(ray: Any, config: Config) -> bool:
    """Return whether every scoring actor can have a GPU of its own."""
    return ray.cluster_resources().get("GPU", 0) >= config.score.num_actors
