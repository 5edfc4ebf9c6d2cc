"""Checkpoints of a run in progress: safetensors and JSON only, verified when read.

A checkpoint is a folder with `weights.safetensors`, `average.safetensors`, `optimizer.safetensors`,
`selected.safetensors` (the best average so far; empty without a selection) and, written last, `state.json` with the
counters, the position in the data and the SHA-256 of the others. Randomness needs no file: what a step draws follows
from (seed, rank, step). Tensors are whole, however many workers hold them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memmc.config import ModelConfig
from memmc.errors import IntegrityError, ModelError
from memmc.model.mae import MemMCMAE
from memmc.training.optim import WeightAverage
from memmc.training.order import Position
from memmc.training.sharding import spread_like, whole

FORMAT = 2
STATE_FILE = "state.json"
TENSOR_FILES = ("weights.safetensors", "average.safetensors", "optimizer.safetensors", "selected.safetensors")


@dataclass(frozen=True)
class RunState:
    """Counters of a run.

    Attributes:
        step: optimiser steps done.
        position: in the stream of images.
        elapsed_s: wall time of the loop so far, over all attempts, s.
        seed: of the run.
        losses: of the last steps.
        best_step: step of the selected average; 0 without one.
        best_value: its figure, higher is better.
        looks_since_best: looks that were not better.
    """

    step: int
    position: Position
    elapsed_s: float
    seed: int
    losses: tuple[float, ...] = ()
    best_step: int = 0
    best_value: float = 0.0
    looks_since_best: int = 0

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> RunState:
        """Return the state that `asdict` and JSON have made into plain values."""
        where = document["position"]
        position = Position(where["images"], tuple((start, workers) for start, workers in where["cuts"]))
        values: dict[str, Any] = {**document, "position": position, "losses": tuple(document["losses"])}
        return cls(**values)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds besides counters, each tensor whole.

    Attributes:
        tensors: of weights, average and optimiser, in the order of `TENSOR_FILES`.
        model: sizes and switches of the model.
        average_updates: updates of the average.
    """

    tensors: tuple[dict[str, Tensor], ...]
    model: dict[str, Any]
    average_updates: int


def collect(
    model: MemMCMAE,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    selected: dict[str, Tensor] | None = None,
) -> Content:
    """Gather what a checkpoint holds; with a sharded model every worker must ask at the same time.

    Args:
        selected: weights of the best average so far.
    """
    tensors = (model.state_dict(), average.model.state_dict(), _optimizer_tensors(model, optimizer), selected or {})
    gathered = tuple({name: whole(value.detach()) for name, value in group.items()} for group in tensors)
    return Content(gathered, _model_identity(model), average.updates)


def save_checkpoint(folder: str | Path, content: Content, state: RunState) -> None:
    """Write a checkpoint; a reader sees all of it or none."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as aside:
        for name, tensors in zip(TENSOR_FILES, content.tensors, strict=True):
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, Path(aside, name))
        document = {
            "format": FORMAT,
            "model": content.model,
            "state": asdict(state),
            "average_updates": content.average_updates,
            "sha256": {name: _sha256(Path(aside, name)) for name in TENSOR_FILES},
        }
        Path(aside, STATE_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        (target / STATE_FILE).unlink(missing_ok=True)
        for name in (*TENSOR_FILES, STATE_FILE):
            os.replace(Path(aside, name), target / name)  # noqa: PTH105 - the atomic one


def load_checkpoint(
    folder: str | Path, model: MemMCMAE, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Tensor]]:
    """Put a checkpoint's content into the three objects; return its counters and the selected weights.

    Nothing is changed unless every file is sound.

    Raises:
        IntegrityError: a file is not the one that was written.
        ModelError: unfinished, of another format, or of another model.
    """
    document = _read_document(Path(folder, STATE_FILE))
    if not _is_of(document["model"], model):
        raise ModelError("checkpoint is of another model configuration; give this run a new name or the old config")
    content: list[dict[str, Tensor]] = []
    for name in TENSOR_FILES:
        path = Path(folder, name)
        try:
            found = _sha256(path)
            if found != document["sha256"][name]:
                raise IntegrityError(f"checkpoint file {name} has SHA-256 {found[:12]}.., not the recorded one")
            content.append(load_file(path))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"checkpoint file {name} cannot be read ({type(error).__name__})") from None
    weights, averages, moments, selected = content
    load_whole(model, weights)
    load_whole(average.model, averages)
    average.updates = int(document["average_updates"])
    _restore_optimizer(model, optimizer, moments)
    return RunState.of_document(document["state"]), selected


def load_whole(model: MemMCMAE, weights: dict[str, Tensor]) -> None:
    """Give a model, sharded or not, these weights."""
    own = model.state_dict()
    model.load_state_dict({name: spread_like(value, own[name]) for name, value in weights.items()})


def _model_identity(model: MemMCMAE) -> dict[str, Any]:
    return {
        "config": model.config.model_dump(mode="json"),
        "image_size": model.image_size,
        "channels": model.channels,
    }


def identity_of(config: ModelConfig) -> dict[str, Any]:
    """Return the settings in which two models must agree for one to take the other's weights.

    All but `recompute`, with which a model computes the same numbers in less memory.
    """
    return config.model_dump(mode="json", exclude={"recompute"})


def _is_of(written: Any, model: MemMCMAE) -> bool:
    """Say whether a checkpoint is of this model; settings that came after it was written have their defaults."""
    try:
        found = {**written, "config": identity_of(ModelConfig.model_validate(written["config"]))}
    except (KeyError, TypeError, ValueError):
        return False
    return found == {**_model_identity(model), "config": identity_of(model.config)}


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"checkpoint without a readable {STATE_FILE} ({type(error).__name__})") from None
    keys = {"format", "model", "state", "average_updates", "sha256"}
    if not isinstance(document, dict) or set(document) != keys or document["format"] != FORMAT:
        raise ModelError(f"{STATE_FILE} is not a checkpoint of format {FORMAT}")
    return document


def _optimizer_tensors(model: MemMCMAE, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name and moment: ``encoder.class_token/exp_avg``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def _restore_optimizer(model: MemMCMAE, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(model.named_parameters())
    state = {
        number: {key: spread_like(value, like[name]) for key, value in by_name[name].items()}
        for number, name in enumerate(order)
        if name in by_name
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
