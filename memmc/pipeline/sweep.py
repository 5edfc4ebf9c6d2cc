"""Sweep: many short trainings over settings, judged on held-out normals, side by side in MLflow."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from memmc.config import Config, load_config
from memmc.cores import cores
from memmc.errors import ConfigError, TrainingError, UsageError
from memmc.lake.files import DataFile
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.model.digest import WEIGHTS_FILE
from memmc.pipeline.cluster import ray_cluster, require_cpus, tasks_at_once
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.placement import on_gpus
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import PlanResult, Result
from memmc.pipeline.select import normal_table
from memmc.pipeline.training_job import keep_back, training_job
from memmc.registry.tracking import Tracking
from memmc.training.feed import CachedFeed
from memmc.training.source import ShardSource
from memmc.training.trial import NUMBER, run_trial

Criterion = Literal["probe_auroc", "val_error"]

_SECTIONS = ("model", "train")
# Settings of train.* that are read once for all trials, and those that a trial does not read.
_SHARED = {"validate_share", "warm_start", "use_gpu", "cache_bytes"}
_UNREAD = {"num_workers", "min_workers", "strategy", "checkpoint_seconds", "max_failures", "hung_seconds", "resume"}
_HELD_OUT_SHARE = 0.1
_FIGURES = ("probe_auroc", "val_error", "loss", "steps")
# A trial has both, so that a value of train.select or train.patience is not refused for want of the other.
_BESIDE = (f"train.validate_share={_HELD_OUT_SHARE}", "train.select=val_error")


@dataclass(frozen=True)
class Trial(Result):
    """One set of settings and what came of it.

    Attributes:
        settings: `section.key` and value, as given.
        run: id of the MLflow run.
        probe_auroc: how well planted lesions are told from the same held-out normals without them.
        val_error: masked error on held-out normals, in standard deviations of the pixels.
        failure: kind of error; empty when the trial ended well.
    """

    settings: dict[str, str]
    run: str
    probe_auroc: float | None
    val_error: float | None
    loss: float | None
    steps: int
    failure: str = ""


@dataclass(frozen=True)
class SweepResult(Result):
    """All trials, best first."""

    sweep: str
    cohort: str
    by: str
    trials: list[Trial]


def combinations(params: Sequence[str], samples: int | None, seed: int) -> list[dict[str, str]]:
    """Return the settings of each trial: all combinations, or `samples` of them drawn without repeats.

    Args:
        params: `section.key=value,value,...`.

    Raises:
        UsageError: no values, a name given twice, or a setting that is not of the model or the recipe, or that trials
            cannot differ in.
        ConfigError: an unknown key or a value out of range.
    """
    values: dict[str, list[str]] = {}
    for item in params:
        name, _, listed = item.partition("=")
        name, found = name.strip(), [value.strip() for value in listed.split(",") if value.strip()]
        if not found or name in values:
            raise UsageError(f"--param {name}: expected section.key=value,value,... once for each key")
        section, _, key = name.partition(".")
        if section not in _SECTIONS or name == "train.preset":
            raise UsageError(f"--param {name}: a sweep varies model.* and train.* but not the preset or the data")
        if section == "train" and key in _SHARED:
            raise UsageError(f"--param {name}: all trials share it; give one value with --set, a sweep for each")
        if section == "train" and key in _UNREAD:
            raise UsageError(f"--param {name}: a trial has one worker and no checkpoints, so it would change nothing")
        for value in found:
            _value(name, value)
        values[name] = found
    if not values:
        raise UsageError("nothing to vary; give --param section.key=value,value,... at least once")
    every = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if samples is None or samples >= len(every):
        return every
    return random.Random(seed).sample(every, samples)


def trial_config(config: Config, settings: dict[str, str], minutes: float) -> Config:
    """Return the configuration of one trial; it keeps normals back even when `config` does not.

    Raises:
        ConfigError: values that do not go together.
    """
    tree = config.model_dump()
    tree["train"] |= {"max_minutes": minutes, "validate_share": config.train.validate_share or _HELD_OUT_SHARE}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        tree[section][key] = _value(name, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ConfigError(f"trial {shown}: {error.errors()[0]['msg']}") from None


def _value(name: str, text: str) -> Any:
    """Return the value of `section.key`, read as `--set` reads it.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    section, _, key = name.partition(".")
    return getattr(getattr(load_config(overrides=[*_BESIDE, f"{name}={text}"]), section), key)


def preview(config: Config, cohort: str, params: Sequence[str], samples: int | None, minutes: float) -> PlanResult:
    """Say how many trials there would be and how long they would take."""
    check_cohort(cohort)
    chosen = combinations(params, samples, config.train.seed)
    configs = [trial_config(config, settings, minutes) for settings in chosen]
    lake = Lake(config.lake.uri)
    rows, held_out = keep_back(normal_table(lake, cohort, "train"), configs[0].train.validate_share)
    at_once = max(1, tasks_at_once(config) or 1)
    return PlanResult(
        {
            "trials": len(configs),
            "minutes of training": round(-(-len(configs) // at_once) * minutes),
            "normal images to train on": rows.num_rows,
            "normal images held out": held_out.num_rows,
        }
    )


def sweep(
    config: Config,
    cohort: str,
    params: Sequence[str],
    *,
    samples: int | None = None,
    minutes: float = 5.0,
    by: Criterion = "probe_auroc",
    progress: Progress | None = None,
) -> SweepResult:
    """Train every combination of settings for the same time and rank them by a figure of held-out normals.

    No label and no test image is used. A trial counts with the look whose weights `train.select` would register. Each
    has one worker; as many run at once as there are cores, or GPUs. Each starts from `train.warm_start`, if that is
    set. Nothing is registered: train the winner with `memmc train --set ...`.

    Args:
        params: `section.key=value,value,...`.
        samples: trials to draw from all combinations; all of them when None.
        minutes: of training per trial.
        by: the figure that ranks.

    Raises:
        UsageError: the parameters cannot be varied.
        DataError: no normal images, or too few to keep back.
        ModelError: the model to start from is missing, or of another shape than a trial's.
        TrainingError: no trial ended well.
    """
    progress = progress or Silent()
    check_cohort(cohort)
    home, lake = home_directory(), Lake(config.lake.uri)
    chosen = combinations(params, samples, config.train.seed)
    configs = [trial_config(config, settings, minutes) for settings in chosen]
    version = lake.version("instances")
    rows, held_out = keep_back(normal_table(lake, cohort, "train", version), configs[0].train.validate_share)
    start = open_model(config, home, config.train.warm_start) if config.train.warm_start else None
    jobs = [training_job(one, cohort, version, rows, start) for one in configs]
    tracking = tracking_of(config, home)
    name = f"sweep-{cohort}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    tags = {"cohort": cohort, "dataset_version": str(version)}
    if start is not None:
        tags |= {"warm_start": start.ref, "warm_start_digest": start.digest}
    parent = tracking.start_run(f"memmc/{cohort}", name, tags=tags, params={"by": by, "minutes": minutes})
    runs = _TrialRuns(tracking)
    progress.message(f"{len(chosen)} trials of {minutes:g} min, {rows.num_rows} images, {held_out.num_rows} held out")
    progress.stage("start workers")
    status = "FAILED"
    try:
        for number, settings in enumerate(chosen):
            runs.begin(f"memmc/{cohort}", f"{name}-{number}", tags | {"mlflow.parentRunId": parent}, settings)
        with ray_cluster(config, home) as ray:
            use_gpu = on_gpus(ray, config.train)
            require_cpus(ray, 1, use_gpu)
            at_once = _at_once(config, ray, len(jobs), use_gpu=use_gpu)
            progress.message(f"{at_once} at once on {'GPUs' if use_gpu else 'CPUs'}")
            files = lake.files("instances", version, {"outcome": "stored", "split": "train", "cohort": cohort})
            given = {
                "jobs": jobs,
                **_images(ray, lake.storage, files, rows, held_out, cached=jobs[0].keeps(rows.num_rows)),
                "threads": max(1, cores() // at_once),
                "use_gpu": use_gpu,
                "weights": None if start is None else (start.folder / WEIGHTS_FILE).read_bytes(),
            }
            filesystem, root = lake.storage.arrow_filesystem()
            recorder = _recorder(runs, progress, len(jobs))
            progress.stage("sweep", 1.0)
            results = _tune(given, at_once, name, (filesystem, f"{root}/sweeps"), recorder)
        status = "FINISHED"
    finally:
        runs.end_all()
        tracking.end_run(parent, status)
    for number in results.keys() & runs.looks.keys():
        results[number] |= _chosen_look(runs.looks[number], configs[number].train.select)
    trials = [_trial(chosen[n], runs.ids[n], results.get(n)) for n in range(len(chosen))]
    ranked = sorted(trials, key=lambda trial: _rank(trial, by))
    if ranked[0].failure:
        raise TrainingError(f"no trial of sweep {name} ended well; the first failed with {ranked[0].failure}")
    return SweepResult(name, cohort, by, ranked)


def _images(
    ray: Any, storage: Storage, files: Sequence[DataFile], rows: pa.Table, held_out: pa.Table, *, cached: bool
) -> dict[str, Any]:
    """Return where a trial finds the images to train on, and the pixels of those to look at."""
    learned, looked_at = (
        ShardSource.open(ray, storage, "instances", files, part["object_key"].to_pylist(), cached=kept)
        for part, kept in ((rows, cached), (held_out, True))
    )
    looks = CachedFeed(looked_at.tables(), held_out.num_rows, 1, 0, 0)
    return {"source": learned, "look_at": looks.images_NHWC}


def _at_once(config: Config, ray: Any, trials: int, *, use_gpu: bool) -> int:
    """Return how many trials run side by side: one a core, and with GPUs one a GPU."""
    resources = ray.cluster_resources()
    most = tasks_at_once(config) or int(resources["CPU"])
    if use_gpu:
        most = min(most, int(resources["GPU"]))
    return max(1, min(trials, most))


def _tune(
    given: dict[str, Any], at_once: int, name: str, storage: tuple[Any, str], recorder: Any
) -> dict[int, dict[str, Any]]:
    """Return the last report of each trial, and under `failure` what ended it early.

    Args:
        given: what `run_trial` takes beside its number.
    """
    from ray import tune

    resources: dict[str, float] = {"cpu": 1, "gpu": 1} if given["use_gpu"] else {"cpu": 1}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, **given), resources),
        param_space={NUMBER: tune.grid_search(list(range(len(given["jobs"]))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            name=name, storage_filesystem=storage[0], storage_path=storage[1], verbose=0, callbacks=[recorder]
        ),
    )
    found: dict[int, dict[str, Any]] = {}
    for result in tuner.fit():
        report = dict(result.metrics or {})
        number = int((result.config or {})[NUMBER])
        found[number] = report | ({"failure": type(result.error).__name__} if result.error else {})
    return found


class _TrialRuns:
    """The trials' tracked runs.

    Attributes:
        ids: of the runs, by number of the trial.
        looks: what each trial has reported, in order.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self.ids: list[str] = []
        self.looks: dict[int, list[dict[str, Any]]] = {}
        self._ended: set[int] = set()

    def begin(self, experiment: str, name: str, tags: dict[str, str], settings: dict[str, str]) -> None:
        """Begin the run of the next trial."""
        self.ids.append(self._tracking.start_run(experiment, name, tags=tags, params=settings))

    def look(self, number: int, result: Mapping[str, Any]) -> None:
        """Keep and log what a trial reports."""
        figures = {key: float(result[key]) for key in _FIGURES if key in result}
        self.looks.setdefault(number, []).append({**figures, "step": int(result["step"])})
        self._tracking.log_metrics(self.ids[number], [(int(result["step"]), figures)])

    def end(self, number: int, status: Literal["FINISHED", "FAILED"]) -> int:
        """End a trial's run; return how many have ended."""
        self._ended.add(number)
        self._tracking.end_run(self.ids[number], status)
        return len(self._ended)

    def end_all(self) -> None:
        """End the runs of trials that never began, or whose end was not seen."""
        for number in set(range(len(self.ids))) - self._ended:
            self.end(number, "FAILED")


def _chosen_look(looks: Sequence[dict[str, Any]], select: str) -> dict[str, Any]:
    """Return the look whose weights a training with `train.select` would register: the last, or the first best."""
    if select == "last":
        return looks[-1]
    return min(looks, key=lambda look: look[select] if select == "val_error" else -look[select])


def _recorder(runs: _TrialRuns, progress: Progress, count: int) -> Any:
    """Return a Tune callback that writes each trial's reports to its own tracked run."""
    from ray.tune import Callback

    class Recorder(Callback):
        def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
            """Travel without the tracking store and the terminal: Tune pickles what it was called with."""
            return Callback, ()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            runs.look(trial.config[NUMBER], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trial, "FINISHED")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trial, "FAILED")

        def _end(self, trial: Any, status: Literal["FINISHED", "FAILED"]) -> None:
            ended = runs.end(trial.config[NUMBER], status)
            progress.advance(ended / count, f"{ended} of {count} trials")

    return Recorder()


def _trial(settings: dict[str, str], run: str, report: dict[str, Any] | None) -> Trial:
    report = report or {}
    complete = "probe_auroc" in report
    return Trial(
        settings=settings,
        run=run,
        probe_auroc=float(report["probe_auroc"]) if complete else None,
        val_error=float(report["val_error"]) if complete else None,
        loss=float(report["loss"]) if complete else None,
        steps=int(report.get("step", 0)),
        failure=str(report.get("failure", "" if complete else "no figure")),
    )


def _rank(trial: Trial, by: Criterion) -> tuple[bool, float]:
    value = trial.probe_auroc if by == "probe_auroc" else trial.val_error
    if trial.failure or value is None:
        return True, 0.0
    return False, -value if by == "probe_auroc" else value
