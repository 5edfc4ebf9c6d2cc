"""What a run learns from and with: the rows it trains on, those it looks at, and its job."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import Config, ModelConfig
from memmc.errors import ConfigError, DataError, ModelError
from memmc.pipeline.models import OpenModel
from memmc.pipeline.select import one_preparation
from memmc.training.checkpoint import identity_of
from memmc.training.distributed import TrainingJob

LOOK_IMAGES = 64
_FEWEST_HELD_OUT = 8


def keep_back(rows: pa.Table, share: float) -> tuple[pa.Table, pa.Table]:
    """Return the rows to train on and at most 64 to look at, of other patients; by keyed hash, so that none ever moves.

    The other rows of the patients that are kept back are neither.

    Raises:
        DataError: too few images kept back, or none left.
    """
    if not share:
        return rows, rows.slice(0, 0)
    bound = round(share * 2**64)
    is_held = pa.array([hash_of(patient) < bound for patient in rows["patient_key"].to_pylist()], pa.bool_())
    held, kept = rows.filter(is_held), rows.filter(pc.call_function("invert", [is_held]))
    if held.num_rows < _FEWEST_HELD_OUT or not kept.num_rows:
        raise DataError(
            f"train.validate_share = {share} keeps back {held.num_rows} of {rows.num_rows} images, at least "
            f"{_FEWEST_HELD_OUT} are needed and some must be left; choose another share, or 0"
        )
    names = zip(held["patient_key"].to_pylist(), held["object_key"].to_pylist(), strict=True)
    places = [hash_of(patient + key) for patient, key in names]
    return kept, held.take(sorted(range(len(places)), key=places.__getitem__)[:LOOK_IMAGES])


def hash_of(text: str) -> int:
    """Return the number from 0 to 2^64 - 1 that a text falls on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def training_job(
    config: Config, cohort: str, version: int, rows: pa.Table, start: OpenModel | None = None
) -> TrainingJob:
    """Describe a run from the metadata of its images.

    Args:
        start: model whose weights, and hence whose mean and standard deviation of pixels, the run begins with.

    Raises:
        ConfigError: an image size the patches do not divide.
        DataError: images prepared in different ways.
        ModelError: the model to start from has another architecture.
        PreprocessMismatch: it knows pixels prepared otherwise.
    """
    kind = one_preparation(rows)
    if kind["height"] != kind["width"] or kind["height"] % config.model.patch_size:
        raise ConfigError(
            f"images of {kind['height']} x {kind['width']} px do not divide into patches of {config.model.patch_size}; "
            "choose data.image_size as a multiple of model.patch_size"
        )
    mean, std = pooled_statistics(rows)
    if start is not None:
        _require_same_shape(config, start, kind)
        mean, std = float(start.info["pixel_mean"]), float(start.info["pixel_std"])
    return TrainingJob(
        model=config.model,
        train=config.train,
        image_size=kind["height"],
        channels=kind["channels"],
        bits=kind["bits"],
        pixel_mean=mean,
        pixel_std=std,
        description={
            "preprocess_id": kind["preprocess_id"],
            "cohort": cohort,
            "dataset_version": version,
            "config_id": config.config_id,
        },
    )


def pooled_statistics(rows: pa.Table) -> tuple[float, float]:
    """Return mean and standard deviation over all pixels, from those of each image (law of total variance)."""
    means, stds = rows["pixel_mean"].to_pylist(), rows["pixel_std"].to_pylist()
    mean = math.fsum(means) / rows.num_rows
    square = math.fsum(s**2 + m**2 for s, m in zip(stds, means, strict=True)) / rows.num_rows
    return mean, math.sqrt(max(square - mean**2, 1e-8))


def _require_same_shape(config: Config, start: OpenModel, kind: dict[str, Any]) -> None:
    start.require({kind["preprocess_id"]})
    try:
        model = ModelConfig.model_validate(start.info["model_config"])  # settings that came after it: their defaults
    except (KeyError, ValueError):
        raise ModelError(
            f"model {start.ref} cannot be started from: this version of memmc does not know its settings; "
            "unset train.warm_start, or train with the version that made it"
        ) from None
    found = {**identity_of(model), "image_size": start.info["image_size"], "channels": start.info["channels"]}
    needed = {**identity_of(config.model), "image_size": kind["height"], "channels": kind["channels"]}
    odd = sorted(name for name in needed if found[name] != needed[name])
    if odd:
        named = ", ".join(f"{name} is {found[name]}, needed {needed[name]}" for name in odd[:4])
        raise ModelError(
            f"model {start.ref} cannot be started from: {named}; set model.* as it has them, or unset train.warm_start"
        )
