"""Optimiser, schedule, average, augmentation and checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from memmc.config import ModelConfig, TrainConfig
from memmc.errors import IntegrityError, ModelError
from memmc.model.mae import MemMCMAE
from memmc.training.augment import augment, random_affines, standardise
from memmc.training.checkpoint import RunState, collect, load_checkpoint, save_checkpoint
from memmc.training.optim import WeightAverage, learning_rate, make_optimizer, set_learning_rate
from memmc.training.order import Position

MODEL = ModelConfig(
    encoder_dim=16, encoder_depth=2, encoder_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2, memory_slots=3
)
STATE = RunState(step=2, position=Position(8, ((0, 2), (4, 1))), elapsed_s=3.5, seed=4, losses=(0.5, 0.25))


def build(seed: int = 0) -> tuple[MemMCMAE, WeightAverage, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = MemMCMAE(MODEL, 32)
    return model, WeightAverage(model, 0.9), make_optimizer(model, TrainConfig())


def stepped(seed: int = 0) -> tuple[MemMCMAE, WeightAverage, torch.optim.AdamW]:
    model, average, optimizer = build(seed)
    set_learning_rate(optimizer, 1e-2)
    for number in range(2):
        images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(images, torch.tensor([[0, 5, 9, 14]] * 2)).loss.backward()
        optimizer.step()
        average.update(model)
    return model, average, optimizer


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(base_lr=1e-3, warmup=0.1)
    assert learning_rate(0.0, config, 512) == 0.0
    assert learning_rate(0.05, config, 512) == pytest.approx(1e-3)
    assert learning_rate(0.1, config, 512) == pytest.approx(2e-3)
    assert learning_rate(0.55, config, 512) == pytest.approx(1e-3)
    assert learning_rate(1.0, config, 512) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(7.0, config, 512) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(0.1 + step / 100, config, 512) for step in range(90)]
    assert rates == sorted(rates, reverse=True)


def test_average_follows_its_formula() -> None:
    model, average, _ = build()
    expected = model.decoder.mask_token.detach().clone()
    for number in range(1, 200):
        with torch.no_grad():
            model.decoder.mask_token += 0.1
        average.update(model)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.decoder.mask_token.detach()
    torch.testing.assert_close(average.model.decoder.mask_token.data, expected)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not average.model.training


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_standardise_maps_the_stored_range(bits: int, dtype: type) -> None:
    top = 2**bits - 1
    pixels = np.array([0, top, top // 3, 1], dtype=dtype).reshape(1, 2, 2, 1)
    images = standardise(pixels, bits=bits, pixel_mean=0.4, pixel_std=0.2, device=torch.device("cpu"))
    expected = (pixels.astype(np.float64) / top - 0.4) / 0.2
    assert images.shape == (1, 1, 2, 2)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[0, 0].numpy(), expected[0, :, :, 0], atol=1e-6)
    same = standardise(torch.from_numpy(pixels), bits=bits, pixel_mean=0.4, pixel_std=0.2, device=torch.device("cpu"))
    assert torch.equal(same, images)


def test_standardise_takes_read_only_buffers_and_colour() -> None:
    pixels = np.frombuffer(bytes(range(24)), dtype=np.uint8).reshape(2, 2, 2, 3)
    images = standardise(pixels, bits=8, pixel_mean=0.0, pixel_std=1.0, device=torch.device("cpu"))
    assert images.is_contiguous()
    assert images[1, 2, 0, 1].item() == pytest.approx(pixels[1, 0, 1, 2] / 255)


def test_no_crop_and_no_turn_is_the_identity() -> None:
    images = torch.randn(3, 2, 16, 16)
    same = augment(images, 1.0, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=1e-5)


def test_crops_stay_inside_the_image_and_within_their_bounds() -> None:
    affines = random_affines(2000, 0.7, 0.0, torch.Generator().manual_seed(0))
    width, height = affines[:, 0, 0], affines[:, 1, 1]
    assert ((width * height) >= 0.7 * 0.9).all()
    assert (width / height).max() <= 1.1 + 1e-5
    assert (affines[:, 0, 2].abs() + width <= 1.0 + 1e-5).all()
    assert (affines[:, 1, 2].abs() + height <= 1.0 + 1e-5).all()
    assert affines[:, 0, 2].std() > 0.03
    turned = random_affines(2000, 0.7, 5.0, torch.Generator().manual_seed(0))
    angle = torch.atan2(turned[:, 1, 0] / turned[:, 0, 0] * 1.0, torch.ones(2000))
    assert angle.abs().max() <= math.radians(5.0) + 1e-6
    assert angle.abs().max() > math.radians(4.5)


def test_augment_never_mirrors_and_is_seeded() -> None:
    ramp = torch.linspace(-1, 1, 32).expand(8, 1, 32, 32).contiguous()
    moved = augment(ramp, 0.7, 5.0, torch.Generator().manual_seed(3))
    assert (moved[:, 0, 16, 24] > moved[:, 0, 16, 8]).all()
    assert torch.equal(moved, augment(ramp, 0.7, 5.0, torch.Generator().manual_seed(3)))
    assert not torch.equal(moved[0], moved[1])
    assert moved.min() >= -1.0 - 1e-6
    assert moved.max() <= 1.0 + 1e-6


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model, average, optimizer = stepped()
    save_checkpoint(tmp_path / "c", collect(model, average, optimizer), STATE)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "average.safetensors",
        "optimizer.safetensors",
        "selected.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    other, other_average, other_optimizer = build(1)
    assert load_checkpoint(tmp_path / "c", other, other_average, other_optimizer) == (STATE, {})
    assert other_average.updates == average.updates
    for mine, theirs in ((model, other), (average.model, other_average.model)):
        for (name, value), found in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(value, found), name
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert set(optimizer.state[mine]) == set(other_optimizer.state[theirs]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, other_optimizer.state[theirs][key])


def test_second_save_replaces_the_first(tmp_path: Path) -> None:
    for seed in range(2):
        model, average, optimizer = stepped(seed)
        save_checkpoint(tmp_path, collect(model, average, optimizer), STATE)
    other, other_average, other_optimizer = build(5)
    load_checkpoint(tmp_path, other, other_average, other_optimizer)
    assert torch.equal(other.decoder.mask_token, model.decoder.mask_token)


@pytest.mark.parametrize("name", ["weights.safetensors", "average.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_noticed_and_changes_nothing(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, collect(*stepped()), STATE)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    model, average, optimizer = build(1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path, model, average, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_checkpoint_is_of_its_model_whatever_memory_it_takes_and_whatever_settings_came_later(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, collect(*stepped()), STATE)
    document = json.loads((tmp_path / "state.json").read_text())
    assert document["model"]["config"].pop("bottleneck_slots") == 0
    (tmp_path / "state.json").write_text(json.dumps(document))
    torch.manual_seed(1)
    lean = MemMCMAE(MODEL.model_copy(update={"recompute": True}), 32)
    average, optimizer = WeightAverage(lean, 0.9), make_optimizer(lean, TrainConfig())
    assert load_checkpoint(tmp_path, lean, average, optimizer) == (STATE, {})
    save_checkpoint(tmp_path, collect(lean, average, optimizer), STATE)
    assert load_checkpoint(tmp_path, *build()) == (STATE, {})
    for odd in ({"of_a_later_version": 1}, {"bottleneck_slots": 2}):
        config = {**document["model"]["config"], **odd}
        (tmp_path / "state.json").write_text(json.dumps({**document, "model": {**document["model"], "config": config}}))
        with pytest.raises(ModelError, match="another model configuration"):
            load_checkpoint(tmp_path, *build())


def test_unfinished_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without a readable state\.json"):
        load_checkpoint(tmp_path, *build())
    save_checkpoint(tmp_path, collect(*stepped()), STATE)
    torch.manual_seed(0)
    wider = MemMCMAE(MODEL.model_copy(update={"memory_slots": 4}), 32)
    with pytest.raises(ModelError, match="another model configuration"):
        load_checkpoint(tmp_path, wider, WeightAverage(wider, 0.9), make_optimizer(wider, TrainConfig()))
    document = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(document | {"format": 9}))
    with pytest.raises(ModelError, match="format 2"):
        load_checkpoint(tmp_path, *build())
    (tmp_path / "state.json").write_text(json.dumps(document))
    (tmp_path / "average.safetensors").unlink()
    with pytest.raises(ModelError, match=r"average\.safetensors cannot be read"):
        load_checkpoint(tmp_path, *build())
