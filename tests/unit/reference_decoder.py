"""Slow, literal multi-level cross-attention: level by level, head by head, as the equations stand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memmc.model.decoder import LevelCrossAttention


def heads_of_level(module: LevelCrossAttention, query_BLE: Tensor, level_BNE: Tensor) -> list[Tensor]:
    """c_lj for every head j, each (B, L, d)."""
    width = module.head_dim
    key_value = level_BNE @ module.key_value.weight.T + module.key_value.bias
    keys, values = key_value[..., : module.dim], key_value[..., module.dim :]
    queries = query_BLE @ module.query.weight.T + module.query.bias
    contexts = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(width)
        contexts.append(torch.softmax(scores, dim=-1) @ values[..., part])
    return contexts


def reference_cross_attention(module: LevelCrossAttention, query_BLE: Tensor, levels_BSNE: Tensor) -> Tensor:
    total = torch.zeros_like(query_BLE)
    for level in range(module.levels):
        contexts = heads_of_level(module, query_BLE, levels_BSNE[:, level])
        projected = torch.cat(contexts, dim=-1) @ module.projection.weight.T
        if module.levels == 1:
            total = total + projected
            continue
        num_gates = module.gate_query.out_features // module.levels
        rows = slice(level * num_gates, (level + 1) * num_gates)
        query_half = query_BLE @ module.gate_query.weight[rows].T + module.gate_query.bias[rows]
        weight = module.gate_context_weight[level]
        if module.gate == "channel":
            gate = torch.sigmoid(query_half + projected @ weight.T)
            total = total + gate * projected
        elif module.gate == "scalar":
            gate = torch.sigmoid(query_half + sum(c @ w for c, w in zip(contexts, weight, strict=True))[..., None])
            total = total + gate * projected
        else:
            for head, context in enumerate(contexts):
                gate = torch.sigmoid(query_half[..., head] + context @ weight[head])[..., None]
                part = slice(head * module.head_dim, (head + 1) * module.head_dim)
                total = total + gate * (context @ module.projection.weight[:, part].T)
    return total / math.sqrt(module.levels)
