"""The training loop: any iterable of stored pixels in, an averaged model out. Knows nothing of Ray.

All workers run the same loop; what must be equal on all of them (progress, hence learning rate, checkpoints and
the end) follows from numbers that rank 0 hands out.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memmc.config import TrainConfig
from memmc.errors import TrainingError
from memmc.model.mae import MemMCMAE
from memmc.model.masking import random_ids_keep
from memmc.training.augment import augment, standardise
from memmc.training.checkpoint import RunState, load_checkpoint, save_checkpoint
from memmc.training.optim import WeightAverage, learning_rate, make_optimizer, set_learning_rate

logger = logging.getLogger(__name__)

Pixels = NDArray[np.unsignedinteger] | Tensor
Batches = Callable[[int], Iterable[Pixels]]
Save = Callable[[Path], None]
Metrics = dict[str, int | float]

AGREE_STEPS = 8
"""Steps between two words from rank 0; also between two log entries."""

EARLY_STEPS = (1, 2, 4)
"""Steps after a start at which rank 0's word is heard too, so that a short warm-up begins at once."""

LOSS_STEPS = 32
"""Steps over which the reported loss is the mean."""


class Sync(Protocol):
    """What a loop needs from its fellow workers."""

    def broadcast_float(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        ...

    def wrap(self, model: MemMCMAE) -> nn.Module:
        """Return the module to call in the forward pass, its gradients averaged over the ranks."""
        ...


class Alone:
    """The only worker."""

    def broadcast_float(self, value: float) -> float:
        """Return the value."""
        return value

    def wrap(self, model: MemMCMAE) -> nn.Module:
        """Return the model."""
        return model


@dataclass(frozen=True)
class TrainOutcome:
    """A finished run.

    Attributes:
        ema_model: the averaged model, the one to export.
        steps: optimiser steps, over all attempts.
        epochs: epochs begun.
        train_seconds: wall time of the loop, over all attempts, s.
        loss: mean training loss of the last steps, NaN without any.
        images: images seen by all workers.
    """

    ema_model: MemMCMAE
    steps: int
    epochs: int
    train_seconds: float
    loss: float
    images: int

    def as_dict(self) -> Metrics:
        """Return the numbers."""
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "train_seconds": self.train_seconds,
            "loss": self.loss,
            "images": self.images,
        }


@dataclass(frozen=True)
class InputSpec:
    """How stored pixels become model input: ``(pixel / (2^bits - 1) - mean) / std``."""

    bits: int
    pixel_mean: float
    pixel_std: float


class _Clock:
    """Progress of the run, equal on all ranks: rank 0's time, carried on at its pace between two words."""

    def __init__(self, config: TrainConfig, sync: Sync, state: RunState) -> None:
        self._sync = sync
        self._max_steps, self._max_seconds = config.max_steps, config.max_minutes * 60.0
        self._start = time.monotonic() - state.elapsed_s
        self._agreed_s, self._agreed_step, self._pace_s = state.elapsed_s, state.step, 0.0

    @property
    def own_s(self) -> float:
        return time.monotonic() - self._start

    def agree(self, step: int) -> float:
        """Take rank 0's elapsed time and return it; every rank must call this at the same steps."""
        now_s = self._sync.broadcast_float(self.own_s)
        if step > self._agreed_step:
            self._pace_s = max(now_s - self._agreed_s, 0.0) / (step - self._agreed_step)
        self._agreed_s, self._agreed_step = now_s, step
        return now_s

    def progress(self, step: int) -> float:
        elapsed_s = self._agreed_s + self._pace_s * (step - self._agreed_step)
        return max(step / self._max_steps, elapsed_s / self._max_seconds)


def train(
    model: MemMCMAE,
    batches: Batches,
    config: TrainConfig,
    *,
    bits: int,
    pixel_mean: float,
    pixel_std: float,
    device: str | torch.device = "cpu",
    world_size: int = 1,
    rank: int = 0,
    sync: Sync | None = None,
    resume_from: str | Path | None = None,
    on_log: Callable[[Metrics], None] | None = None,
    on_checkpoint: Callable[[Save, Metrics], None] | None = None,
) -> TrainOutcome:
    """Train until `max_steps` or `max_minutes`, whichever comes first.

    Args:
        model: trained in place; must start equal on all ranks.
        batches: called with the epoch's number, gives that epoch's batches of shape (B, H, W, C), unsigned integers
            as stored. Called again for the next epoch when one ends; ranks need as many batches as each other.
        config: the recipe.
        bits: of a stored pixel.
        pixel_mean: of the training images in [0, 1].
        pixel_std: of the training images, above 0.
        device: where to compute; bf16 autocast on CUDA, float32 elsewhere.
        world_size: number of workers.
        rank: of this worker.
        sync: the fellow workers; none when absent.
        resume_from: folder of a checkpoint to go on from.
        on_log: given step, epoch, progress, loss, lr, grad_norm, images_per_s (all workers), data_wait (share of
            the time spent waiting for batches) and elapsed_s, on every rank, every few steps.
        on_checkpoint: called on every rank every `checkpoint_seconds` and at the end, with a function that writes
            the checkpoint into a folder (one rank is enough) and the latest metrics.

    Raises:
        TrainingError: an epoch without batches, a batch of the wrong shape, a loss or gradient that is not finite.
        IntegrityError: the checkpoint's files were altered.
        ModelError: the checkpoint is unfinished or of another model.
    """
    spec = InputSpec(bits, pixel_mean, pixel_std)
    run = _Run(model.to(device), config, spec, torch.device(device), world_size, rank, sync or Alone())
    if resume_from is not None:
        run.resume(resume_from)
    return run.run(batches, on_log, on_checkpoint)


class _Run:
    """State of one attempt at a run."""

    def __init__(
        self,
        model: MemMCMAE,
        config: TrainConfig,
        spec: InputSpec,
        device: torch.device,
        world_size: int,
        rank: int,
        sync: Sync,
    ) -> None:
        self.model, self.config, self.spec, self.device = model, config, spec, device
        self.world_size, self.rank, self.sync = world_size, rank, sync
        self.optimizer = make_optimizer(model, config)
        self.average = WeightAverage(model, config.ema_decay)
        self.state = RunState(step=0, epoch=0, elapsed_s=0.0, images=0, seed=config.seed)
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self.last_norm = math.nan

    def resume(self, folder: str | Path) -> None:
        self.state = load_checkpoint(folder, self.model, self.average, self.optimizer)
        self.losses.extend(self.state.losses)
        logger.info("resumed at step %d after %.0f s", self.state.step, self.state.elapsed_s)

    def run(
        self,
        batches: Batches,
        on_log: Callable[[Metrics], None] | None,
        on_checkpoint: Callable[[Save, Metrics], None] | None,
    ) -> TrainOutcome:
        wrapped = self.sync.wrap(self.model).train()
        clock = _Clock(self.config, self.sync, self.state)
        stream = self._stream(batches)
        window = _Window(self.state.images)
        metrics: Metrics = {}
        first, saved_s = self.state.step, self.state.elapsed_s
        while (progress := clock.progress(self.state.step)) < 1.0:
            pixels = window.wait_for(stream)
            rate = learning_rate(progress, self.config, self.config.batch_size * self.world_size)
            self._step(wrapped, pixels, rate)
            if self.state.step - first in EARLY_STEPS:
                clock.agree(self.state.step)
            if self.state.step % AGREE_STEPS == 0:
                elapsed_s = clock.agree(self.state.step)
                self._check_finite()
                metrics = self._metrics(progress, rate, elapsed_s) | window.close(self.state.images)
                if on_log is not None:
                    on_log(metrics)
                if on_checkpoint is not None and elapsed_s - saved_s >= self.config.checkpoint_seconds:
                    on_checkpoint(self._saver(clock), metrics)
                    saved_s = elapsed_s
        self._check_finite()
        seconds = clock.own_s
        if not metrics:
            metrics = self._metrics(1.0, 0.0, seconds) | window.close(self.state.images)
        if on_checkpoint is not None:
            on_checkpoint(self._saver(clock), metrics)
        return TrainOutcome(
            ema_model=self.average.model,
            steps=self.state.step,
            epochs=self.state.epoch,
            train_seconds=seconds,
            loss=self._recent_loss(),
            images=self.state.images,
        )

    def _stream(self, batches: Batches) -> Iterator[Pixels]:
        while True:
            epoch, empty = self.state.epoch, True
            self.state = replace(self.state, epoch=epoch + 1)
            for pixels in batches(epoch):
                empty = False
                yield pixels
            if empty:
                raise TrainingError(f"epoch {epoch} has no batches for rank {self.rank}; are there training images?")

    def _step(self, wrapped: nn.Module, pixels: Pixels, rate: float) -> None:
        """One optimiser step; loss and gradient norm are kept aside, so that a GPU need not be waited for."""
        images_BCHW, ids_keep_BK = self._inputs(pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: Tensor = wrapped(images_BCHW, ids_keep_BK).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        if self.device.type != "cuda" and not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            self._fail(self.state.step, loss.item(), norm.item())
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.average.update(self.model)
        images = self.state.images + len(images_BCHW) * self.world_size
        self.state = replace(self.state, step=self.state.step + 1, images=images)
        self.pending.append((self.state.step, loss.detach(), norm.detach()))

    def _inputs(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """Return augmented images and their visible patches; both follow from (seed, rank, step) alone."""
        model, spec = self.model, self.spec
        expected = (model.image_size, model.image_size, model.channels)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or len(pixels) == 0:
            raise TrainingError(f"batch of shape {tuple(pixels.shape)}; this model takes (images, *{expected})")
        images_BCHW = standardise(
            pixels, bits=spec.bits, pixel_mean=spec.pixel_mean, pixel_std=spec.pixel_std, device=self.device
        )
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.rank, self.state.step))
        images_BCHW = augment(images_BCHW, self.config.crop_scale, self.config.rotate_degrees, generator)
        ids_keep_BK = random_ids_keep(len(images_BCHW), model.num_patches, model.num_keep, generator)
        return images_BCHW, ids_keep_BK.to(self.device, non_blocking=True)

    def _check_finite(self) -> None:
        """Move pending losses to the list of losses; fail on the first that is not finite."""
        for step, loss, norm in self.pending:
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                self._fail(step - 1, loss.item(), norm.item())
            self.losses.append(loss.item())
        self.last_norm = self.pending[-1][2].item() if self.pending else math.nan
        self.pending.clear()

    def _fail(self, step: int, loss: float, norm: float) -> NoReturn:
        raise TrainingError(
            f"step {step} (epoch {self.state.epoch - 1}, rank {self.rank}): loss {loss}, gradient norm {norm}; "
            "lower train.base_lr, or look for broken pixels in that epoch"
        )

    def _metrics(self, progress: float, rate: float, elapsed_s: float) -> Metrics:
        return {
            "step": self.state.step,
            "epoch": self.state.epoch - 1,
            "progress": min(progress, 1.0),
            "loss": self._recent_loss(),
            "lr": rate,
            "grad_norm": self.last_norm,
            "elapsed_s": elapsed_s,
        }

    def _recent_loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def _saver(self, clock: _Clock) -> Save:
        state = replace(self.state, elapsed_s=clock.own_s, losses=tuple(self.losses))

        def save(folder: Path) -> None:
            save_checkpoint(folder, self.model, self.average, self.optimizer, state)

        return save


class _Window:
    """Time and images since the last log entry."""

    def __init__(self, images: int) -> None:
        self._images, self._start, self._waited_s = images, time.monotonic(), 0.0

    def wait_for(self, stream: Iterator[Pixels]) -> Pixels:
        began = time.monotonic()
        pixels = next(stream)
        self._waited_s += time.monotonic() - began
        return pixels

    def close(self, images: int) -> Metrics:
        """Return the rates of the window and begin the next one."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rates = {"images_per_s": (images - self._images) / seconds, "data_wait": self._waited_s / seconds}
        self._images, self._start, self._waited_s = images, now, 0.0
        return rates


def step_seed(seed: int, rank: int, step: int) -> int:
    """Return a 63-bit seed that differs for every (seed, rank, step), so that a resumed run draws as before."""
    digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
