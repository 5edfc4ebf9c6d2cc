"""The gated attention to several levels as plain operations, for export: no buffers, no chunks, any batch.

Shape legend: B images, h heads, L queries, S levels, N tokens of a level, T = S N, d width of a head, G gates (h or 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_level_attention(query_BLhd: Tensor, kv_BT2hd: Tensor, gate_BGLS: Tensor, context_Shd: Tensor) -> Tensor:
    """Return ``sum_l a_l P_l V_l``, shape (B, L, h, d): ``P_l = softmax(Q K_l^T / sqrt(d))``, ``a_l`` the gates.

    Args:
        query_BLhd: Q.
        kv_BT2hd: keys and values, level by level.
        gate_BGLS: the half of the gates that depends on the queries.
        context_Shd: u; the other half is ``P_l V_l u``, summed over heads where one gate serves all.
    """
    levels = gate_BGLS.shape[-1]
    key_BhSNd, value_BhSNd = (part.transpose(1, 2).unflatten(2, (levels, -1)) for part in kv_BT2hd.unbind(2))
    query_BhLd = query_BLhd.transpose(1, 2) * query_BLhd.shape[-1] ** -0.5
    weights = torch.einsum("bhld,bhsnd->bhlsn", query_BhLd, key_BhSNd).softmax(-1)
    contexts = torch.einsum("bhlsn,bhsnd->bhlsd", weights, value_BhSNd)
    half_BhLS = torch.einsum("bhlsd,shd->bhls", contexts, context_Shd)
    if gate_BGLS.shape[1] == 1:
        half_BhLS = half_BhLS.sum(1, keepdim=True)
    gates = (gate_BGLS + half_BhLS).sigmoid()
    return (gates[..., None] * contexts).sum(3).transpose(1, 2)
