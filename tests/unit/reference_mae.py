"""A plain masked autoencoder from torch's own layers, to compare with; it reads the weights of a MemMCMAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memmc.model.attention import MLP, MemoryAttention
from memmc.model.mae import MemMCMAE


def attention(source: MemoryAttention, tokens: Tensor) -> Tensor:
    """torch's own multi-head attention with the source's weights."""
    sequence = tokens.transpose(0, 1)
    joint, out = source.query_key_value, source.projection
    attended, _ = nn.functional.multi_head_attention_forward(
        sequence, sequence, sequence, sequence.shape[-1], source.heads, joint.weight, joint.bias,
        None, None, False, 0.0, out.weight, out.bias, need_weights=False,
    )  # fmt: skip
    return attended.transpose(0, 1)


def block(source: nn.Module, tokens: Tensor) -> Tensor:
    tokens = tokens + attention(source.attention, source.norm_attention(tokens))
    mlp: MLP = source.mlp
    hidden = nn.functional.gelu(source.norm_mlp(tokens) @ mlp.expand.weight.T + mlp.expand.bias)
    return tokens + hidden @ mlp.contract.weight.T + mlp.contract.bias


def reference_mae(model: MemMCMAE, images: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and prediction, one image and one token at a time where that is clearer."""
    size, channels = model.patch_size, model.channels
    weight = model.encoder.embedding.weight.view(-1, size, size, channels).permute(0, 3, 1, 2)
    embedded = nn.functional.conv2d(images, weight, model.encoder.embedding.bias, stride=size)
    tokens = embedded.flatten(2).transpose(1, 2) + model.encoder.positions
    visible = torch.stack([tokens[image, ids_keep[image]] for image in range(len(images))])
    hidden = torch.cat([model.encoder.class_token.expand(len(images), 1, -1), visible], dim=1)
    for layer in model.encoder.blocks:
        hidden = block(layer, hidden)
    adapters = model.decoder.adapters
    hidden = nn.functional.layer_norm(
        hidden, hidden.shape[-1:], adapters.norm_weight.flatten(), adapters.norm_bias.flatten()
    )
    hidden = hidden @ adapters.weight[0] + adapters.bias[0]
    rows = []
    for image in range(len(images)):
        row = model.decoder.mask_token.repeat(model.num_patches, 1)
        row[ids_keep[image]] = hidden[image, 1:]
        rows.append(torch.cat([hidden[image, :1], row + model.decoder.positions]))
    hidden = torch.stack(rows)
    for layer in model.decoder.blocks:
        hidden = block(layer, hidden)
    pred = model.decoder.head(model.decoder.norm(hidden))[:, 1:]
    errors = []
    for image in range(len(images)):
        for patch in set(range(model.num_patches)) - set(ids_keep[image].tolist()):
            row, column = divmod(patch, model.image_size // size)
            tile = images[image, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            errors.append((pred[image, patch].view(size, size, channels).permute(2, 0, 1) - tile).square().mean())
    return torch.stack(errors).mean(), pred
