"""Train: the normals of one pinned version, Ray Train, a registered and calibrated model."""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.errors import ConfigError
from memmc.lake.stream import PIXEL_COLUMNS, stream
from memmc.lake.tables import Lake
from memmc.pipeline.calibrate import calibrate_model
from memmc.pipeline.cluster import ray_cluster, require_cpus
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import PlanResult, TrainResult
from memmc.pipeline.select import normals, one_preparation
from memmc.registry.models import register
from memmc.training.distributed import TrainingJob, fit


def preview(config: Config, cohort: str) -> PlanResult:
    """Say what `train` would train and calibrate on."""
    check_cohort(cohort)
    lake = Lake(config.lake.uri)
    version = lake.version("instances")
    return PlanResult(
        {
            "normal images to train on": len(normals(lake, cohort, "train", version)),
            "normal images to calibrate on": len(normals(lake, cohort, "calibrate", version)),
            "table version": version,
        }
    )


def train(config: Config, cohort: str, *, progress: Progress | None = None) -> TrainResult:
    """Train on a cohort's normal images, register the model, calibrate it on held-out normals.

    Worker failures restart the run from its last checkpoint (`train.max_failures`).

    Raises:
        DataError: no normal images, or images prepared in different ways.
        TrainingError: the run failed for good.
        GateRefused: too few held-out normals to calibrate.
    """
    began = time.monotonic()
    progress = progress or Silent()
    check_cohort(cohort)
    home = home_directory()
    lake = Lake(config.lake.uri)
    version = lake.version("instances")
    rows = normals(lake, cohort, "train", version)
    run = f"train-{cohort}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    job = training_job(config, cohort, version, rows)
    tracking = tracking_of(config, home)
    tracked = tracking.start_run(
        f"memmc/{cohort}",
        run,
        tags={
            "run": run,
            "cohort": cohort,
            "dataset_version": str(version),
            "preprocess_id": str(job.description["preprocess_id"]),
        },
        params=_params(config),
    )
    progress.message(f"{len(rows)} normal images, table version {version}, {config.train.num_workers} workers")
    progress.stage("start workers")
    status = "FAILED"
    try:
        with ray_cluster(config, home) as ray, tempfile.TemporaryDirectory() as folder:
            use_gpu = _use_gpu(config, ray)
            require_cpus(ray, config.train.num_workers, use_gpu)
            watcher = _Watcher(progress, tracking, tracked, config)
            filesystem, root = lake.storage.arrow_filesystem()
            fitted = fit(
                ray,
                _images(lake, version, cohort, rows),
                job,
                name=run,
                storage=(filesystem, f"{root}/training"),
                out=Path(folder),
                use_gpu=use_gpu,
                on_metrics=watcher,
            )
            watcher.flush()
            registered = register(
                tracking,
                tracked,
                Path(folder),
                f"memmc-{cohort}",
                tags={"cohort": cohort, "dataset_version": str(version)},
            )
            model = open_model(config, home, registered.ref)
            calibration = calibrate_model(config, ray, lake, model, cohort, progress)
        status = "FINISHED"
    finally:
        tracking.end_run(tracked, status)
    return TrainResult(
        model=model.ref,
        model_digest=model.digest,
        run=run,
        cohort=cohort,
        steps=int(fitted.metrics["steps"]),
        loss=float(fitted.metrics["loss"]),
        num_images=len(rows),
        dataset_version=version,
        preprocess_id=model.preprocess_id,
        train_seconds=round(float(fitted.metrics["train_seconds"]), 1),
        seconds=round(time.monotonic() - began, 1),
        calibration=calibration.as_dict(),
    )


def training_job(config: Config, cohort: str, version: int, rows: list[dict[str, Any]]) -> TrainingJob:
    """Describe a run from the metadata of its images.

    Raises:
        ConfigError: an image size the patches do not divide.
        DataError: images prepared in different ways.
    """
    kind = one_preparation(rows)
    if kind["height"] != kind["width"] or kind["height"] % config.model.patch_size:
        raise ConfigError(
            f"images of {kind['height']} x {kind['width']} px do not divide into patches of {config.model.patch_size}; "
            "choose data.image_size as a multiple of model.patch_size"
        )
    mean, std = pooled_statistics(rows)
    num_bytes = len(rows) * kind["height"] * kind["width"] * kind["channels"] * kind["bits"] // 8
    return TrainingJob(
        model=config.model,
        train=config.train,
        image_size=kind["height"],
        channels=kind["channels"],
        bits=kind["bits"],
        pixel_mean=mean,
        pixel_std=std,
        num_images=len(rows),
        cached=num_bytes <= config.train.cache_bytes,
        description={
            "preprocess_id": kind["preprocess_id"],
            "cohort": cohort,
            "dataset_version": version,
            "config_id": config.config_id,
        },
    )


def pooled_statistics(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return mean and standard deviation over all pixels, from those of each image (law of total variance)."""
    mean = math.fsum(row["pixel_mean"] for row in rows) / len(rows)
    square = math.fsum(row["pixel_std"] ** 2 + row["pixel_mean"] ** 2 for row in rows) / len(rows)
    return mean, math.sqrt(max(square - mean**2, 1e-8))


def _images(lake: Lake, version: int, cohort: str, rows: list[dict[str, Any]]) -> Any:
    files = lake.files("instances", version, {"outcome": "stored", "split": "train", "cohort": cohort})
    keys = [row["object_key"] for row in rows]
    return stream(lake.storage, files, ("sop_instance_uid", *PIXEL_COLUMNS), parallelism=len(files), keys=keys)


def _use_gpu(config: Config, ray: Any) -> bool:
    if config.train.use_gpu is not None:
        return config.train.use_gpu
    return ray.cluster_resources().get("GPU", 0) >= config.train.num_workers


def _params(config: Config) -> dict[str, str]:
    tree = config.model_dump(mode="json", include={"data", "model", "train"})
    params = {f"{section}.{key}": str(value) for section, fields in tree.items() for key, value in fields.items()}
    return {**params, "config_id": config.config_id, "preprocess_id": config.preprocess_id}


class _Watcher:
    """Passes what rank 0 logs to the terminal and the tracking store."""

    def __init__(self, progress: Progress, tracking: Any, run: str, config: Config) -> None:
        self._progress, self._tracking, self._run = progress, tracking, run
        self._config = config
        self._started = False
        self._waiting: list[tuple[int, dict[str, float]]] = []

    def __call__(self, metrics: dict[str, Any]) -> None:
        if not self._started:
            self._started = True
            self._progress.stage("train", 1.0)
        note = f"step {metrics['step']}  loss {metrics['loss']:.4f}  {metrics['images_per_s']:.0f} images/s"
        self._progress.advance(float(metrics["progress"]), note)
        self._waiting.append((int(metrics["step"]), {k: float(v) for k, v in metrics.items() if k != "step"}))
        if len(self._waiting) >= 20:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        if self._waiting:
            self._tracking.log_metrics(self._run, self._waiting)
            self._waiting = []
