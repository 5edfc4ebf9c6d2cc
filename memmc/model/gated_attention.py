"""Attention to several levels at once under one gate per level and head, its memory bounded.

Shape legend: B images, h heads, L queries, S levels, N tokens of a level, T = S N tokens level by level,
d width of a head, G gates of a level (h or 1), 2 keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 4 << 20
"""Attention weights held at once on a CPU: they stay in its last cache while a dozen operations pass over them."""


class GatedLevelAttention(torch.autograd.Function):
    """``Y = sum_l a_l P_l V_l`` of a head: ``P_l = softmax(Q K_l^T / sqrt(d))``, ``a_l = sigmoid(q_l + P_l V_l u)``.

    Nothing of size L x T outlives a chunk of images: the backward pass computes the weights anew, one matmul in
    seven, and what is kept is Q, K, V and the gates. With ``W = a P``, ``D = dY V^T``, ``g = P V u``::

        da = sum_n P D      r = da (1 - a)      dq = a r      dV = W^T dY + (sum_L W r) u^T
        dS = W (D + r (V u) - da - r g)         dQ = dS K     dK = dS^T Q

    With one gate for all heads, g of the gate and da of r are summed over heads.

    Source: [choice] of the form; the equations are those of `LevelCrossAttention`.
    """

    @staticmethod
    def forward(ctx: Any, query_BLhd: Tensor, kv_BT2hd: Tensor, gate_BGLS: Tensor, context_Shd: Tensor) -> Tensor:
        """Return Y, shape (B, L, h, d).

        Args:
            query_BLhd: Q.
            kv_BT2hd: K and V.
            gate_BGLS: q, the half of the gates that depends on the queries.
            context_Shd: u, which turns a context into the other half.
        """
        levels, output_BLhd, kept = gate_BGLS.shape[-1], torch.empty_like(query_BLhd), []
        for part, (first, second) in _chunks(query_BLhd, kv_BT2hd, levels, buffers=2):
            query, key, value = _heads_first(query_BLhd[part], kv_BT2hd[part])
            weights = _attend(query, key, scores=first, out=second)
            half_BhLS = torch.mul(weights, _columns(value, context_Shd), out=first).sum(-1)
            gate = (gate_BGLS[part] + _per_gate(half_BhLS, gate_BGLS)).sigmoid()
            weights *= gate[..., None]
            output_BLhd[part] = (weights.flatten(3).to(value.dtype) @ value).transpose(1, 2)
            kept.append((gate, half_BhLS))
        gates, halves = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        ctx.save_for_backward(query_BLhd, kv_BT2hd, context_Shd, gates, halves)
        return output_BLhd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLhd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of Q, of K and V, of q, and of u."""
        query_BLhd, kv_BT2hd, context_Shd, gates, halves = ctx.saved_tensors
        grad_query, grad_kv = torch.empty_like(query_BLhd), torch.empty_like(kv_BT2hd)
        grad_gate, grad_context = torch.empty_like(gates, dtype=grad_BLhd.dtype), torch.zeros_like(context_Shd)
        for part, buffers in _chunks(query_BLhd, kv_BT2hd, gates.shape[-1], buffers=3):
            query, key, value = _heads_first(query_BLhd[part], kv_BT2hd[part])
            grad, gate, half_BhLS = grad_BLhd[part].transpose(1, 2), gates[part], halves[part]
            weights = _attend(query, key, scores=buffers[0], out=buffers[1])
            scores = _matmul(grad, value.transpose(-1, -2), out=buffers[0])
            grad_a = torch.mul(weights, scores, out=buffers[2]).sum(-1)
            rest = _per_gate(grad_a, gate) * (1 - gate)
            grad_gate[part] = rest * gate
            weights *= gate[..., None]
            scores.addcmul_(rest[..., None], _columns(value, context_Shd))
            scores -= (grad_a + rest * half_BhLS)[..., None]
            scores *= weights
            flat = scores.flatten(3).to(key.dtype)
            scale = query.shape[-1] ** -0.5
            grad_query[part] = (flat @ key).mul_(scale).transpose(1, 2)
            grad_kv[part, :, 0] = (flat.transpose(-1, -2) @ query).mul_(scale).transpose(1, 2)
            grad_value = weights.flatten(3).to(grad.dtype).transpose(-1, -2) @ grad
            grad_columns = weights.mul_(rest[..., None]).sum(2)
            grad_value += torch.einsum("bhsn,shd->bhsnd", grad_columns, context_Shd).flatten(2, 3)
            grad_kv[part, :, 1] = grad_value.transpose(1, 2)
            by_level = value.unflatten(2, grad_columns.shape[2:]).to(grad_columns.dtype)
            grad_context += torch.einsum("bhsn,bhsnd->shd", grad_columns, by_level)
        return grad_query, grad_kv, grad_gate, grad_context


def gated_level_attention(query_BLhd: Tensor, kv_BT2hd: Tensor, gate_BGLS: Tensor, context_Shd: Tensor) -> Tensor:
    """Return what `GatedLevelAttention` returns; traced graphs get plain operations, which their compiler fuses."""
    if not torch.compiler.is_compiling():
        return GatedLevelAttention.apply(query_BLhd, kv_BT2hd, gate_BGLS, context_Shd)  # pyright: ignore[reportReturnType]
    query_BhLd, key_BhTd, value_BhTd = _heads_first(query_BLhd, kv_BT2hd)
    scores = (query_BhLd * query_BhLd.shape[-1] ** -0.5) @ key_BhTd.transpose(-1, -2)
    weights = scores.unflatten(-1, (len(context_Shd), -1)).softmax(-1)
    half_BhLS = (weights * _columns(value_BhTd, context_Shd)).sum(-1)
    weights = weights * (gate_BGLS + _per_gate(half_BhLS, gate_BGLS)).sigmoid()[..., None]
    return (weights.flatten(3).to(value_BhTd.dtype) @ value_BhTd).transpose(1, 2)


def _chunks(
    query_BLhd: Tensor, kv_BT2hd: Tensor, levels: int, buffers: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield slices of images, and for each the same buffers (B, h, L, S, N), in float32 at least.

    On a CPU a buffer is at most `CHUNK_BYTES`, or one image's; elsewhere one slice holds all images.
    """
    batch, length, heads, _ = query_BLhd.shape
    dtype = torch.promote_types(query_BLhd.dtype, torch.float32)
    shape, size = (heads, length, levels, kv_BT2hd.shape[1] // levels), batch
    if query_BLhd.device.type == "cpu":
        size = min(batch, max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(shape))))
    memory = torch.empty((buffers, size, *shape), dtype=dtype, device=query_BLhd.device)
    for start in range(0, batch, size):
        yield slice(start, start + size), memory[:, : min(size, batch - start)].unbind(0)


def _heads_first(query_BLhd: Tensor, kv_BT2hd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (B, h, L, d), K and V (B, h, T, d)."""
    key, value = kv_BT2hd.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return query_BLhd.transpose(1, 2).contiguous(), key, value


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write the product of (B, h, L, d) and (B, h, d, T) into a buffer (B, h, L, S, N) and return that."""
    if left.dtype != out.dtype:
        return out.copy_((left @ right).view_as(out))
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1).flatten(2))
    return out


def _attend(query_BhLd: Tensor, key_BhTd: Tensor, scores: Tensor, out: Tensor) -> Tensor:
    """Write attention weights (B, h, L, S, N), each level summing to 1, into `out` and return that."""
    _matmul(query_BhLd * query_BhLd.shape[-1] ** -0.5, key_BhTd.transpose(-1, -2), out=scores)
    return torch.softmax(scores, -1, out=out)


def _columns(value_BhTd: Tensor, context_Shd: Tensor) -> Tensor:
    """Return V u, what a token adds to its level's gate, shape (B, h, 1, S, N)."""
    by_level = value_BhTd.unflatten(2, (len(context_Shd), -1)).to(context_Shd.dtype)
    return torch.einsum("bhsnd,shd->bhsn", by_level, context_Shd)[:, :, None]


def _per_gate(per_head_BhLS: Tensor, gate_BGLS: Tensor) -> Tensor:
    """Return the sum over heads where one gate serves them all."""
    return per_head_BhLS if gate_BGLS.shape[1] > 1 else per_head_BhLS.sum(1, keepdim=True)
