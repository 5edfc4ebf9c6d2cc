"""Ray Train around the one loop: a run of workers, restarted after a failure, and what it tells the driver."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import ModelConfig, TrainConfig
from memmc.errors import DivergedError, MemmcError, TrainingError
from memmc.training.source import ShardSource

_POLL_S = 1.0
MODEL, LAST = "model", "last"  # folders of a finished run's checkpoint
DIVERGED = "diverged"  # key of the board's row that says why a run ended
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

    def keeps(self, num_images: int) -> bool:
        """Return whether a worker keeps so many images in memory (`train.cache_bytes`) or streams them every epoch."""
        return num_images * self.image_size**2 * self.channels * self.bits // 8 <= self.train.cache_bytes


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

    from memmc.training.worker import work

    config = job.train
    # A worker that is stopped answers no call of the controller's; Ray's own patience is ten minutes.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hung_seconds)
    # Where the driver is, as Ray Train's controller: another node may be lost while training goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    filesystem, path = storage
    workers = config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers)
    trainer = TorchTrainer(
        work,
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
        diverged.append(row[DIVERGED]) if DIVERGED in row else on_metrics(row)

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
        if not (Path(folder) / MODEL).is_dir():
            raise TrainingError(f"training run {name} ended without a model; run it again to resume")
        for part in (MODEL, LAST):
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
