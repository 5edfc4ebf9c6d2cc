"""Patches, masks, memory attention and the measures of its use."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from memmc.config import ModelConfig
from memmc.errors import ConfigError
from memmc.model.attention import MemoryAttention
from memmc.model.mae import MemMCMAE
from memmc.model.masking import gather_tokens, mask_from_ids_keep, num_kept, random_ids_keep
from memmc.model.memory_usage import memory_ablated, memory_usage
from memmc.model.patches import grid_side, patchify, sincos_positions, unpatchify


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 2), (3, 12, 4), (2, 10, 5)])
def test_patchify_round_trip_and_order(channels: int, size: int, patch: int) -> None:
    images = torch.arange(2 * channels * size * size, dtype=torch.float32).view(2, channels, size, size)
    patches = patchify(images, patch)
    assert torch.equal(unpatchify(patches, patch, channels), images)
    expected = images[1, :, 0:patch, patch : 2 * patch].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, 1], expected)


def test_positions_are_distinct_bounded_and_separable() -> None:
    positions = sincos_positions(32, 8)
    assert positions.shape == (64, 32)
    assert positions.abs().max() <= 1.0
    assert torch.cdist(positions, positions).fill_diagonal_(1.0).min() > 0.1
    grid = positions.view(8, 8, 32)
    assert torch.equal(grid[3, 0, :16], grid[3, 7, :16])
    assert torch.equal(grid[0, 5, 16:], grid[6, 5, 16:])
    angle = 3 * 10_000.0 ** (-1 / 8)
    assert grid[3, 0, 1].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert grid[3, 0, 9].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_positions_and_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        sincos_positions(30, 4)
    with pytest.raises(ConfigError, match="image side 65"):
        grid_side(65, 8)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(64, 0.75, 16), (196, 0.75, 49), (10, 0.7, 3), (100, 0.8, 20), (64, 0.9, 6)]
)
def test_number_of_kept_patches(patches: int, ratio: float, kept: int) -> None:
    assert num_kept(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [0.999, 0.001])
def test_a_mask_must_keep_some_and_remove_some(ratio: float) -> None:
    if ratio < 0.5:
        assert num_kept(64, ratio) == 63
        return
    with pytest.raises(ConfigError, match="keeps 0 of 64"):
        num_kept(64, ratio)


def test_random_masks_are_distinct_uniform_and_seeded() -> None:
    ids = random_ids_keep(4000, 20, 5, torch.Generator().manual_seed(0))
    assert ids.shape == (4000, 5)
    assert (ids.diff(dim=1) > 0).all()
    assert torch.equal(ids, random_ids_keep(4000, 20, 5, torch.Generator().manual_seed(0)))
    assert len({tuple(row) for row in ids.tolist()}) > 3000
    share = torch.bincount(ids.flatten(), minlength=20) / 4000
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_mask_is_one_where_removed() -> None:
    mask = mask_from_ids_keep(torch.tensor([[1, 3], [0, 2]]), 4)
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    tokens = torch.arange(8.0).view(2, 4, 1)
    assert gather_tokens(tokens, torch.tensor([[3, 1], [0, 2]])).flatten().tolist() == [3, 1, 4, 6]


def randomised_attention(slots: int) -> MemoryAttention:
    torch.manual_seed(0)
    return MemoryAttention(24, 3, slots)


def test_without_slots_it_is_scaled_dot_product_attention() -> None:
    attention = randomised_attention(0)
    tokens = torch.randn(2, 7, 24)
    query, key, value = (
        part.view(2, 7, 3, 8).transpose(1, 2) for part in attention.query_key_value(tokens).chunk(3, dim=-1)
    )
    plain = attention.projection(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 7, 24))
    assert torch.equal(attention(tokens), plain)
    assert not [name for name, _ in attention.named_parameters() if "memory" in name]


def test_slots_are_joined_behind_the_projections() -> None:
    attention = randomised_attention(4)
    tokens = torch.randn(2, 5, 24)
    query, key, value = attention.query_key_value(tokens).chunk(3, dim=-1)
    heads = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        keys = torch.cat([key[..., part], (attention.memory_key[head] * math.sqrt(8)).expand(2, 4, 8)], dim=1)
        values = torch.cat([value[..., part], (attention.memory_value[head] * 2.0).expand(2, 4, 8)], dim=1)
        weights = (query[..., part] @ keys.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        assert weights.shape == (2, 5, 9)
        heads.append(weights @ values)
    torch.testing.assert_close(attention(tokens), attention.projection(torch.cat(heads, -1)), atol=1e-5, rtol=1e-5)


def test_slots_start_with_the_stated_deviations() -> None:
    torch.manual_seed(0)
    attention = MemoryAttention(512, 8, 200)
    _, key, value = attention.project(torch.randn(1, 3, 512))
    assert key[0, :, 3:].std().item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert value[0, :, 3:].std().item() == pytest.approx(1 / math.sqrt(200), rel=0.02)


def model_with(slots: int) -> MemMCMAE:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder_dim=32, encoder_depth=2, encoder_heads=4, decoder_dim=16, decoder_depth=1, memory_slots=slots
    )
    return MemMCMAE(config, 32).eval()


def usage_of(model: MemMCMAE) -> list:
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return memory_usage(model, images, random_ids_keep(4, 16, 4, torch.Generator().manual_seed(0)))


def test_memory_usage_without_memory_is_empty() -> None:
    assert usage_of(model_with(0)) == []


def test_memory_usage_of_one_loud_slot() -> None:
    model = model_with(6)
    fresh = usage_of(model)
    assert [layer.num_slots for layer in fresh] == [24, 24]
    assert fresh[0].uniform_mass == pytest.approx(6 / 11)
    assert fresh[0].mass == pytest.approx(6 / 11, abs=0.15)
    assert fresh[0].slots_used == 24
    assert fresh[0].entropy > 0.95
    attention = model.encoder.blocks[0].attention
    with torch.no_grad():
        attention.query_key_value.weight.zero_()
        attention.query_key_value.bias.fill_(1.0)
        attention.memory_key.fill_(-9.0)
        attention.memory_key[:, 2] = 9.0
    loud = usage_of(model)[0]
    assert loud.mass > 0.99
    assert loud.slots_used == 4
    assert loud.entropy < 0.05


def test_ablation_takes_the_memory_away_and_gives_it_back() -> None:
    model = model_with(6)
    images = torch.randn(2, 1, 32, 32)
    ids = torch.tensor([[0, 3, 5, 9]] * 2)
    with torch.no_grad():
        before = model(images, ids).pred_BLP
        with memory_ablated(model):
            without = model(images, ids).pred_BLP
        after = model(images, ids).pred_BLP
    assert torch.equal(before, after)
    assert (before - without).abs().max() > 1e-4
    assert sum("memory" in name for name, _ in model.named_parameters()) == 4
