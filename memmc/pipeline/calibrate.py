"""Calibrate: fit the score to held-out normals, set the threshold, without touching the weights."""

from __future__ import annotations

import math
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import Config
from memmc.errors import GateRefused, StorageError
from memmc.lake.schemas import CALIBRATIONS, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.model_card import set_calibration
from memmc.pipeline.models import OpenModel, open_model, tracking_of
from memmc.pipeline.placement import place_scoring
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import gate
from memmc.pipeline.results import CalibrationResult
from memmc.pipeline.select import normals, one_preparation
from memmc.scoring.actor import ScoringJob, model_files
from memmc.scoring.bulk import Keys, features_of, join_features, score_columns, stream_to_actors
from memmc.scoring.calibration import smallest_rate, threshold_at
from memmc.scoring.early_stop import StopRule, fit_early_stop
from memmc.scoring.strata import Judge, Stratum, fit_strata
from memmc.scoring.studies import normal_study_minima, why_no_verdict

if TYPE_CHECKING:
    from memmc.scoring.cross_fit import CrossFit

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
    """Calibrate a model on the normals of a cohort's calibration share; its card shows the new thresholds.

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
    opened = open_model(config, home, model, cohort)
    gate(config, cohort or opened.cohort, progress=progress)
    with ray_cluster(config, home, training=False) as ray:
        done = calibrate_model(config, ray, lake, opened, cohort or opened.cohort, progress)
    try:
        set_calibration(tracking_of(config, home), opened, done)
    except StorageError as error:  # the calibration holds; its card can wait
        progress.message(str(error))
    return done


def calibrate_model(
    config: Config, ray: Any, lake: Lake, model: OpenModel, cohort: str, progress: Progress
) -> CalibrationResult:
    """Calibrate an opened model on a connected cluster; see `calibrate`."""
    version = model.dataset_version if cohort == model.cohort else lake.version("instances")
    rows = normals(lake, cohort, "calibrate", version)
    model.require({str(one_preparation(rows)["preprocess_id"])})
    remedy = f"ingest more normals into cohort '{cohort}'"
    if cohort == model.cohort:
        remedy = f"train again when there are more (--resume new: {model.ref} keeps to table version {version})"
    require_normals(config, len(rows), remedy)
    progress.stage("calibrate", len(rows))
    fitted, keys, stop = _fit(config, _features(config, ray, lake, model, cohort, version, rows, progress))
    settings = config.calibrate
    strata = _strata(config, fitted.normal_scores_N, keys)
    identifier = uuid.uuid4().hex[:16]
    judge = Judge.of(settings.false_positive_rate, settings.strata, strata)
    study_minima = normal_study_minima(judge, fitted.normal_scores_N, keys.strata, keys.studies).tolist()
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
        "study_p_values": study_minima,
        "early_stop": stop.as_row() if stop else None,
    }
    unjudged = why_no_verdict(study_minima, settings.false_positive_rate)
    if unjudged:
        progress.message(f"images are judged, studies are not: {unjudged}")
    lake.append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]), f"calibrate-{identifier}")
    return as_result(row, len(set(keys.patients)))


def require_normals(config: Config, count: int, remedy: str, *, early_stages: int = 0) -> None:
    """Refuse a calibration on too few held-out normals.

    Args:
        count: held-out normals there are.
        remedy: how there come to be more.
        early_stages: numbers of passes after which images may stop early (`score.early_stop`), all passes not counted.

    Raises:
        GateRefused: fewer than `calibrate.min_normals`, or than the rates ask for.
    """
    needed = {
        "lower calibrate.min_normals": config.calibrate.min_normals,
        "raise calibrate.false_positive_rate": math.ceil(1.0 / config.calibrate.false_positive_rate - 1.0 - 1e-9),
    }
    if config.score.early_stop and early_stages:
        needed["set score.early_stop=0"] = math.ceil(2.0 * early_stages / config.score.early_stop - 1.0 - 1e-9)
    missing = {way: least for way, least in needed.items() if count < least}
    if missing:
        raise GateRefused(
            f"{count} held-out normal images, at least {max(missing.values())} are needed; {remedy}, "
            f"or {' and '.join(missing)}"
        )


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
        unjudged=why_no_verdict(row["study_p_values"], row["false_positive_rate"]),
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
) -> list[pa.Table]:
    """Return the features of held-out normals, after each number of passes at which an image may stop."""
    files = lake.files("instances", version, {"outcome": "stored", "split": "calibrate", "cohort": cohort})
    strata = config.calibrate.strata
    keys = [row["object_key"] for row in rows]
    score, use_gpu = place_scoring(ray, config.score)
    job = ScoringJob(
        model_files(model.folder),
        score,
        use_gpu=use_gpu,
        strata=strata,
        each_stage=config.score.early_stop > 0,
    )
    dataset = stream_to_actors(lake.storage, files, score_columns(strata), keys, job)
    tables: list[pa.Table] = []
    for table in features_of(ray, dataset, job):
        if table.num_rows:
            tables.append(table)
            progress.advance(len({uid for part in tables for uid in part["sop_instance_uid"].to_pylist()}))
    return tables


def _fit(config: Config, tables: list[pa.Table]) -> tuple[CrossFit, Keys, StopRule | None]:
    """Fit the scorer, and the rule that ends passes early where it is wanted; the normals are scored by that rule."""
    from memmc.scoring.cross_fit import CrossFit, fit_and_calibrate
    from memmc.scoring.scorer import make_scorer

    scorer, fits, keys = make_scorer(config.score), dict[int, CrossFit](), None
    for passes in sorted({number for table in tables for number in table["passes"].unique().to_pylist()}):
        part = [
            table.filter(pc.call_function("equal", [table["passes"], pa.scalar(passes, pa.int32())]))
            for table in tables
        ]
        features, keys = join_features(part)
        fits[passes] = fit_and_calibrate(scorer, features, keys.patients, folds=_FOLDS, seed=config.train.seed)
    assert keys is not None
    final = fits.pop(max(fits))
    if not fits:
        return final, keys, None
    thresholds = {
        item.stratum: threshold_at(item.normal_scores, config.calibrate.false_positive_rate)
        for item in _strata(config, final.normal_scores_N, keys)
        if item.refused is None
    }
    rule, fitted = fit_early_stop(fits, final, keys.strata, thresholds, config.score.early_stop)
    return fitted, keys, rule


def _strata(config: Config, scores_N: Any, keys: Keys) -> list[Stratum]:
    settings = config.calibrate
    rates = (settings.rates, settings.false_positive_rate, settings.min_stratum_normals)
    return fit_strata(scores_N, keys.strata, keys.patients, *rates)
