"""What the memory of each encoder layer and the levels of the decoder are used for; computed on request alone.

Shape legend: B images, S layers or levels, h heads, N tokens, M memory slots, K visible patches, L queries.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memmc.model.attention import MemoryAttention
from memmc.model.decoder import LevelCrossAttention
from memmc.model.mae import MemMCMAE

_SHUT = -1e4


@dataclass(frozen=True)
class LayerMemory:
    """How one layer uses its slots, means over images, heads and queries.

    Attributes:
        mass: share of the attention on slots, 0 to 1; M / (N + M) if slots were like any token.
        slots_used: slots, of all heads, that draw at least half of a uniform share of the attention on slots.
        num_slots: h * M.
        entropy: of the attention within the slots of a head, as a share of its maximum log(M), 0 to 1.
        uniform_mass: M / (N + M).
    """

    mass: float
    slots_used: int
    num_slots: int
    entropy: float
    uniform_mass: float


@torch.no_grad()
def memory_usage(model: MemMCMAE, images_BCHW: Tensor, ids_keep_BK: Tensor) -> list[LayerMemory]:
    """Return one entry per encoder layer; empty without a memory.

    Args:
        model: the model, left as it is.
        images_BCHW: standardised images.
        ids_keep_BK: visible patches.
    """
    if model.config.memory_slots == 0:
        return []
    captured: list[Tensor] = []
    with _inputs_of_attention(model, captured):
        model.encode(model.patchify(images_BCHW), ids_keep_BK)
    layers = [module for module in model.encoder.modules() if isinstance(module, MemoryAttention)]
    return [_layer_usage(layer, tokens_BND) for layer, tokens_BND in zip(layers, captured, strict=True)]


@contextmanager
def memory_ablated(model: MemMCMAE) -> Generator[None]:
    """Within the block the encoder attends to tokens only, everything else unchanged."""
    layers = [module for module in model.encoder.modules() if isinstance(module, MemoryAttention)]
    kept = [(layer.memory_key, layer.memory_value) for layer in layers]
    try:
        for layer in layers:
            layer.memory_key = layer.memory_value = None
        yield
    finally:
        for layer, (key, value) in zip(layers, kept, strict=True):
            layer.memory_key, layer.memory_value = key, value


@contextmanager
def _inputs_of_attention(model: MemMCMAE, captured: list[Tensor]) -> Generator[None]:
    def capture(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.append(inputs[0])

    layers = [module for module in model.encoder.modules() if isinstance(module, MemoryAttention)]
    handles = [layer.register_forward_pre_hook(capture) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_usage(layer: MemoryAttention, tokens_BND: Tensor) -> LayerMemory:
    query, key, _ = layer.project(tokens_BND)
    scores = query.float() @ key.float().transpose(-1, -2) * layer.head_dim**-0.5
    slots_BhNM = scores.softmax(-1)[..., -layer.memory_slots :]
    share_BhNM = slots_BhNM / slots_BhNM.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = torch.special.entr(share_BhNM).sum(-1).mean()
    maximum = torch.log(torch.tensor(float(max(layer.memory_slots, 2))))
    usage_hM = share_BhNM.mean(dim=(0, 2))
    return LayerMemory(
        mass=float(slots_BhNM.sum(-1).mean()),
        slots_used=int((usage_hM >= 0.5 / layer.memory_slots).sum()),
        num_slots=layer.heads * layer.memory_slots,
        entropy=float(entropy / maximum),
        uniform_mass=layer.memory_slots / key.shape[2],
    )


@torch.no_grad()
def gate_means(model: MemMCMAE, images_BCHW: Tensor, ids_keep_BK: Tensor) -> list[float]:
    """Return the mean gate of each level over decoder blocks, queries and channels; empty for a single level."""
    layers = _gated(model)
    captured: list[tuple[Tensor, ...]] = []
    handles = [layer.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs)) for layer in layers]
    try:
        model.decode(model.encode(model.patchify(images_BCHW), ids_keep_BK), ids_keep_BK)
    finally:
        for handle in handles:
            handle.remove()
    means = [_mean_by_level(layer, *inputs) for layer, inputs in zip(layers, captured, strict=True)]
    return torch.stack(means).mean(0).tolist() if means else []


@contextmanager
def levels_ablated(model: MemMCMAE) -> Generator[None]:
    """Within the block the decoder's cross-attention hears the last level alone: the other gates are shut."""
    biases = [layer.gate_query.bias for layer in _gated(model)]
    kept = [bias.detach().clone() for bias in biases]
    try:
        with torch.no_grad():
            for layer, bias in zip(_gated(model), biases, strict=True):
                bias.view(layer.levels, -1)[:-1] = _SHUT
        yield
    finally:
        with torch.no_grad():
            for bias, before in zip(biases, kept, strict=True):
                bias.copy_(before)


def has_gated_levels(model: MemMCMAE) -> bool:
    """Return whether the decoder weighs several levels against each other."""
    return bool(_gated(model))


def _gated(model: MemMCMAE) -> list[LevelCrossAttention]:
    found = [module for module in model.decoder.modules() if isinstance(module, LevelCrossAttention)]
    return [layer for layer in found if layer.levels > 1]


def _mean_by_level(layer: LevelCrossAttention, query_BLE: Tensor, levels_BSNE: Tensor) -> Tensor:
    """Return the gates' means, shape (S,), from their definition and not from the fast form."""
    batch, levels, slots, _ = levels_BSNE.shape
    length, heads, width = query_BLE.shape[1], layer.heads, layer.head_dim
    query = layer.query(query_BLE).view(batch, length, heads, width)
    key, value = layer.key_value(levels_BSNE).view(batch, levels, slots, 2, heads, width).unbind(3)
    weights = (torch.einsum("blhd,bsnhd->bslhn", query, key) * width**-0.5).softmax(-1)
    context_SBLhd = torch.einsum("bslhn,bsnhd->sblhd", weights, value)
    query_half = layer.gate_query(query_BLE).view(batch, length, levels, -1).permute(2, 0, 1, 3)
    if layer.gate == "channel":
        context = layer.projection(context_SBLhd.flatten(3))
        context_half = torch.einsum("sble,sfe->sblf", context, layer.gate_context_weight)
    else:
        context_half = torch.einsum("sblhd,shd->sblh", context_SBLhd, layer.gate_context_weight)
        if layer.gate == "scalar":
            context_half = context_half.sum(-1, keepdim=True)
    return torch.sigmoid(query_half + context_half).mean(dim=(1, 2, 3))
