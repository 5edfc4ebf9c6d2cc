"""Operations, parameters and bytes of a MemMC-MAE training step, by formula.

One multiply-add is two operations. A backward pass costs twice the forward pass; attention under gates is computed
once more in it (`GatedLevelAttention`), and so is the self-attention of a fused kernel. Only matrix products are
counted: norms, softmax and GELU are bound by bytes, not by operations.

Symbols as in `memmc.config.ModelConfig`: D, S of the encoder, E of the decoder, L patches, K visible ones, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memmc.config import PRESETS, ModelConfig, Preset
from memmc.model.levels import level_indices
from memmc.model.mae import MemMCMAE


@dataclass(frozen=True)
class StepCost:
    """Of one image's forward and backward pass.

    Attributes:
        parts: multiply-adds of the forward pass by part of the model.
        recomputed: multiply-adds that the backward pass repeats.
        parameters: numbers in the model.
    """

    parts: dict[str, float]
    recomputed: float
    parameters: int

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return 2 * sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Operations a training step must do: forward, and twice that backward."""
        return 3 * self.forward

    @property
    def executed(self) -> float:
        """Operations it does, those done twice included."""
        return self.needed + 2 * self.recomputed


def config_of(preset: Preset, **changes: object) -> ModelConfig:
    return ModelConfig(**{**PRESETS[preset].get("model", {}), **changes})


def step_cost(config: ModelConfig, image_size: int, channels: int = 1) -> StepCost:
    """Return the cost of one image."""
    dim, width, ratio = config.encoder_dim, config.decoder_dim, config.mlp_ratio
    with torch.device("meta"):
        model = MemMCMAE(config, image_size, channels)
    tokens, queries = model.num_keep + 1, model.num_patches + 1
    values, levels = config.patch_size**2 * channels, len(level_indices(config))
    encoder_attention = 2 * tokens * (tokens + config.memory_slots) * dim
    if not config.decoder_self_attention:
        queries = model.num_patches - model.num_keep
    parts = {
        "embedding and head": model.num_keep * values * dim + queries * values * width,
        "encoder": config.encoder_depth * (tokens * (4 + 2 * ratio) * dim**2 + encoder_attention),
        "level adapters": levels * tokens * dim * width,
        "decoder MLP": config.decoder_depth * queries * 2 * ratio * width**2,
    }
    recomputed = config.encoder_depth * encoder_attention / 2
    if config.decoder_self_attention:
        attention = 2 * queries**2 * width
        parts["decoder self-attention"] = config.decoder_depth * (queries * 4 * width**2 + attention)
        recomputed += config.decoder_depth * attention / 2
    if config.cross_attention:
        attention = 2 * queries * levels * tokens * width
        projections = (2 * queries + 2 * levels * tokens) * width**2
        parts["cross-attention"] = config.decoder_depth * (projections + attention)
        recomputed += config.decoder_depth * attention / 2
        if levels > 1:
            gates = {"channel": width, "head": config.decoder_heads, "scalar": 1}[config.gate]
            rest = levels - 1 if config.gate == "channel" else 0  # every level has its own output projection
            products = queries * levels * width * gates * (2 if config.gate == "channel" else 1)
            parts["gates"] = config.decoder_depth * (products + rest * queries * width**2)
    return StepCost(parts, recomputed, sum(parameter.numel() for parameter in model.parameters()))
