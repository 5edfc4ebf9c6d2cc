"""What the memory of each encoder layer is used for; computed on request, never while training.

Shape legend: B images, S layers, h heads, N tokens, M memory slots, K visible patches.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memmc.model.attention import MemoryAttention
from memmc.model.mae import MemMCMAE


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
