"""Seeded training runs whose losses are kept in `tests/golden/loss_curve.json`.

After a change that is meant to alter the numbers, write them anew and say why in the commit::

    python tests/unit/golden_run.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from memmc.config import ModelConfig, TrainConfig
from memmc.model.mae import MemMCMAE
from memmc.training.optim import learning_rate, make_optimizer, set_learning_rate

FILE = Path(__file__).parents[1] / "golden" / "loss_curve.json"
STEPS, BATCH, SIDE = 30, 8, 32
VARIANTS = {
    "channel": {"gate": "channel"},
    "head": {"gate": "head"},
    "scalar, every second level": {"gate": "scalar", "levels": "every_2"},
    "plain MAE": {"memory_slots": 0, "cross_attention": False},
}


def images_of(step: int) -> Tensor:
    """Discs on gratings, standardised: a structure that visible patches tell of."""
    generator = torch.Generator().manual_seed(1000 + step)
    phase, angle, row, column, radius = torch.rand(5, BATCH, 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, SIDE)
    y, x = axis[None, :, None], axis[None, None, :]
    grating = (2 * math.pi * (2 * (x * (math.pi * angle).cos() + y * (math.pi * angle).sin()) + phase)).sin()
    disc = ((y - row + 0.5) ** 2 + (x - column + 0.5) ** 2 < (0.2 + 0.4 * radius) ** 2).float()
    return (0.7 * grating + 2 * disc - 0.4)[:, None]


def loss_curve(steps: int = STEPS, **changes: object) -> list[float]:
    """Return the training loss of every step."""
    torch.manual_seed(0)
    sizes = {"encoder_dim": 32, "encoder_depth": 4, "encoder_heads": 2, "decoder_dim": 32, "decoder_depth": 2}
    model = MemMCMAE(ModelConfig(**{**sizes, "patch_size": 4, "memory_slots": 8, **changes}), SIDE)
    config = TrainConfig(base_lr=0.1)
    optimizer, losses = make_optimizer(model, config), []
    for step in range(steps):
        loss = model(images_of(step), generator=torch.Generator().manual_seed(step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        set_learning_rate(optimizer, learning_rate((step + 1) / (STEPS + 1), config, BATCH))
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    curves = {name: [round(loss, 6) for loss in loss_curve(**changes)] for name, changes in VARIANTS.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
