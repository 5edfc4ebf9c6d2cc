"""The model folder: `model.safetensors` with the weights, `model.json` with everything needed to use them.

No pickle is ever read or written: a folder from anywhere is data, not code.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memmc.config import ModelConfig
from memmc.errors import ConfigError, ModelError
from memmc.model.digest import INFO_FILE, WEIGHTS_FILE, model_digest
from memmc.model.mae import MemMCMAE

FORMAT = 1


@dataclass(frozen=True)
class ModelInfo:
    """What a model must carry besides its weights.

    Attributes:
        image_size: side of the square input, px.
        channels: native channels of the input.
        pixel_mean: mean of the training pixels in [0, 1]; subtracted before the model.
        pixel_std: their standard deviation, above 0; divided by.
        preprocess_id: how pixels were prepared; others are refused when scoring.
        cohort: trained on this cohort.
        dataset_version: at this version of the instances table.
        steps: optimiser steps.
        train_seconds: wall time of the training loop, s.
        config_id: hash of the configuration tree.
        seed: of the run.
    """

    image_size: int
    channels: int
    pixel_mean: float
    pixel_std: float
    preprocess_id: str
    cohort: str
    dataset_version: int
    steps: int
    train_seconds: float
    config_id: str
    seed: int


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score: in eval mode, without gradients."""

    model: MemMCMAE
    config: ModelConfig
    info: ModelInfo
    digest: str


def export_model(folder: str | Path, model: MemMCMAE, info: ModelInfo | Mapping[str, Any]) -> str:
    """Write the model folder and return its digest.

    Each file appears whole or not at all; `model.json` comes last, so a folder with it is finished.

    Args:
        folder: made if absent.
        model: the averaged model.
        info: what goes into `model.json`; of a mapping the fields of `ModelInfo` are taken.

    Raises:
        ModelError: the weights hold NaN or infinity, or `info` lacks a field or does not describe `model`.
    """
    if not isinstance(info, ModelInfo):
        info = _info_of(info)
    if (info.image_size, info.channels) != (model.image_size, model.channels):
        raise ModelError(
            f"info says {info.image_size} px and {info.channels} channels, "
            f"the model takes {model.image_size} px and {model.channels}"
        )
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"{len(broken)} weight tensors hold NaN or infinity, first {broken[0]}; nothing was exported")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "model_config": model.config.model_dump(mode="json"),
        **{field.name: getattr(info, field.name) for field in fields(ModelInfo)},
        "versions": {name: metadata.version(name) for name in ("memmc", "torch", "safetensors")},
    }
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as aside:
        save_file(weights, Path(aside, WEIGHTS_FILE))
        Path(aside, INFO_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        for name in (WEIGHTS_FILE, INFO_FILE):
            os.replace(Path(aside, name), target / name)  # noqa: PTH105 - the atomic one
    return model_digest(target)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Read a model folder and refuse whatever is not exactly one.

    Args:
        folder: holds `model.safetensors` and `model.json`.
        device: where the weights go.

    Raises:
        ModelError: a file or key missing or unknown, another format, values of the wrong kind, weights that do not
            fit the configuration or are not finite.
    """
    digest = model_digest(folder)
    document = _read_info(Path(folder, INFO_FILE))
    config, info = _parse_info(document)
    try:
        model = MemMCMAE(config, info.image_size, info.channels)
        weights = load_file(Path(folder, WEIGHTS_FILE), device="cpu")
    except (ConfigError, SafetensorError, OSError) as error:
        raise ModelError(f"model folder cannot be loaded: {error}") from None
    _check_weights(weights, model.state_dict())
    model.load_state_dict(weights)
    return LoadedModel(model.to(device).eval().requires_grad_(False), config, info, digest)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{INFO_FILE} cannot be read ({type(error).__name__}); export the model again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ModelError(f"{INFO_FILE} has format {found!r}, this version reads {FORMAT}")
    return document


def _parse_info(document: Mapping[str, Any]) -> tuple[ModelConfig, ModelInfo]:
    """Check names and kinds of every field."""
    expected = {field.name for field in fields(ModelInfo)} | {"format", "model_config", "versions"}
    if set(document) != expected:
        odd = ", ".join(sorted(set(document) ^ expected))
        raise ModelError(f"{INFO_FILE}: missing or unknown keys: {odd}")
    info = _info_of(document)
    if not (-1e6 < info.pixel_mean < 1e6 and 0 < info.pixel_std < 1e6 and 0 < info.image_size <= 4096):
        raise ModelError(f"{INFO_FILE}: pixel_mean, pixel_std or image_size out of range")
    try:
        config = ModelConfig.model_validate(document["model_config"])
    except ValueError as error:
        raise ModelError(f"{INFO_FILE}: model_config does not validate: {error}") from None
    return config, info


def _info_of(document: Mapping[str, Any]) -> ModelInfo:
    values: dict[str, Any] = {}
    for field in fields(ModelInfo):
        if field.name not in document:
            raise ModelError(f"{INFO_FILE}: {field.name} is missing")
        value = document[field.name]
        kinds = {"int": (int,), "float": (int, float), "str": (str,)}[str(field.type)]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ModelError(f"{INFO_FILE}: {field.name} is {type(value).__name__}, expected {field.type}")
        values[field.name] = float(value) if field.type == "float" else value
    return ModelInfo(**values)


def _check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise ModelError(f"{WEIGHTS_FILE}: {len(odd)} tensors missing or unknown, first {odd[0]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ModelError(
                f"{WEIGHTS_FILE}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {expected[name].dtype} {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{WEIGHTS_FILE}: {name} holds NaN or infinity")
