"""Ray Train around the one loop: workers, DDP, checkpoints, restart after a failure."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import ModelConfig, TrainConfig
from memmc.cores import cores
from memmc.errors import DivergedError, MemmcError, TrainingError
from memmc.training.source import ShardSource

if TYPE_CHECKING:
    from memmc.model.mae import MemMCMAE
    from memmc.training.loop import TrainOutcome

_POLL_S = 1.0
_MODEL, _LAST = "model", "last"
_DIVERGED = "diverged"
_HEALTH_IMAGES = 32
_SLOWEST_START_S = 300.0


@dataclass(frozen=True)
class TrainingJob:
    """All a worker needs besides its images.

    Attributes:
        image_size: side, px.
        bits: of the stored pixels; 2**bits - 1 becomes 1.0.
        pixel_mean: of the training images, in [0, 1].
        pixel_std: of the training images, in [0, 1].
        description: preprocess_id, cohort, dataset_version and config_id, for the model's description.
    """

    model: ModelConfig
    train: TrainConfig
    image_size: int
    channels: int
    bits: int
    pixel_mean: float
    pixel_std: float
    description: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """A finished run: its last metrics; the model lies in the folder the caller gave."""

    metrics: dict[str, Any]


def fit(
    ray: Any,
    source: ShardSource,
    job: TrainingJob,
    *,
    name: str,
    storage: tuple[Any, str],
    out: Path,
    use_gpu: bool,
    on_metrics: Callable[[dict[str, Any]], None],
    look_at: NDArray[np.unsignedinteger],
    weights: bytes | None = None,
) -> Fitted:
    """Train on a connected Ray cluster; a run of the same name and storage resumes.

    Args:
        source: the training images.
        storage: pyarrow file system and path below which the run keeps its checkpoints.
        out: folder to receive the model folder `model`, and `last` where a selection chose another step.
        on_metrics: called in this process, in order, for everything rank 0 logs.
        look_at: pixels_VHWC of the images to look at the model with; held out when `train.validate_share` is set.
        weights: of a model to start from, as safetensors; random ones when absent.

    Raises:
        DivergedError: a loss or gradient was not finite; not tried again.
        TrainingError: the loop failed more often than `train.max_failures`, or for good.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = job.train
    # A worker that is stopped answers no call of the controller's; Ray's own patience is ten minutes.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hung_seconds)
    # Where the driver is, as Ray Train's controller: another node may be lost while training goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    filesystem, path = storage
    workers = config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "job": job,
            "source": source,
            "board": board,
            "look_at": ray.put(look_at),
            "weights": None if weights is None else ray.put(weights),
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=round(max(config.hung_seconds, _SLOWEST_START_S))
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    diverged: list[str] = []

    def on_row(row: dict[str, Any]) -> None:
        diverged.append(row[_DIVERGED]) if _DIVERGED in row else on_metrics(row)

    with _forward(ray, board, on_row):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(f"training run {name} failed: {_root_cause(error)}") from None
    if diverged:
        raise DivergedError(diverged[0])
    if result.checkpoint is None:
        raise TrainingError(f"training run {name} ended without a checkpoint; see its folder in the lake")
    with result.checkpoint.as_directory() as folder:
        if not (Path(folder) / _MODEL).is_dir():
            raise TrainingError(f"training run {name} ended without a model; run it again to resume")
        for part in (_MODEL, _LAST):
            if (Path(folder) / part).is_dir():
                shutil.copytree(Path(folder) / part, out / part)
    return Fitted(metrics=dict(result.metrics or {}))


class Board:
    """Where rank 0 pins what it logs, and the driver takes it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def pin(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        """Return and forget all rows."""
        rows, self._rows = self._rows, []
        return rows


@contextmanager
def _forward(ray: Any, board: Any, on_metrics: Callable[[dict[str, Any]], None]) -> Generator[None]:
    """Bring the board's rows to `on_metrics` while the block runs, and the last of them after it."""
    finished = threading.Event()

    def poll() -> None:
        while not finished.wait(_POLL_S):
            for row in ray.get(board.take.remote()):
                on_metrics(row)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        for row in ray.get(board.take.remote()):
            on_metrics(row)


def _worker(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from memmc.training.augment import standardise
    from memmc.training.feed import PinnedFeed
    from memmc.training.looks import Fixed, HeldOut, ablations, health
    from memmc.training.loop import train
    from memmc.training.peers import Alone, Group
    from memmc.training.watchdog import Watchdog

    job: TrainingJob = settings["job"]
    source: ShardSource = settings["source"]
    board = settings["board"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    torch.manual_seed(job.train.seed)
    model = _new_model(job, None if settings["weights"] is None else ray.get(settings["weights"])).to(device)
    feed = source.feed(job.train, rank)
    if device.type == "cuda":
        feed = PinnedFeed(feed)
    sync = Group(device, job.train.strategy) if world_size > 1 else Alone()
    images_VCHW = standardise(
        ray.get(settings["look_at"]),
        bits=job.bits,
        pixel_mean=job.pixel_mean,
        pixel_std=job.pixel_std,
        device=torch.device("cpu"),
    )
    fixed = Fixed.of(images_VCHW[:_HEALTH_IMAGES], model)
    held_out = HeldOut(images_VCHW, model, sync, rank, world_size) if job.train.validate_share else None
    saves: list[Callable[[Path], None]] = []

    def on_look(average: MemMCMAE) -> dict[str, float]:
        found = held_out(average) if held_out else {}
        return found | (health(average, fixed) if rank == 0 else {})

    def on_log(metrics: dict[str, Any]) -> None:
        if rank == 0:
            board.pin.remote(metrics)

    def report(save: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        with watchdog.away(), tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                save(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)

    def on_checkpoint(save: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        saves[:] = [save]
        report(save, metrics)

    def run(resume_from: Path | None) -> Any:
        return train(
            model,
            feed,
            job.train,
            pixel_mean=job.pixel_mean,
            pixel_std=job.pixel_std,
            bits=job.bits,
            device=device,
            world_size=world_size,
            rank=rank,
            sync=sync,
            resume_from=resume_from,
            on_step=watchdog.beat,
            on_look=on_look,
            on_log=on_log,
            on_checkpoint=on_checkpoint,
        )

    def save_finished(folder: Path) -> None:
        """Keep the run's state beside the model: a driver killed before it has registered the model comes back here."""
        saves[-1](folder)
        _export(folder, job, outcome)

    checkpoint = ray.train.get_checkpoint()
    with Watchdog(job.train.hung_seconds).guarding() as watchdog:
        try:
            if checkpoint is None:
                outcome = run(None)
            else:
                with checkpoint.as_directory() as folder:
                    outcome = run(Path(folder))
        except DivergedError as error:
            # All workers are here; ending in order keeps Ray Train from trying again what would end alike.
            if rank == 0:
                ray.get(board.pin.remote({_DIVERGED: str(error)}))
            return
        watchdog.beat()
        report(save_finished, outcome.as_dict() | (ablations(outcome.selected, fixed) if rank == 0 else {}))


def _new_model(job: TrainingJob, weights: bytes | None) -> MemMCMAE:
    """Return the model to train: random, or with the weights of another."""
    from safetensors.torch import load

    from memmc.model.mae import MemMCMAE

    model = MemMCMAE(job.model, job.image_size, job.channels)
    if weights is not None:
        model.load_state_dict(load(weights))
    return model


def _export(folder: Path, job: TrainingJob, outcome: TrainOutcome) -> None:
    """Write the selected model, and the last one where that is another."""
    from memmc.model.artifact import ModelInfo, export_model

    info = ModelInfo(
        image_size=job.image_size,
        channels=job.channels,
        pixel_mean=job.pixel_mean,
        pixel_std=job.pixel_std,
        steps=outcome.selected_step,
        train_seconds=round(outcome.train_seconds, 1),
        seed=job.train.seed,
        **job.description,
    )
    export_model(folder / _MODEL, outcome.selected, info)
    if outcome.selected_step != outcome.steps:
        export_model(folder / _LAST, outcome.ema_model, replace(info, steps=outcome.steps))


def _root_cause(error: BaseException) -> str:
    """Name the first worker's error and its place in the code; its own text only if it was raised on purpose."""
    failures = getattr(error, "worker_failures", {}) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, MemmcError):
            return f"worker {rank}: {cause}"
        places = re.findall(r'File ".*?([^/"]+/[^/"]+)", line (\d+)', str(failure))
        return f"worker {rank}: {type(cause).__name__}" + (f" at {':'.join(places[-1])}" if places else "")
    return type(error).__name__
