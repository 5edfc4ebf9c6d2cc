"""Attention to several levels at once under one gate per level and head, its memory bounded.

Shape legend: B images, h heads, L queries, S levels, N tokens of a level, T = S N tokens level by level,
d width of a head, G gates of a level (h or 1), 2 keys and values.

Weights lie as (B, h, S, N, L), queries last: a level's softmax then runs over whole vectors of queries, where a row of
17 or 65 tokens would fill none, and `exp2` of scores in units of ln 2 costs a CPU a third of `exp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

CHUNK_BYTES = 4 << 20
"""Attention weights held at once: they stay in a CPU's last cache while a dozen operations pass over them."""


def gated_level_attention(query_BLhd: Tensor, kv_BT2hd: Tensor, gate_BLSG: Tensor, context_Shd: Tensor) -> Tensor:
    """Return ``sum_l a_l P_l V_l`` of every head, shape (B, L, h, d).

    ``P_l = softmax(Q K_l^T / sqrt(d))``, ``a_l = sigmoid(q_l + P_l V_l u_l)``. Fused kernels write the contexts
    ``P_l V_l`` of all levels and no weights: best where bytes are dear, on a GPU, and fit for a traced graph. On a
    CPU they are slow for short levels, and `GatedLevelAttention` computes the same.

    Args:
        query_BLhd: Q.
        kv_BT2hd: K and V.
        gate_BLSG: q, the half of the gates that depends on the queries.
        context_Shd: u, which turns a context into the other half.
    """
    if query_BLhd.device.type == "cpu" and not torch.compiler.is_compiling():
        gate_BGSL = gate_BLSG.permute(0, 3, 2, 1)
        return GatedLevelAttention.apply(query_BLhd, kv_BT2hd, gate_BGSL, context_Shd)  # pyright: ignore[reportReturnType]
    context_BSLhd = level_contexts(query_BLhd, kv_BT2hd, len(context_Shd))
    half_BSLh = torch.einsum("bslhd,shd->bslh", context_BSLhd, context_Shd.to(context_BSLhd.dtype))
    if gate_BLSG.shape[3] == 1:
        half_BSLh = half_BSLh.sum(3, keepdim=True)
    gate_BSLG = (gate_BLSG.transpose(1, 2) + half_BSLh).sigmoid()
    return (gate_BSLG[..., None] * context_BSLhd).sum(1)


def level_contexts(query_BLhd: Tensor, kv_BT2hd: Tensor, levels: int) -> Tensor:
    """Return ``P_l V_l`` of all levels from one fused attention call, levels beside images, shape (B, S, L, h, d)."""
    kv = kv_BT2hd.unflatten(1, (levels, -1)).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
    query = query_BLhd.transpose(1, 2)[:, None].expand(-1, levels, -1, -1, -1).flatten(0, 1)
    return scaled_dot_product_attention(query, kv[0], kv[1]).transpose(1, 2).unflatten(0, (-1, levels))


class GatedLevelAttention(torch.autograd.Function):
    """`gated_level_attention` that keeps Q, K, V, the gates and the softmax's normalisers, and nothing of size L x T.

    The backward pass computes the weights anew, one matmul in seven. With ``W = a P``, ``D = dY V^T``, ``g = P V u``::

        da = sum_n P D      r = da (1 - a)      dq = a r      dV = W^T dY + (sum_L W r) u^T
        dS = W (D + r (V u) - da - r g)         dQ = dS K     dK = dS^T Q

    With one gate for all heads, g of the gate and da of r are summed over heads.

    Source: [choice] of the form; the equations are those of `LevelCrossAttention`.
    """

    @staticmethod
    def forward(ctx: Any, query_BLhd: Tensor, kv_BT2hd: Tensor, gate_BGSL: Tensor, context_Shd: Tensor) -> Tensor:
        """Return (B, L, h, d)."""
        levels, output_BLhd, kept = len(context_Shd), torch.empty_like(query_BLhd), []
        for part, (weights, buffer) in _chunks(query_BLhd, kv_BT2hd, levels, buffers=2):
            query, key, value = _heads_first(query_BLhd[part], kv_BT2hd[part])
            _matmul(key, (query * _log2_scale(query)).transpose(-1, -2), out=weights)
            most_BhSL = weights.amax(3)
            weights.sub_(most_BhSL[:, :, :, None]).exp2_()
            sum_BhSL = weights.sum(3)
            half_BhSL = torch.mul(weights, _columns(value, context_Shd), out=buffer).sum(3) / sum_BhSL
            gate = (gate_BGSL[part] + _per_gate(half_BhSL, gate_BGSL)).sigmoid().contiguous()
            weights *= (gate / sum_BhSL)[:, :, :, None]
            output_BLhd[part] = (_flat(weights, value.dtype).transpose(-1, -2) @ value).transpose(1, 2)
            kept.append((gate, half_BhSL, most_BhSL + sum_BhSL.log2()))
        ctx.save_for_backward(
            query_BLhd, kv_BT2hd, context_Shd, *(torch.cat(tensors) for tensors in zip(*kept, strict=True))
        )
        return output_BLhd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLhd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of Q, of K and V, of q, and of u."""
        query_BLhd, kv_BT2hd, context_Shd, gates, halves, normalisers = ctx.saved_tensors
        grad_query, grad_kv = torch.empty_like(query_BLhd), torch.empty_like(kv_BT2hd)
        grad_gate, grad_context = torch.empty_like(gates, dtype=grad_BLhd.dtype), torch.zeros_like(context_Shd)
        scale = query_BLhd.shape[-1] ** -0.5
        for part, (weights, scores, buffer) in _chunks(query_BLhd, kv_BT2hd, len(context_Shd), buffers=3):
            query, key, value = _heads_first(query_BLhd[part], kv_BT2hd[part])
            grad, gate = grad_BLhd[part].transpose(1, 2), gates[part]
            _matmul(key, (query * _log2_scale(query)).transpose(-1, -2), out=weights)
            weights.sub_(normalisers[part][:, :, :, None]).exp2_()
            _matmul(value, grad.transpose(-1, -2), out=scores)
            grad_a = torch.mul(weights, scores, out=buffer).sum(3)
            rest = _per_gate(grad_a, gate) * (1 - gate)
            grad_gate[part] = rest * gate
            weights *= gate[:, :, :, None]
            scores.addcmul_(_columns(value, context_Shd), rest[:, :, :, None])
            scores -= (grad_a + rest * halves[part])[:, :, :, None]
            scores *= weights
            grad_scores = _flat(scores, key.dtype)
            grad_query[part] = (grad_scores.transpose(-1, -2) @ key).mul_(scale).transpose(1, 2)
            grad_kv[part, :, 0] = (grad_scores @ query).mul_(scale).transpose(1, 2)
            grad_value = _flat(weights, grad.dtype) @ grad
            grad_columns = weights.mul_(rest[:, :, :, None]).sum(4)
            grad_value += (grad_columns[..., None] * context_Shd.transpose(0, 1)[:, :, None]).flatten(2, 3)
            grad_kv[part, :, 1] = grad_value.transpose(1, 2)
            by_level = value.unflatten(2, grad_columns.shape[2:]).to(grad_columns.dtype)
            grad_context += torch.einsum("bhsn,bhsnd->shd", grad_columns, by_level)
        return grad_query, grad_kv, grad_gate, grad_context


def _chunks(
    query_BLhd: Tensor, kv_BT2hd: Tensor, levels: int, buffers: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield slices of images, and for each the same buffers (B, h, S, N, L), in float32 at least.

    A buffer is at most `CHUNK_BYTES`, or one image's.
    """
    batch, length, heads, _ = query_BLhd.shape
    dtype = torch.promote_types(query_BLhd.dtype, torch.float32)
    shape = (heads, levels, kv_BT2hd.shape[1] // levels, length)
    size = min(batch, max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(shape))))
    memory = torch.empty((buffers, size, *shape), dtype=dtype, device=query_BLhd.device)
    for start in range(0, batch, size):
        yield slice(start, start + size), memory[:, : min(size, batch - start)].unbind(0)


def _heads_first(query_BLhd: Tensor, kv_BT2hd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (B, h, L, d), K and V (B, h, T, d)."""
    key, value = kv_BT2hd.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return query_BLhd.transpose(1, 2).contiguous(), key, value


def _log2_scale(query_BhLd: Tensor) -> float:
    """Return 1 / (sqrt(d) ln 2): a power of 2 of what it scales is the exponential of the scores."""
    return math.log2(math.e) * query_BhLd.shape[-1] ** -0.5


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the product of (B, h, T, d) and (B, h, d, L) into a buffer (B, h, S, N, L)."""
    if left.dtype == out.dtype:
        torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1).flatten(1, 2))
    else:
        out.copy_((left @ right).view_as(out))


def _flat(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, h, T, L) in the type that the matrix products are computed in."""
    return weights.flatten(2, 3).to(dtype)


def _columns(value_BhTd: Tensor, context_Shd: Tensor) -> Tensor:
    """Return V u, what a token adds to its level's gate, shape (B, h, S, N, 1)."""
    by_level = value_BhTd.unflatten(2, (len(context_Shd), -1)).to(context_Shd.dtype)
    return torch.einsum("bhsnd,shd->bhsn", by_level, context_Shd)[..., None]


def _per_gate(per_head_BhSL: Tensor, gate_BGSL: Tensor) -> Tensor:
    """Return the sum over heads where one gate serves them all."""
    return per_head_BhSL if gate_BGSL.shape[1] > 1 else per_head_BhSL.sum(1, keepdim=True)
