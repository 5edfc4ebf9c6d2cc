"""The fast decoder is the literal one, and its special cases are plain attention."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_decoder import reference_cross_attention
from torch.nn.functional import multi_head_attention_forward

from memmc.config import ModelConfig
from memmc.errors import ConfigError
from memmc.model.decoder import Decoder, LevelAdapters, LevelCrossAttention
from memmc.model.masking import random_ids_keep

DIM, HEADS, LENGTH, SLOTS = 24, 4, 11, 6


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No parameter keeps a special value such as a zero bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def inputs(levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, LENGTH, DIM, generator=generator)
    return query.requires_grad_(), torch.randn(3, levels, SLOTS, DIM, generator=generator).requires_grad_()


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("gate", ["channel", "head", "scalar"])
def test_equals_the_literal_loop_forwards_and_backwards(gate: str, levels: int) -> None:
    fast = randomised(LevelCrossAttention(DIM, HEADS, levels, gate))
    slow = copy.deepcopy(fast)
    results = []
    for module, function in ((fast, fast.__call__), (slow, lambda q, x: reference_cross_attention(slow, q, x))):
        query, context = inputs(levels)
        output = function(query, context)
        output.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"output": output, "query": query.grad, "levels": context.grad, **gradients})
    for name, expected in results[1].items():
        scale = expected.abs().max().clamp_min(1.0)
        assert (results[0][name] - expected).abs().max() / scale <= 1e-5, name


def test_one_level_equals_plain_cross_attention() -> None:
    module = randomised(LevelCrossAttention(DIM, HEADS, 1, "channel"))
    query, levels = inputs(1)
    expected, _ = multi_head_attention_forward(
        query.transpose(0, 1), levels[:, 0].transpose(0, 1), levels[:, 0].transpose(0, 1), DIM, HEADS,
        torch.cat([module.query.weight, module.key_value.weight]),
        torch.cat([module.query.bias, module.key_value.bias]),
        None, None, False, 0.0, module.projection.weight, None, need_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(module(query, levels), expected.transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["channel", "head", "scalar"])
def test_closed_gate_drops_its_level_and_no_other(gate: str) -> None:
    module = randomised(LevelCrossAttention(DIM, HEADS, 3, gate))
    num_gates = module.gate_query.out_features // 3
    with torch.no_grad():
        module.gate_query.bias[num_gates : 2 * num_gates] = -1e4
    query, levels = inputs(3)
    before = module(query, levels)
    changed = levels.detach().clone()
    changed[:, 1] += 5.0
    torch.testing.assert_close(module(query, changed), before)
    changed[:, 2] += 5.0
    assert (module(query, changed) - before).abs().max() > 1e-3


def test_adapters_equal_a_norm_and_linear_per_level() -> None:
    adapters = randomised(LevelAdapters(3, 20, DIM))
    levels = [torch.randn(2, SLOTS, 20, generator=torch.Generator().manual_seed(n)) * 4 for n in range(3)]
    adapted = adapters(levels)
    for number, level in enumerate(levels):
        normed = (level - level.mean(-1, keepdim=True)) / (level.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        normed = normed * adapters.norm_weight[number] + adapters.norm_bias[number]
        torch.testing.assert_close(
            adapted[number], normed @ adapters.weight[number] + adapters.bias[number], atol=1e-5, rtol=1e-5
        )


def test_input_has_the_last_level_where_visible_and_mask_tokens_elsewhere() -> None:
    decoder = randomised(Decoder(ModelConfig(decoder_dim=DIM, decoder_heads=HEADS, encoder_depth=2), 16, 4))
    ids = random_ids_keep(2, 16, 5, torch.Generator().manual_seed(0))
    last = torch.randn(2, 6, DIM)
    placed = decoder.place(last, ids)
    torch.testing.assert_close(placed[:, 0], last[:, 0])
    for image in range(2):
        for patch in range(16):
            where = (ids[image] == patch).nonzero()
            token = last[image, 1 + int(where)] if len(where) else decoder.mask_token
            torch.testing.assert_close(placed[image, 1 + patch], token + decoder.positions[patch])


def test_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="25 is not a multiple of 4"):
        LevelCrossAttention(25, 4, 2, "head")
