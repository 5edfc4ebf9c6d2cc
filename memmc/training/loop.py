"""The training loop: any iterable of stored pixels in, an averaged model out. Knows nothing of Ray.

All workers run the same loop; what must be equal on all of them (progress, hence learning rate, checkpoints and
the end) follows from numbers that rank 0 hands out.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from memmc.config import TrainConfig
from memmc.errors import DivergedError, TrainingError
from memmc.model.mae import MemMCMAE
from memmc.model.masking import random_ids_keep
from memmc.training.augment import augment, sent, standardise
from memmc.training.checkpoint import RunState, collect, load_checkpoint, save_checkpoint
from memmc.training.feed import Batch, Feed
from memmc.training.optim import WeightAverage, learning_rate, make_optimizer, set_learning_rate
from memmc.training.order import Position
from memmc.training.pace import Clock, Window
from memmc.training.peers import Alone, Sync
from memmc.training.sharding import whole

logger = logging.getLogger(__name__)

Save = Callable[[Path], None]
Metrics = dict[str, int | float]
Look = Callable[[MemMCMAE], dict[str, float]]

AGREE_STEPS = 8
"""Steps between two words from rank 0; also between two log entries."""

_LOOKING = 0.2  # share of the time that looks may take

EARLY_STEPS = (1, 2, 4)
"""Steps after a start at which rank 0's word is heard too, so that a short warm-up begins at once."""

LOSS_STEPS = 32
"""Steps over which the reported loss is the mean."""

NAMED_IMAGES = 64
"""Images of bad batches that an error names."""


@dataclass(frozen=True)
class TrainOutcome:
    """A finished run.

    Attributes:
        ema_model: the averaged model at the end.
        selected: the averaged model to export: the best by `train.select`, else the last.
        selected_step: the optimiser step it is of.
        steps: optimiser steps, over all attempts.
        epochs: epochs begun.
        train_seconds: wall time of the loop, over all attempts, s.
        loss: mean training loss of the last steps, NaN without any.
        images: images seen by all workers.
    """

    ema_model: MemMCMAE
    selected: MemMCMAE
    selected_step: int
    steps: int
    epochs: int
    train_seconds: float
    loss: float
    images: int

    def as_dict(self) -> Metrics:
        """Return the numbers."""
        return {
            "steps": self.steps,
            "selected_step": self.selected_step,
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


def train(
    model: MemMCMAE,
    feed: Feed,
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
    on_step: Callable[[], None] | None = None,
    on_look: Look | None = None,
    on_log: Callable[[Metrics], None] | None = None,
    on_checkpoint: Callable[[Save, Metrics], None] | None = None,
) -> TrainOutcome:
    """Train until `max_steps` or `max_minutes`, whichever comes first, or `patience` is at its end.

    Args:
        model: trained in place; must start equal on all ranks.
        feed: gives this rank's batches of shape (B, H, W, C), unsigned integers as stored, from a position on,
            without end; every batch holds `batch_size` images.
        config: the recipe.
        bits: of a stored pixel.
        pixel_mean: of the training images in [0, 1].
        pixel_std: of the training images, above 0.
        device: where to compute; bf16 autocast on CUDA that has it, float32 elsewhere.
        world_size: number of workers; a resumed run may have another number than before.
        rank: of this worker.
        sync: the fellow workers; none when absent.
        resume_from: folder of a checkpoint to go on from.
        on_step: called after every step.
        on_look: called on every rank every `look_seconds` (less often where that would take more than a fifth of
            the time) and at the end, with the averaged model, whole; the figures it returns, equal on all ranks, go
            into the next log entry, and `train.select` picks one of them.
        on_log: given step, epoch, progress, loss, lr, grad_norm, images_per_s (all workers), data_wait (share of
            the time spent waiting for batches) and elapsed_s, on every rank, every few steps.
        on_checkpoint: called on every rank every `checkpoint_seconds` and at the end, with a function that writes
            the checkpoint into a folder (one rank is enough) and the latest metrics.

    Raises:
        DivergedError: a loss or gradient is not finite; raised on every rank at the same step.
        TrainingError: no images, or a batch of the wrong shape.
        IntegrityError: the checkpoint's files were altered.
        ModelError: the checkpoint is unfinished or of another model.
    """
    spec = InputSpec(bits, pixel_mean, pixel_std)
    run = _Run(model.to(device), config, spec, torch.device(device), world_size, rank, sync or Alone())
    if resume_from is not None:
        run.resume(resume_from)
    return run.run(feed, on_step or (lambda: None), on_look, on_log or (lambda _: None), on_checkpoint)


@dataclass(frozen=True)
class _Pending:
    """A step whose figures nobody has looked at yet.

    Attributes:
        epoch: that its first image is of.
        losses: one of each batch, over the number of batches.
    """

    step: int
    epoch: int
    losses: list[Tensor]
    norm: Tensor
    batches: list[Batch]


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
        self.average = WeightAverage(model, config.ema_decay)
        self.wrapped = sync.wrap(model, self.average.model)
        self.optimizer = make_optimizer(model, config)
        self.state = RunState(step=0, position=Position(0, ((0, world_size),)), elapsed_s=0.0, seed=config.seed)
        self.pending: list[_Pending] = []
        self.losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self.last_norm = math.nan
        self.num_images = 0
        self.selected: dict[str, Tensor] = {}

    def resume(self, folder: str | Path) -> None:
        state, self.selected = load_checkpoint(folder, self.model, self.average, self.optimizer)
        self.state = replace(state, position=state.position.shared_by(self.world_size))
        self.losses.extend(self.state.losses)
        logger.info("resumed at step %d after %.0f s", self.state.step, self.state.elapsed_s)

    def run(
        self,
        feed: Feed,
        on_step: Callable[[], None],
        on_look: Look | None,
        on_log: Callable[[Metrics], None],
        on_checkpoint: Callable[[Save, Metrics], None] | None,
    ) -> TrainOutcome:
        self.num_images = feed.num_images
        self.wrapped.train()
        clock = Clock(self.config, self.sync, self.state)
        window = Window(feed(self.state.position), self.state.position.images)
        metrics: Metrics = {}
        first, saved_s = self.state.step, self.state.elapsed_s
        look_due_s = saved_s + self.config.look_seconds
        while (progress := clock.progress(self.state.step)) < 1.0 and not self._out_of_patience():
            rate = learning_rate(progress, self.config, self._global_batch)
            self._step([window.next_batch() for _ in range(self.config.accumulate)], rate)
            on_step()
            if self.state.step - first in EARLY_STEPS:
                clock.agree(self.state.step)
            if self.state.step % AGREE_STEPS == 0:
                elapsed_s = clock.agree(self.state.step)
                self._check_finite()
                metrics = self._metrics(progress, rate, elapsed_s) | window.close(self.state.position.images)
                if on_look is not None and elapsed_s >= look_due_s:
                    metrics |= self._look(on_look)
                    seen_s = clock.agree(self.state.step)
                    rest_s = (seen_s - elapsed_s) * (1.0 / _LOOKING - 1.0)
                    look_due_s = seen_s + max(self.config.look_seconds, rest_s)
                    on_step()
                on_log(metrics)
                if on_checkpoint is not None and elapsed_s - saved_s >= self.config.checkpoint_seconds:
                    on_checkpoint(self._saver(clock.own_s), metrics)
                    saved_s = elapsed_s
                    clock.agree(self.state.step)
        self._check_finite()
        seconds = clock.own_s
        if not metrics:
            metrics = self._metrics(1.0, 0.0, seconds) | window.close(self.state.position.images)
        if on_look is not None and self.state.step > first:
            on_log(metrics | self._metrics(1.0, 0.0, seconds) | self._look(on_look))
        if on_checkpoint is not None:
            on_checkpoint(self._saver(clock.final_s(self.state.step)), metrics)
        average = self._whole_average()
        return TrainOutcome(
            ema_model=average,
            selected=self._with_weights(self.selected) if self.selected else average,
            selected_step=self.state.best_step if self.selected else self.state.step,
            steps=self.state.step,
            epochs=math.ceil(self.state.position.images / self.num_images) if self.num_images else 0,
            train_seconds=seconds,
            loss=self._recent_loss(),
            images=self.state.position.images,
        )

    @property
    def _global_batch(self) -> int:
        return self.config.batch_size * self.world_size * self.config.accumulate

    def _step(self, batches: list[Batch], rate: float) -> None:
        """One optimiser step; loss and gradient norm are kept aside, so that a GPU need not be waited for."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            images_BCHW, ids_keep_BK = self._inputs(batch, self.state.step * len(batches) + number)
            with nullcontext() if last else self.sync.accumulating(self.wrapped):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=_has_bf16(self.device)):
                    loss: Tensor = self.wrapped(images_BCHW, ids_keep_BK).loss / len(batches)
                loss.backward()
            losses.append(loss.detach())
        epoch = self.state.position.images // (self.num_images or 1)
        self.pending.append(_Pending(self.state.step, epoch, losses, self._clip(), batches))
        if self.device.type != "cuda":
            self._check_finite()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.average.update(self.model)
        position = replace(self.state.position, images=self.state.position.images + self._global_batch)
        self.state = replace(self.state, step=self.state.step + 1, position=position)

    def _clip(self) -> Tensor:
        """Bound the gradient's norm and return what it was.

        Gradients within the bound are left alone where asking costs nothing: a product with 1 would read and write all
        of them. A GPU is not waited for.
        """
        parameters, bound = list(self.model.parameters()), self.config.clip_grad_norm
        own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = whole(own).detach()
        if self.device.type == "cuda" or not bool(norm + 1e-6 <= bound):
            nn.utils.clip_grads_with_norm_(parameters, bound, own)
        return norm

    def _inputs(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Return augmented images and their visible patches; both follow from (seed, rank, number) alone."""
        model, spec, pixels = self.model, self.spec, batch.pixels
        expected = (self.config.batch_size, model.image_size, model.image_size, model.channels)
        if tuple(pixels.shape) != expected:
            raise TrainingError(f"batch of shape {tuple(pixels.shape)}; this run takes {expected}")
        images_BCHW = standardise(
            pixels, bits=spec.bits, pixel_mean=spec.pixel_mean, pixel_std=spec.pixel_std, device=self.device
        )
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.rank, number))
        images_BCHW = augment(images_BCHW, self.config.crop_scale, self.config.rotate_degrees, generator)
        ids_keep_BK = random_ids_keep(len(images_BCHW), model.num_patches, model.num_keep, generator)
        return images_BCHW, sent(ids_keep_BK, self.device)

    def _check_finite(self) -> None:
        """Move pending losses to the list of losses; fail on the first gradient that is not finite.

        The norm is of the gradient averaged over ranks, so that all ranks find the same step.
        """
        for done in self.pending:
            self.last_norm = done.norm.item()
            if not math.isfinite(self.last_norm):
                self._fail(done)
            self.losses.append(sum(loss.item() for loss in done.losses))
        self.pending.clear()

    def _fail(self, failed: _Pending) -> NoReturn:
        """Name the batches of each rank whose loss is not finite; of all ranks when only the gradient is."""
        loss = sum(part.item() for part in failed.losses)
        broken = [batch for batch, part in zip(failed.batches, failed.losses, strict=True) if not part.isfinite()]
        uids = [uid for batch in broken or failed.batches for uid in batch.uids]
        more = f" and {len(uids) - NAMED_IMAGES} more" if len(uids) > NAMED_IMAGES else ""
        named = f"rank {self.rank}, loss {loss:.4g}: {', '.join(uids[:NAMED_IMAGES]) or 'unnamed images'}{more}"
        bad, fine = "bad:", "fine:"
        texts = self.sync.texts((fine if math.isfinite(loss) else bad) + named)
        chosen = [text.removeprefix(bad) for text in texts if text.startswith(bad)]
        chosen = chosen or [text.removeprefix(fine) for text in texts]
        raise DivergedError(
            f"step {failed.step} (epoch {failed.epoch}): gradient norm {self.last_norm}; {'; '.join(chosen)}. "
            "Lower train.base_lr, or look at these images (sop_instance_uid)"
        )

    def _metrics(self, progress: float, rate: float, elapsed_s: float) -> Metrics:
        return {
            "step": self.state.step,
            "epoch": (self.state.position.images - 1) // self.num_images if self.state.position.images else 0,
            "progress": min(progress, 1.0),
            "loss": self._recent_loss(),
            "lr": rate,
            "grad_norm": self.last_norm,
            "elapsed_s": elapsed_s,
        }

    def _recent_loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def _saver(self, elapsed_s: float) -> Save:
        state = replace(self.state, elapsed_s=elapsed_s, losses=tuple(self.losses))
        content = collect(self.model, self.average, self.optimizer, self.selected)

        def save(folder: Path) -> None:
            save_checkpoint(folder, content, state)

        return save

    def _whole_average(self) -> MemMCMAE:
        """Return the average with all of its weights on this worker."""
        return self._with_weights({name: whole(value) for name, value in self.average.model.state_dict().items()})

    def _with_weights(self, weights: dict[str, Tensor]) -> MemMCMAE:
        copy = MemMCMAE(self.model.config, self.model.image_size, self.model.channels).eval().requires_grad_(False)
        copy.load_state_dict(weights)
        return copy.to(self.device)

    def _look(self, on_look: Look) -> dict[str, float]:
        """Look at the average, and keep its weights when its figure is the best so far."""
        average = self._whole_average()
        found = on_look(average)
        if self.config.select != "last":
            value = found[self.config.select] * (-1.0 if self.config.select == "val_error" else 1.0)
            if not self.selected or value > self.state.best_value:
                self.selected = {name: tensor.cpu() for name, tensor in average.state_dict().items()}
                self.state = replace(self.state, best_step=self.state.step, best_value=value, looks_since_best=0)
            else:
                self.state = replace(self.state, looks_since_best=self.state.looks_since_best + 1)
        return found

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.state.looks_since_best >= self.config.patience


def step_seed(seed: int, rank: int, step: int) -> int:
    """Return a 63-bit seed that differs for every (seed, rank, step), so that a resumed run draws as before."""
    digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
