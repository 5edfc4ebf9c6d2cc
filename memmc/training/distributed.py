"""Ray Train around the one loop: workers, DDP, checkpoints, restart after a failure."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memmc.config import ModelConfig, TrainConfig
from memmc.errors import MemmcError, TrainingError

_POLL_S = 1.0
_MODEL = "model"


@dataclass(frozen=True)
class TrainingJob:
    """All a worker needs besides its images.

    Attributes:
        image_size: side, px.
        bits: of the stored pixels; 2**bits - 1 becomes 1.0.
        pixel_mean: of the training images, in [0, 1].
        pixel_std: of the training images, in [0, 1].
        num_images: training images over all workers.
        cached: each worker keeps its share in memory.
        description: preprocess_id, cohort, dataset_version and config_id, for the model's description.
    """

    model: ModelConfig
    train: TrainConfig
    image_size: int
    channels: int
    bits: int
    pixel_mean: float
    pixel_std: float
    num_images: int
    cached: bool
    description: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """A finished run: its last metrics; the model lies in the folder the caller gave."""

    metrics: dict[str, Any]


def fit(
    ray: Any,
    dataset: Any,
    job: TrainingJob,
    *,
    name: str,
    storage: tuple[Any, str],
    out: Path,
    use_gpu: bool,
    on_metrics: Callable[[dict[str, Any]], None],
) -> Fitted:
    """Train on a connected Ray cluster; a run of the same name and storage resumes.

    Args:
        dataset: Ray Dataset of Arrow rows with `sop_instance_uid` and `pixels`.
        storage: pyarrow file system and path below which the run keeps its checkpoints.
        out: folder to receive the model.
        on_metrics: called in this process, in order, for everything rank 0 logs.

    Raises:
        TrainingError: the loop failed more often than `train.max_failures`, or for good.
    """
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    board = ray.remote(num_cpus=0)(Board).remote()
    filesystem, path = storage
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(num_workers=job.train.num_workers, use_gpu=use_gpu),
        datasets={"train": dataset},
        # A cached share is settled by UID, so each worker looks at all rows once and keeps its own.
        dataset_config=DataConfig(datasets_to_split=[] if job.cached else "all"),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=300),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _forward(ray, board, on_metrics):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(f"training run {name} failed: {_root_cause(error)}") from None
    if result.checkpoint is None:
        raise TrainingError(f"training run {name} ended without a checkpoint; see its folder in the lake")
    with result.checkpoint.as_directory() as folder:
        source = Path(folder) / _MODEL
        if not source.is_dir():
            raise TrainingError(f"training run {name} ended without a model; run it again to resume")
        out.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
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


class RayPeers:
    """Agreement between the workers of a Ray Train run."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def broadcast_float(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.broadcast(tensor, src=0)
        return float(tensor.item())

    def wrap(self, model: Any) -> Any:
        """Return the model with gradients averaged over workers."""
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return model
        devices = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _worker(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from memmc.model.artifact import ModelInfo, export_model
    from memmc.model.mae import MemMCMAE
    from memmc.training.loop import train

    job: TrainingJob = settings["job"]
    board = settings["board"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    torch.manual_seed(job.train.seed)
    model = MemMCMAE(job.model, job.image_size, job.channels).to(device)

    def on_log(metrics: dict[str, Any]) -> None:
        if rank == 0:
            board.pin.remote(metrics)

    def on_checkpoint(save: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                save(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)

    def run(resume_from: Path | None) -> Any:
        return train(
            model,
            _feed(job, ray.train.get_dataset_shard("train"), rank, world_size),
            job.train,
            pixel_mean=job.pixel_mean,
            pixel_std=job.pixel_std,
            bits=job.bits,
            device=device,
            world_size=world_size,
            rank=rank,
            sync=RayPeers(device),
            resume_from=resume_from,
            on_log=on_log,
            on_checkpoint=on_checkpoint,
        )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        outcome = run(None)
    else:
        with checkpoint.as_directory() as folder:
            outcome = run(Path(folder))

    def save_model(folder: Path) -> None:
        steps, seconds = outcome.steps, round(outcome.train_seconds, 1)
        info = ModelInfo(
            image_size=job.image_size,
            channels=job.channels,
            pixel_mean=job.pixel_mean,
            pixel_std=job.pixel_std,
            steps=steps,
            train_seconds=seconds,
            seed=job.train.seed,
            **job.description,
        )
        export_model(folder / _MODEL, outcome.ema_model, info)

    on_checkpoint(save_model, outcome.as_dict())


def _feed(job: TrainingJob, shard: Any, rank: int, world_size: int) -> Any:
    from memmc.training.feed import CachedFeed, StreamedFeed

    if job.cached:
        tables: Iterable[Any] = shard.iter_batches(batch_size=1024, batch_format="pyarrow", prefetch_batches=2)
        return CachedFeed(tables, job.train.batch_size, job.train.seed, rank, world_size)

    def tables_of(rows: int, window: int, seed: int) -> Iterable[Any]:
        return shard.iter_batches(
            batch_size=rows,
            batch_format="pyarrow",
            prefetch_batches=4,
            drop_last=True,
            local_shuffle_buffer_size=window,
            local_shuffle_seed=seed,
        )

    return StreamedFeed(tables_of, job.train.batch_size, job.train.seed)


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
