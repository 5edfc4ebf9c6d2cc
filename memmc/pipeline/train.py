"""Train: the normals of one pinned version, Ray Train, a registered and calibrated model."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from memmc.config import PRESET_SIDES, Config
from memmc.lake.tables import Lake
from memmc.model.digest import WEIGHTS_FILE
from memmc.model.masking import num_kept
from memmc.pipeline.audit import actor, head_of, recorded
from memmc.pipeline.calibrate import calibrate_model, require_normals
from memmc.pipeline.cluster import ray_cluster, require_cpus
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.model_card import build_card, publish_card
from memmc.pipeline.models import ANCESTORS_TAG, OpenModel, open_model, tracking_of
from memmc.pipeline.pins import Pins
from memmc.pipeline.placement import place_training
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import gate
from memmc.pipeline.results import PlanResult, TrainResult
from memmc.pipeline.runs import RunRecord, driving, task_of, to_resume, unfinished
from memmc.pipeline.select import normal_table
from memmc.pipeline.training_job import LOOK_IMAGES, hash_of, keep_back, training_job
from memmc.registry.lineage import TrainingInput, images_digest, log_input
from memmc.registry.models import ModelVersion, register, registered_before
from memmc.registry.promotion import AUTHOR_TAG
from memmc.registry.tracking import Tracking
from memmc.scoring.early_stop import stage_passes
from memmc.training.distributed import Fitted, TrainingJob, fit
from memmc.training.feed import CachedFeed
from memmc.training.source import ShardSource

_SETTINGS = {"data", "select", "split", "quality", "model", "train", "score", "calibrate", "evaluate"}  # not places


def preview(config: Config, cohort: str) -> PlanResult:
    """Say what `train` would train and calibrate on."""
    check_cohort(cohort)
    lake = Lake(config.lake.uri)
    version = lake.version("instances")
    return PlanResult(
        {
            "normal images to train on": normal_table(lake, cohort, "train", version).num_rows,
            "normal images to calibrate on": normal_table(lake, cohort, "calibrate", version).num_rows,
            "table version": version,
        }
    )


@recorded(
    "train",
    lambda done: {
        "run": done.run,
        "model": done.model,
        "model_digest": done.model_digest,
        "images": done.num_images,
        "dataset_version": done.dataset_version,
        "calibration_id": done.calibration.get("calibration_id"),
    },
)
def train(config: Config, cohort: str, *, progress: Progress | None = None) -> TrainResult:
    """Train on a cohort's normal images, register the model, calibrate it on held-out normals.

    Worker failures restart the run from its last checkpoint (`train.max_failures`); a run whose driver was killed is
    gone on with by the next call with the same images and settings (`train.resume`).

    Raises:
        UsageError: the cluster has fewer GPUs than `train.min_workers`.
        DataError: no normal images, or images prepared in different ways.
        ModelError: the model to start from is missing, or of another shape.
        TrainingError: the run failed for good.
        GateRefused: too few held-out normals to calibrate on, or the run to resume is in progress.
        StorageError: the tracking store does not answer at the start, or, after `tracking.wait_minutes`, at the end;
            then the next call goes on from the last checkpoint, which is the end.
    """
    began = time.monotonic()
    progress = progress or Silent()
    check_cohort(cohort)
    home = home_directory()
    lake = Lake(config.lake.uri)
    tracking = tracking_of(config, home)
    if replayed := tracking.replay():
        progress.message(f"{replayed} values of earlier runs were sent to the tracking store")
    gated = gate(config, cohort, progress=progress)
    plan, taking_over = _plan(config, home, lake, cohort)
    with driving(lake.storage, plan.record(tracking, config), taking_over=taking_over) as record:
        if taking_over:
            tracking.resume_run(record.tracked)
            progress.message(f"going on with run {record.run}; train.resume=new begins another")
        num_images, version = plan.rows.num_rows, record.dataset_version
        progress.stage("start workers")
        status = "FAILED"
        try:
            with ray_cluster(config, home) as ray, tempfile.TemporaryDirectory(prefix="memmc-") as folder:
                settings, use_gpu, workers = place_training(ray, config.train)
                progress.message(f"{num_images} normal images, table version {version}; {workers}")
                if plan.job.image_size < (meant := PRESET_SIDES[config.train.preset]):
                    small = f"{plan.job.image_size} px, preset {config.train.preset} is meant for {meant} px and more"
                    progress.message(f"images of {small}; data.image_size of the ingest decides")
                watcher = _Watcher(progress, tracking, record.tracked)
                job = replace(plan.job, train=settings)
                fitted = _fit(ray, lake, plan, job, record, watcher, folder, use_gpu=use_gpu)
                if (Path(folder) / "last").is_dir():
                    tracking.log_artifacts(record.tracked, Path(folder) / "last", "last")
                tracking.wait_for_store(config.tracking.wait_minutes, progress.message)
                registered = _registered(tracking, plan, record, Path(folder) / "model")
                model = open_model(config, home, registered.ref)
                calibration = calibrate_model(config, ray, lake, model, cohort, progress)
                card = build_card(config, model, _learned(plan, gated.flags), fitted.metrics, calibration)
                publish_card(tracking, model, card)
            status = "FINISHED"
        finally:
            tracking.end_run(record.tracked, status)
    return TrainResult(
        model=model.ref,
        model_digest=model.digest,
        run=record.run,
        cohort=cohort,
        steps=int(fitted.metrics["steps"]),
        loss=float(fitted.metrics["loss"]),
        num_images=num_images,
        dataset_version=version,
        preprocess_id=model.preprocess_id,
        train_seconds=round(float(fitted.metrics["train_seconds"]), 1),
        seconds=round(time.monotonic() - began, 1),
        calibration=calibration.as_dict(),
        flags=gated.flags,
    )


@dataclass(frozen=True)
class _Plan:
    """What a run learns, and the record of the run that is gone on with, if there is one.

    Attributes:
        held_out: rows that it is looked at with, of the `kept_back` ones.
    """

    cohort: str
    version: int
    pins: Pins
    rows: pa.Table
    held_out: pa.Table
    kept_back: int
    job: TrainingJob
    task: str
    start: OpenModel | None
    found: RunRecord | None

    def record(self, tracking: Tracking, config: Config) -> RunRecord:
        """Return the record to drive under; begins a tracked run for a new one."""
        if self.found is not None:
            return self.found
        run = f"train-{self.cohort}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        tags = {"run": run, "cohort": self.cohort, "dataset_version": str(self.version), **self.pins.as_tags()}
        tags["audit_head"] = head_of(config)  # in another system than the trail's own, as a witness
        tags["preprocess_id"] = str(self.job.description["preprocess_id"])
        tags[AUTHOR_TAG] = actor()
        if self.start is not None:
            tags |= {"warm_start": self.start.ref, "warm_start_digest": self.start.digest}
        tracked = tracking.start_run(f"memmc/{self.cohort}", run, tags=tags, params=_params(config))
        log_input(tracking, tracked, self._input(config))
        shown = config.model_dump_json(include=_SETTINGS, exclude={"train": {"warm_start"}}, indent=1)
        tracking.log_text(tracked, {"config.json": shown})
        return RunRecord(run, self.cohort, self.version, self.task, tracked)

    def _input(self, config: Config) -> TrainingInput:
        stamps = {"preprocess_id": str(self.job.description["preprocess_id"]), "config_id": config.config_id}
        keys = self.rows["object_key"].to_pylist()
        return TrainingInput(self.cohort, self.version, images_digest(keys), len(keys), self.num_patients, stamps)

    @property
    def num_patients(self) -> int:
        """Patients of the images."""
        return len(set(self.rows["patient_key"].to_pylist()))


def _learned(plan: _Plan, flags: dict[str, int]) -> dict[str, Any]:
    """Return what the model card says of the images."""
    counts = {"images": plan.rows.num_rows, "patients": plan.num_patients, "kept_back": plan.kept_back}
    return {**counts, "left_out": flags}


def _plan(config: Config, home: Path, lake: Lake, cohort: str) -> tuple[_Plan, bool]:
    """Settle images, start and run; say whether another driver's run is taken over."""
    start = open_model(config, home, config.train.warm_start) if config.train.warm_start else None
    wanted = config.train.resume if config.train.resume not in {"auto", "new"} else None
    named = next((r for r in unfinished(lake.storage, cohort) if r.run == wanted), None) if wanted else None
    version = named.dataset_version if named else lake.version("instances")
    pins = Pins.now(lake)
    every = normal_table(lake, cohort, "train", version, pins)
    rows, held_out = keep_back(every, config.train.validate_share)
    job = training_job(config, cohort, version, rows, start)
    task = task_of(config, rows["object_key"].to_pylist(), start.digest if start else "")
    found = None if config.train.resume == "new" else to_resume(lake.storage, cohort, task, wanted)
    if found is not None and found.dataset_version != version:
        # Later versions hold the same training images; the pinned one is the run's.
        version = found.dataset_version
        job = training_job(config, cohort, version, rows, start)
    _require_normals(config, lake, job, found)
    kept_back = every.num_rows - rows.num_rows
    return _Plan(cohort, version, pins, rows, held_out, kept_back, job, task, start, found), found is not None


def _require_normals(config: Config, lake: Lake, job: TrainingJob, found: RunRecord | None) -> None:
    """Refuse to train what could not be calibrated afterwards, on the held-out normals of the run's own version."""
    cohort, version = str(job.description["cohort"]), int(job.description["dataset_version"])
    remedy, early_stages = "ingest more normals", 0
    if found is not None:
        remedy = f"begin another run when there are more (--resume new: {found.run} keeps to table version {version})"
    if config.score.early_stop:
        patches = (job.image_size // job.model.patch_size) ** 2
        early_stages = len(stage_passes(patches, num_kept(patches, job.model.mask_ratio), config.score.passes)) - 1
    held_out = normal_table(lake, cohort, "calibrate", version)
    require_normals(config, held_out.num_rows, remedy, early_stages=early_stages)


def _fit(
    ray: Any,
    lake: Lake,
    plan: _Plan,
    job: TrainingJob,
    record: RunRecord,
    watcher: _Watcher,
    folder: str,
    *,
    use_gpu: bool,
) -> Fitted:
    require_cpus(ray, job.train.min_workers or job.train.num_workers, use_gpu)
    files = lake.files("instances", plan.version, {"outcome": "stored", "split": "train", "cohort": plan.cohort})
    keys = plan.rows["object_key"].to_pylist()
    look_at = plan.held_out["object_key"].to_pylist() or sorted(keys, key=hash_of)[:LOOK_IMAGES]
    looks = CachedFeed(
        ShardSource.open(ray, lake.storage, "instances", files, look_at, cached=True).tables(), len(look_at), 1, 0, 0
    )
    filesystem, root = lake.storage.arrow_filesystem()
    fitted = fit(
        ray,
        ShardSource.open(ray, lake.storage, "instances", files, keys, cached=job.keeps(len(keys))),
        job,
        name=record.run,
        storage=(filesystem, f"{root}/training"),
        out=Path(folder),
        use_gpu=use_gpu,
        on_metrics=watcher,
        look_at=looks.images_NHWC,
        weights=None if plan.start is None else (plan.start.folder / WEIGHTS_FILE).read_bytes(),
    )
    watcher.flush()
    watcher.log_last(fitted.metrics)
    return fitted


def _registered(tracking: Tracking, plan: _Plan, record: RunRecord, folder: Path) -> ModelVersion:
    """Return the run's version in the registry; a driver that failed after it was made has left it there."""
    name = f"memmc-{plan.cohort}"
    before = registered_before(tracking, record.tracked, folder, name)
    return before or register(tracking, record.tracked, folder, name, tags=_model_tags(plan, record))


def _model_tags(plan: _Plan, record: RunRecord) -> dict[str, str]:
    tags = {"cohort": plan.cohort, "dataset_version": str(record.dataset_version), **plan.pins.as_tags()}
    if plan.start is None:
        return tags
    return {**tags, "warm_start": plan.start.ref, ANCESTORS_TAG: json.dumps(plan.start.learned_from)}


def _params(config: Config) -> dict[str, str]:
    tree = config.model_dump(mode="json", include={"data", "model", "train"})
    params = {f"{section}.{key}": str(value) for section, fields in tree.items() for key, value in fields.items()}
    return {**params, "config_id": config.config_id, "preprocess_id": config.preprocess_id}


class _Watcher:
    """Passes what rank 0 logs to the terminal and the tracking store."""

    def __init__(self, progress: Progress, tracking: Tracking, run: str) -> None:
        self._progress, self._tracking, self._run = progress, tracking, run
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

    def log_last(self, metrics: dict[str, Any]) -> None:
        """Send what is measured once, at the end."""
        found = {name: float(value) for name, value in metrics.items() if name.startswith("ablation/")}
        self._tracking.log_metrics(self._run, [(int(metrics["steps"]), found)])

    def flush(self) -> None:
        """Send what is waiting."""
        if self._waiting:
            self._tracking.log_metrics(self._run, self._waiting)
            self._waiting = []
