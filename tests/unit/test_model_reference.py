"""Every option of the model against the literal one, forwards and backwards, in float32 and float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from reference_model import chosen_levels, reference_model
from torch import Tensor

from memmc.config import ModelConfig
from memmc.model import gated_attention
from memmc.model.levels import level_indices
from memmc.model.mae import MemMCMAE
from memmc.model.masking import random_ids_keep

SIZES = {"encoder_dim": 24, "encoder_depth": 4, "encoder_heads": 3, "decoder_dim": 16, "decoder_depth": 2}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

OPTIONS = (
    [{"gate": gate, "levels": levels} for gate in ("channel", "head", "scalar") for levels in ("all", "every_3")]
    + [{"gate": gate, "decoder_self_attention": False} for gate in ("channel", "head", "scalar")]
    + [{"levels": "last"}, {"levels": "every_2"}, {"memory_slots": 0}, {"norm_pix_loss": True}]
    + [{"cross_attention": False}, {"cross_attention": False, "memory_slots": 0}]
    + [{"bottleneck_slots": 6, "cross_attention": False, "memory_slots": 0}, {"bottleneck_slots": 6, "gate": "head"}]
    + [{"mlp_ratio": 1.5, "mask_ratio": 0.4, "gate": "head"}]
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The literal model is thousands of tiny operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(image_size: int, channels: int, dtype: torch.dtype, **changes: object) -> MemMCMAE:
    """No parameter keeps a special value such as a zero bias."""
    torch.manual_seed(0)
    model = MemMCMAE(ModelConfig(**{**SIZES, "memory_slots": 5, "patch_size": 4, **changes}), image_size, channels)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def difference(model: MemMCMAE, batch: int = 2, literal: MemMCMAE | None = None) -> dict[str, float]:
    """Largest differences of prediction, loss and every gradient, relative where a value exceeds 1."""
    generator, literal = torch.Generator().manual_seed(1), literal or model
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, model.channels, model.image_size, model.image_size, generator=generator).to(dtype)
    ids = random_ids_keep(batch, model.num_patches, model.num_keep, generator)
    output = model(images, ids)
    loss, pred = reference_model(literal, images, ids)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(loss, list(literal.parameters()))
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: relative(mine, other) for name, mine, other in zip(names, ours, theirs, strict=True)}
    return {"pred": relative(output.pred_BLP, pred), "loss": relative(output.loss, loss), **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_every_option_equals_the_literal_model(changes: dict[str, object], dtype: torch.dtype) -> None:
    found = difference(build(16, 1, dtype, **changes))
    assert max(found.values()) <= TOLERANCE[dtype], max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("size", "patch", "channels", "batch"), [(8, 4, 3, 1), (15, 3, 2, 3), (20, 4, 1, 1)])
def test_every_size_equals_the_literal_model(size: int, patch: int, channels: int, batch: int) -> None:
    found = difference(build(size, channels, torch.float64, patch_size=patch, gate="head", mask_ratio=0.5), batch)
    assert max(found.values()) <= 1e-12, max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize("broken", ["gate_context_weight", "memory_value", "class_token"])
def test_the_comparison_notices_a_small_error(broken: str) -> None:
    """Control: the literal model gets one value that is off by 1e-3."""
    model = build(16, 1, torch.float32, gate="head")
    literal = copy.deepcopy(model)
    with torch.no_grad():
        next(tensor for name, tensor in literal.named_parameters() if broken in name).view(-1)[0] += 1e-3
    assert max(difference(model, literal=literal).values()) > 1e-5


@pytest.mark.parametrize("gate", ["head", "scalar"])
def test_chunks_change_nothing(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_attention, "CHUNK_BYTES", 1)
    found = difference(build(16, 1, torch.float64, gate=gate), batch=3)
    assert max(found.values()) <= 1e-12


@pytest.mark.parametrize("gate", ["head", "scalar"])
def test_the_form_for_gpus_and_traced_graphs_is_the_same(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert max(difference(build(16, 1, torch.float64, gate=gate)).values()) <= 1e-12


@pytest.mark.parametrize("gate", ["channel", "head", "scalar"])
def test_attention_weights_do_not_outlive_a_block(gate: str) -> None:
    """Control: a tensor of one number per query, token and head, kept for the backward pass, would be found."""
    model = build(32, 1, torch.float32, gate=gate, encoder_depth=8)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (sizes.append(saved.numel()), saved)[1], lambda x: x):
        model(torch.randn(2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    weights = 2 * model.config.decoder_heads * (1 + model.num_patches) * 8 * (1 + model.num_keep)
    assert weights not in sizes
    assert max(sizes) < weights


def kept_numbers(model: MemMCMAE) -> int:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (sizes.append(saved.numel()), saved)[1], lambda x: x):
        model(torch.randn(2, 1, 16, 16).double(), generator=torch.Generator().manual_seed(0))
    return sum(sizes)


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_recomputing_blocks_keep_less_and_give_the_same_gradients(gate: str) -> None:
    models = [build(16, 1, torch.float64, gate=gate, recompute=recompute) for recompute in (False, True)]
    assert max(difference(models[1]).values()) <= 1e-12
    assert kept_numbers(models[1]) < 0.4 * kept_numbers(models[0])


@pytest.mark.parametrize("levels", ["all", "last", "every_1", "every_2", "every_3", "every_5", "every_99"])
@pytest.mark.parametrize("depth", [1, 4, 6])
def test_levels_end_with_the_last(levels: str, depth: int) -> None:
    config = ModelConfig(levels=levels, encoder_depth=depth)
    indices = level_indices(config)
    assert [index + 1 for index in indices] == chosen_levels(config)
    assert indices[-1] == depth - 1


def test_every_1_is_all_and_a_long_stride_is_the_last() -> None:
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3, 5, 9]] * 2)
    losses = {levels: build(16, 1, torch.float32, levels=levels)(images, ids).loss for levels in ("all", "every_1")}
    assert torch.equal(losses["all"], losses["every_1"])
    losses = {levels: build(16, 1, torch.float32, levels=levels)(images, ids).loss for levels in ("last", "every_4")}
    assert torch.equal(losses["last"], losses["every_4"])
