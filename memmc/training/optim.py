"""Optimiser, schedule and weight average.

Source: [MAE] AdamW (0.9, 0.95), weight decay .05, lr = base_lr x global_batch / 256, linear warm-up, cosine to 0;
[choice] the schedule follows the progress of the run, not its steps, so that a run bounded by time ends at lr 0 too.
"""

from __future__ import annotations

import copy
import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from memmc.config import TrainConfig
from memmc.model.mae import MemMCMAE

BETAS = (0.9, 0.95)


def make_optimizer(model: MemMCMAE, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameter groups; its learning rate is set before each step."""
    groups = model.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(progress: float, config: TrainConfig, global_batch: int) -> float:
    """Return the rate at `progress`, 0 at the start and the end of the run, the peak after the warm-up.

    Args:
        progress: share of the run done, 0 to 1; values outside are clamped.
        config: base rate and share of the warm-up.
        global_batch: images per step, of all workers.
    """
    progress = min(max(progress, 0.0), 1.0)
    peak = config.base_lr * global_batch / 256
    if progress < config.warmup:
        return peak * progress / config.warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (progress - config.warmup) / (1.0 - config.warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class WeightAverage:
    """Exponential moving average of the weights; the averaged model is the one that scores.

    Update n (from 1) uses ``min(decay, (1 + n) / (10 + n))``, so that short runs do not average in the
    random start [choice].

    Attributes:
        model: the averaged model, in eval mode, without gradients.
        updates: number of updates so far.
    """

    def __init__(self, model: MemMCMAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: MemMCMAE) -> None:
        """Move the average towards `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [parameter.detach() for parameter in self.model.parameters()]
        values = [parameter.detach() for parameter in model.parameters()]
        get_ema_multi_avg_fn(decay)(averages, values, self.updates)
