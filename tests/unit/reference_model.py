"""The whole MemMC-MAE as its equations stand: one image, one level, one head, one patch at a time.

Reads the weights of a `MemMCMAE` and none of its code.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from memmc.config import ModelConfig
from memmc.model.mae import MemMCMAE


def norm(source: nn.LayerNorm, tokens: Tensor) -> Tensor:
    return standardised(tokens) * source.weight + source.bias


def standardised(tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def linear(source: nn.Linear, tokens: Tensor) -> Tensor:
    product = tokens @ source.weight.T
    return product if source.bias is None else product + source.bias


def softmax(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.max(-1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def self_attention(source: nn.Module, tokens: Tensor) -> Tensor:
    """``Attn(X) = softmax(Q [K; M_K]^T / sqrt(d)) [V; M_V]`` of one image's tokens (N, D)."""
    dim, heads = tokens.shape[1], source.heads
    width = dim // heads
    query, key, value = linear(source.query_key_value, tokens).split(dim, dim=1)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        keys, values = key[:, part], value[:, part]
        if source.memory_key is not None:
            keys = torch.cat([keys, math.sqrt(width) * source.memory_key[head]])
            values = torch.cat([values, math.sqrt(source.memory_slots) * source.memory_value[head]])
        outputs.append(softmax(query[:, part] @ keys.T / math.sqrt(width)) @ values)
    return linear(source.projection, torch.cat(outputs, dim=1))


def cross_attention(source: nn.Module, query: Tensor, levels: list[Tensor]) -> Tensor:
    """``(1/sqrt(S)) sum_l a_l * C_l`` of one image: query (L, E), S levels (N, E)."""
    dim, heads, number = query.shape[1], source.heads, len(levels)
    width = dim // heads
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    queries, output = linear(source.query, query), source.projection.weight
    total = torch.zeros_like(query)
    for index, level in enumerate(levels):
        keys, values = linear(source.key_value, level).split(dim, dim=1)
        contexts = [softmax(queries[:, part] @ keys[:, part].T / math.sqrt(width)) @ values[:, part] for part in parts]
        projected = torch.cat(contexts, dim=1) @ output.T
        if number == 1:
            return projected
        gates = source.gate_query.out_features // number
        rows = slice(index * gates, (index + 1) * gates)
        query_half = query @ source.gate_query.weight[rows].T + source.gate_query.bias[rows]
        weight = source.gate_context_weight[index]
        if source.gate == "channel":
            joint = torch.cat([source.gate_query.weight[rows], weight], dim=1)
            gate = torch.cat([query, projected], dim=1) @ joint.T + source.gate_query.bias[rows]
            total = total + torch.sigmoid(gate) * projected
        elif source.gate == "scalar":
            context_half = torch.cat(contexts, dim=1) @ weight.flatten()
            total = total + torch.sigmoid(query_half + context_half[:, None]) * projected
        else:
            for head, part in enumerate(parts):
                gate = torch.sigmoid(query_half[:, head] + contexts[head] @ weight[head])
                total = total + gate[:, None] * (contexts[head] @ output[:, part].T)
    return total / math.sqrt(number)


def mlp(source: nn.Module, tokens: Tensor) -> Tensor:
    hidden = linear(source.expand, tokens)
    return linear(source.contract, 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def read_bottleneck(slots: Tensor, tokens: Tensor) -> Tensor:
    rows = []
    for token in tokens:
        cosines = torch.stack([token @ slot / (token.norm() * slot.norm()) for slot in slots])
        weights = softmax(cosines)
        kept = torch.where(weights > 1 / len(slots), weights, torch.zeros_like(weights))
        rows.append((kept / kept.sum()) @ slots)
    return torch.stack(rows)


def chosen_levels(config: ModelConfig) -> list[int]:
    """Counted from 1, as X_1 .. X_S."""
    depth = config.encoder_depth
    if not config.cross_attention or config.levels == "last":
        return [depth]
    if config.levels == "all":
        return list(range(1, depth + 1))
    stride = int(config.levels.split("_")[1])
    return [level for level in range(1, depth + 1) if (depth - level) % stride == 0]


def encode(model: MemMCMAE, patches: Tensor, keep: list[int]) -> list[Tensor]:
    encoder = model.encoder
    visible = [linear(encoder.embedding, patches[patch]) + encoder.positions[patch] for patch in keep]
    tokens, levels = torch.stack([encoder.class_token, *visible]), []
    for block in encoder.blocks:
        tokens = tokens + self_attention(block.attention, norm(block.norm_attention, tokens))
        tokens = tokens + mlp(block.mlp, norm(block.norm_mlp, tokens))
        levels.append(tokens)
    if model.config.bottleneck_slots:
        levels[-1] = read_bottleneck(encoder.bottleneck.memory_slots, levels[-1])
    return levels


def decode(model: MemMCMAE, levels: list[Tensor], keep: list[int]) -> Tensor:
    decoder, config, adapted = model.decoder, model.config, []
    for index, level in enumerate(chosen_levels(config)):
        source = SimpleNamespace(weight=decoder.adapters.norm_weight[index], bias=decoder.adapters.norm_bias[index])
        tokens = norm(source, levels[level - 1])
        adapted.append(tokens @ decoder.adapters.weight[index] + decoder.adapters.bias[index])
    rows = [adapted[-1][0]]
    for patch in range(model.num_patches):
        token = adapted[-1][1 + keep.index(patch)] if patch in keep else decoder.mask_token
        rows.append(token + decoder.positions[patch])
    tokens = torch.stack(rows)
    for block in decoder.blocks:
        if config.decoder_self_attention:
            tokens = tokens + self_attention(block.attention, norm(block.norm_attention, tokens))
        if config.cross_attention:
            tokens = tokens + cross_attention(block.cross_attention, norm(block.norm_cross_attention, tokens), adapted)
        tokens = tokens + mlp(block.mlp, norm(block.norm_mlp, tokens))
    prediction = linear(decoder.head, norm(decoder.norm, tokens[1:]))
    if config.decoder_self_attention:
        return prediction
    removed = [patch not in keep for patch in range(model.num_patches)]
    return prediction * torch.tensor(removed)[:, None]


def reference_model(model: MemMCMAE, images: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the prediction (B, L, P)."""
    size, errors, predictions = model.patch_size, [], []
    for image, ids in zip(images, ids_keep.tolist(), strict=True):
        patches = []
        for row in range(0, image.shape[1], size):
            for column in range(0, image.shape[2], size):
                patches.append(image[:, row : row + size, column : column + size].permute(1, 2, 0).flatten())
        prediction = decode(model, encode(model, torch.stack(patches), ids), ids)
        for patch in set(range(model.num_patches)) - set(ids):
            target = patches[patch]
            if model.config.norm_pix_loss:
                variance = (target - target.mean()).square().sum() / (len(target) - 1)
                target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
            errors.append((prediction[patch] - target).square().mean())
        if model.config.norm_pix_loss:
            stacked = torch.stack(patches)
            prediction = prediction * torch.sqrt(stacked.var(1, keepdim=True) + 1e-6) + stacked.mean(1, keepdim=True)
        predictions.append(prediction)
    return torch.stack(errors).mean(), torch.stack(predictions)
