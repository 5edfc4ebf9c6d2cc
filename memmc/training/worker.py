"""One worker of a training run: the loop on its share of the images; rank 0 logs and keeps the checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device
from safetensors.torch import load
from torch import Tensor

from memmc.cores import cores
from memmc.errors import DivergedError
from memmc.model.artifact import ModelInfo, export_model
from memmc.model.mae import MemMCMAE
from memmc.training.augment import standardise
from memmc.training.distributed import DIVERGED, LAST, MODEL, TrainingJob
from memmc.training.feed import PinnedFeed
from memmc.training.looks import Fixed, HeldOut, ablations, health
from memmc.training.loop import Metrics, Save, TrainOutcome, train
from memmc.training.peers import Alone, Group
from memmc.training.source import ShardSource
from memmc.training.watchdog import Watchdog

_HEALTH_IMAGES = 32


def work(settings: dict[str, Any]) -> None:
    """Train as one worker; the loop function of Ray Train.

    Args:
        settings: `job`, `source`, `board` (an actor of `Board`), `look_at` (an object of pixels_VHWC) and `weights` (an
            object of safetensors to start from, or None).
    """
    job: TrainingJob = settings["job"]
    torch.manual_seed(job.train.seed)
    weights: Any = None if settings["weights"] is None else ray.get(settings["weights"])
    look_at_VHWC: Any = ray.get(settings["look_at"])
    images_VCHW = standardise(
        look_at_VHWC,
        bits=job.bits,
        pixel_mean=job.pixel_mean,
        pixel_std=job.pixel_std,
        device=torch.device("cpu"),
    )
    with Watchdog(job.train.hung_seconds).guarding() as watchdog:
        _Worker(job, settings["source"], settings["board"], watchdog, images_VCHW, weights).run()


class _Worker:
    """What the loop of one worker asks for, and tells.

    Args:
        images_VCHW: standardised images to look at the model with.
        weights: of a model to start from, as safetensors; random ones when absent.
    """

    def __init__(
        self,
        job: TrainingJob,
        source: ShardSource,
        board: Any,
        watchdog: Watchdog,
        images_VCHW: Tensor,
        weights: bytes | None,
    ) -> None:
        context = ray.train.get_context()
        self._job, self._board, self._watchdog = job, board, watchdog
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._device = get_device()
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
        self._model = _new_model(job, weights).to(self._device)
        feed = source.feed(job.train, self._rank)
        self._feed = PinnedFeed(feed) if self._device.type == "cuda" else feed
        self._peers = Group(self._device, job.train.strategy) if self._world_size > 1 else Alone()
        self._fixed = Fixed.of(images_VCHW[:_HEALTH_IMAGES], self._model)
        self._held_out: HeldOut | None = None
        if job.train.validate_share:
            self._held_out = HeldOut(images_VCHW, self._model, self._peers, self._rank, self._world_size)
        self._save: Save  # of the latest checkpoint; the loop ends with one

    def run(self) -> None:
        """Train on from the run's checkpoint if there is one, and leave the model in the last one."""
        checkpoint = ray.train.get_checkpoint()
        try:
            if checkpoint is None:
                outcome = self._train(None)
            else:
                with checkpoint.as_directory() as folder:
                    outcome = self._train(Path(folder))
        except DivergedError as error:
            # All workers are here; ending in order keeps Ray Train from trying again what would end alike.
            if self._rank == 0:
                ray.get(self._board.pin.remote({DIVERGED: str(error)}))
            return
        self._watchdog.beat()

        def save(folder: Path) -> None:
            """Keep the run's state beside the model: a driver killed before it registers the model comes back here."""
            self._save(folder)
            _export(folder, self._job, outcome)

        with self._watchdog.away():
            parts = ablations(outcome.selected, self._fixed) if self._rank == 0 else {}
        self._report(save, outcome.as_dict() | parts)

    def _train(self, resume_from: Path | None) -> TrainOutcome:
        job = self._job
        return train(
            self._model,
            self._feed,
            job.train,
            pixel_mean=job.pixel_mean,
            pixel_std=job.pixel_std,
            bits=job.bits,
            device=self._device,
            world_size=self._world_size,
            rank=self._rank,
            sync=self._peers,
            resume_from=resume_from,
            on_step=self._watchdog.beat,
            on_look=self._look,
            on_log=self._log,
            on_checkpoint=self._checkpoint,
        )

    def _look(self, average: MemMCMAE) -> dict[str, float]:
        with self._watchdog.away():  # a look takes as long as it takes: a worker that ends would meet it again
            found = self._held_out(average) if self._held_out else {}
            return found | (health(average, self._fixed) if self._rank == 0 else {})

    def _log(self, metrics: Metrics) -> None:
        if self._rank == 0:
            self._board.pin.remote(metrics)

    def _checkpoint(self, save: Save, metrics: Metrics) -> None:
        self._save = save
        self._report(save, metrics)

    def _report(self, save: Callable[[Path], None], metrics: Metrics) -> None:
        """Give Ray Train a checkpoint of rank 0, and wait until every worker has."""
        with self._watchdog.away(), tempfile.TemporaryDirectory(prefix="memmc-") as folder:
            if self._rank == 0:
                save(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if self._rank == 0 else None)


def _new_model(job: TrainingJob, weights: bytes | None) -> MemMCMAE:
    """Return the model to train: random, or with the weights of another."""
    model = MemMCMAE(job.model, job.image_size, job.channels)
    if weights is not None:
        model.load_state_dict(load(weights))
    return model


def _export(folder: Path, job: TrainingJob, outcome: TrainOutcome) -> None:
    """Write the selected model, and the last one where that is another."""
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
    export_model(folder / MODEL, outcome.selected, info)
    if outcome.selected_step != outcome.steps:
        export_model(folder / LAST, outcome.ema_model, replace(info, steps=outcome.steps))
