"""Score: every stored instance of a cohort, once per model and calibration."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from memmc.config import Config
from memmc.errors import DataError
from memmc.lake.schemas import SCORES
from memmc.lake.shards import ShardFile
from memmc.lake.stream import stream
from memmc.lake.tables import Lake
from memmc.pipeline.calibrate import has_gpu
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import PlanResult, ScoreResult
from memmc.pipeline.select import newest_calibration, one_preparation, score_rows
from memmc.scoring.bulk import SCORE_COLUMNS, ScoringJob, model_files, score_shards

_ROWS_PER_COMMIT = 50_000


def preview(config: Config, cohort: str, model: str | None = None) -> PlanResult:
    """Say what `score` would score."""
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model)
    rows = stored_instances(lake, cohort)
    done = score_rows(lake, cohort, opened, newest_calibration(lake, opened)["calibration_id"])
    return PlanResult({"instances": len(rows), "already scored": len(done), "to score": len(rows) - len(done)})


def score(config: Config, cohort: str, model: str | None = None, *, progress: Progress | None = None) -> ScoreResult:
    """Score the instances of a cohort that the model's newest calibration has not scored yet.

    A killed run leaves whole shards or nothing; the next run scores what is missing.

    Raises:
        DataError: nothing stored in the cohort, or the model is not calibrated.
        PreprocessMismatch: the cohort's pixels were prepared otherwise than the model's.
    """
    began = time.monotonic()
    progress = progress or Silent()
    home = home_directory()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home, model)
    calibration = newest_calibration(lake, opened)
    rows = stored_instances(lake, cohort)
    opened.require({str(one_preparation(rows)["preprocess_id"])})
    done = score_rows(lake, cohort, opened, calibration["calibration_id"])
    missing = [row for row in rows if row["sop_instance_uid"] not in done]
    abnormal = sum(row["is_abnormal"] for row in done.values())
    version = lake.version(SCORES) if lake.exists(SCORES) else -1
    rate = 0.0
    if missing:
        with ray_cluster(config, home, training=False) as ray:
            progress.stage("score", len(missing))
            started = time.monotonic()
            version, flagged = _score(config, ray, lake, opened, calibration, cohort, missing, progress)
            rate = len(missing) / (time.monotonic() - started)
        abnormal += flagged
    return ScoreResult(
        model=opened.ref,
        calibration_id=calibration["calibration_id"],
        cohort=cohort,
        instances=len(rows),
        scored=len(missing),
        already_scored=len(done),
        abnormal=abnormal,
        version=version,
        seconds=round(time.monotonic() - began, 2),
        images_per_second=round(rate, 1),
    )


def stored_instances(lake: Lake, cohort: str) -> list[dict[str, Any]]:
    """Return the stored instances of a cohort, without pixels.

    Raises:
        DataError: there is none.
    """
    columns = ["object_key", "sop_instance_uid", "preprocess_id", "height", "width", "channels", "bits"]
    rows = lake.read("instances", columns, filter={"cohort": cohort, "outcome": "stored"}).to_pylist()
    if not rows:
        raise DataError(f"cohort '{cohort}' has no stored images; run `memmc ingest SOURCE --cohort {cohort}`")
    return rows


def _score(
    config: Config,
    ray: Any,
    lake: Lake,
    model: OpenModel,
    calibration: dict[str, Any],
    cohort: str,
    missing: list[dict[str, Any]],
    progress: Progress,
) -> tuple[int, int]:
    """Score and commit; return the table's version and the number of flagged instances."""
    run = f"score-{cohort}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    version = lake.version("instances")
    files = lake.files("instances", version, {"outcome": "stored", "cohort": cohort})
    keys = [row["object_key"] for row in missing]
    dataset = stream(lake.storage, files, SCORE_COLUMNS, parallelism=len(files), keys=keys)
    job = ScoringJob(
        model_files=model_files(model.folder),
        score=config.score.model_copy(update={"scorer": calibration["scorer"]}),
        use_gpu=has_gpu(ray, config),
        scorer_state=calibration["scorer_state"],
        normal_scores=tuple(calibration["normal_scores"]),
        threshold=calibration["threshold"],
        fixed={
            "cohort": cohort,
            "model": model.ref,
            "model_digest": model.digest,
            "calibration_id": calibration["calibration_id"],
            "dataset_version": version,
            "preprocess_id": model.preprocess_id,
            "scorer": calibration["scorer"],
            "run": run,
            "scored_at": datetime.now(UTC),
        },
    )
    waiting: list[ShardFile] = []
    done = flagged = step = 0
    committed = -1
    for part in score_shards(ray, dataset, job, lake.storage):
        waiting.append(ShardFile(**json.loads(part["shard"])))
        flagged += part["abnormal"]
        done += waiting[-1].num_rows
        progress.advance(done)
        if sum(file.num_rows for file in waiting) >= _ROWS_PER_COMMIT:
            step += 1
            committed = lake.commit(SCORES, waiting, run, step=step)
            waiting = []
    if waiting:
        committed = lake.commit(SCORES, waiting, run, step=step + 1)
    if done != len(missing):
        raise DataError(
            f"{len(missing)} instances were to be scored, {done} were; run `memmc score` again for the rest"
        )
    return committed, flagged
