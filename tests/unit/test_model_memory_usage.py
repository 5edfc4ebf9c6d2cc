"""Gates of the levels as measured, and levels shut off."""

from __future__ import annotations

import pytest
import torch

from memmc.config import ModelConfig
from memmc.model.decoder import LevelCrossAttention
from memmc.model.mae import MemMCMAE
from memmc.model.masking import random_ids_keep
from memmc.model.memory_usage import gate_means, levels_ablated

SIZES = {"encoder_dim": 32, "encoder_depth": 3, "encoder_heads": 2, "decoder_dim": 16, "decoder_depth": 2}
GATES = pytest.mark.parametrize("gate", ["channel", "head", "scalar"])


def build(gate: str, **changes: object) -> tuple[MemMCMAE, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = MemMCMAE(ModelConfig(**{**SIZES, "decoder_heads": 2, "gate": gate, **changes}), 32).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, torch.randn(3, 1, 32, 32), random_ids_keep(3, 16, 4, torch.Generator().manual_seed(0))


@GATES
def test_gate_means_follow_the_biases_of_the_levels(gate: str) -> None:
    model, images, ids = build(gate)
    before = gate_means(model, images, ids)
    assert len(before) == 3
    assert all(0.2 < mean < 0.8 for mean in before)
    for layer in model.decoder.modules():
        if isinstance(layer, LevelCrossAttention):
            with torch.no_grad():
                layer.gate_query.bias.view(3, -1)[1] = 30.0
    after = gate_means(model, images, ids)
    assert after[1] == pytest.approx(1.0, abs=1e-2)
    assert abs(after[0] - before[0]) < 0.3


@GATES
def test_gate_means_are_those_the_model_applies(gate: str) -> None:
    """With all contexts equal to one vector, what passes a level is its gate's share of it."""
    model, images, ids = build(gate, decoder_depth=1)
    layer = next(m for m in model.decoder.modules() if isinstance(m, LevelCrossAttention))
    with torch.no_grad():
        layer.key_value.weight.zero_()  # values are the bias, whatever the level says
        layer.projection.weight.copy_(torch.eye(16))
        layer.key_value.bias[16:] = 1.0
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(images, ids)
    handle.remove()
    means = gate_means(model, images, ids)
    assert seen[0].mean().item() == pytest.approx(sum(means) * 3**-0.5, abs=1e-4)


@GATES
def test_shut_levels_change_nothing_that_follows_from_them(gate: str) -> None:
    model, images, ids = build(gate)
    with torch.no_grad():
        whole = model(images, ids).pred_BLP
        with levels_ablated(model):
            assert gate_means(model, images, ids)[:2] == pytest.approx([0.0, 0.0], abs=1e-6)
            last_only = model(images, ids).pred_BLP
            levels = model.encode(model.patchify(images), ids)
            spoiled = [torch.randn_like(levels[0]), torch.randn_like(levels[1]), levels[2]]
            torch.testing.assert_close(model.decode(spoiled, ids), last_only)
        assert not torch.allclose(whole, last_only, atol=1e-3)
        assert torch.equal(model(images, ids).pred_BLP, whole)


def test_a_single_level_has_no_gates() -> None:
    model, images, ids = build("head", levels="last")
    assert gate_means(model, images, ids) == []
    with levels_ablated(model):
        pass
