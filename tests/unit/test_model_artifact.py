"""The model folder: round trip, and a refusal for everything that is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memmc.config import ModelConfig
from memmc.errors import ModelError
from memmc.model.artifact import ModelInfo, export_model, load_model, model_digest
from memmc.model.mae import MemMCMAE

CONFIG = ModelConfig(
    encoder_dim=16, encoder_depth=2, encoder_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2, memory_slots=3
)
INFO = ModelInfo(32, 1, 0.5, 0.25, "a" * 16, "c1", 3, 100, 12.5, "b" * 16, 0)


@pytest.fixture
def model() -> MemMCMAE:
    torch.manual_seed(0)
    return MemMCMAE(CONFIG, 32)


@pytest.fixture
def folder(tmp_path: Path, model: MemMCMAE) -> Path:
    export_model(tmp_path / "m", model, INFO)
    return tmp_path / "m"


def test_round_trip(folder: Path, model: MemMCMAE) -> None:
    loaded = load_model(folder)
    assert (loaded.info, loaded.config, loaded.digest) == (INFO, CONFIG, model_digest(folder))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    images, ids = torch.randn(2, 1, 32, 32), torch.tensor([[0, 1, 2, 3]] * 2)
    assert torch.equal(loaded.model(images, ids).pred_BLP, model(images, ids).pred_BLP)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_digest_names_the_content(folder: Path, model: MemMCMAE, tmp_path: Path) -> None:
    first = model_digest(folder)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert export_model(tmp_path / "same", model, INFO) == first
    with torch.no_grad():
        model.decoder.mask_token[0] += 1e-3
    assert export_model(tmp_path / "other", model, INFO) != first


def edit(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format 2"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"seed": None}, "keys: seed"),
        ({"pixel_std": 0.0}, "out of range"),
        ({"pixel_mean": float("nan")}, "out of range"),
        ({"pixel_mean": "0.5"}, "pixel_mean is str"),
        ({"steps": True}, "steps is bool"),
        ({"image_size": 33}, "multiple of the patch side"),
        ({"image_size": 1 << 30}, "out of range"),
        ({"model_config": {"nonsense": 1}}, "model_config does not validate"),
        ({"model_config": {"encoder_dim": 24, "encoder_heads": 2}}, "tensors missing or unknown"),
    ],
)
def test_odd_information_is_refused(folder: Path, changes: dict[str, object], text: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=text):
        load_model(folder)


def test_broken_files_are_refused(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.json cannot be read"):
        load_model(folder)
    (folder / "model.json").unlink()
    with pytest.raises(ModelError, match=r"without a readable model\.json"):
        load_model(folder)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "nan"])
def test_odd_weights_are_refused(folder: Path, fault: str) -> None:
    weights = load_file(folder / "model.safetensors")
    token = weights.pop("decoder.mask_token")
    changed = {
        "missing": {},
        "extra": {"decoder.mask_token": token, "extra": token},
        "shape": {"decoder.mask_token": token[:4]},
        "dtype": {"decoder.mask_token": token.double()},
        "nan": {"decoder.mask_token": token * float("nan")},
    }[fault]
    save_file({**weights, **{k: v.clone() for k, v in changed.items()}}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(folder)


def test_export_refuses_broken_weights_and_leaves_nothing(tmp_path: Path, model: MemMCMAE) -> None:
    with torch.no_grad():
        model.encoder.class_token[0] = float("inf")
    with pytest.raises(ModelError, match=r"first encoder\.class_token"):
        export_model(tmp_path / "m", model, INFO)
    assert not (tmp_path / "m").exists()
