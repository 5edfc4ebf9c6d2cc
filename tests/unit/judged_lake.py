"""A lake of drawn films with a small random model of any make, calibrated and scored by any scorer; no Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import scored_model
from watched_lake import SETTINGS, SIDE, START, batch, calibrate, score

from memmc.config import Config, load_config
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS
from memmc.lake.tables import Lake
from memmc.model.artifact import export_model
from memmc.model.digest import model_digest
from memmc.pipeline.models import OpenModel

NUM = 60  # 12 to learn from, 24 to calibrate on, 24 held out


def stored(root: Path, *settings: str) -> Config:
    """Make a lake with a cohort `cxr` of normals and return its configuration."""
    config = load_config(overrides=[f"lake.uri={root / 'lake'}", *SETTINGS, *settings])
    Lake(config.lake.uri).append(INSTANCES, batch(1, NUM, START))
    return config


def opened(config: Config, folder: Path, **fields: Any) -> OpenModel:
    """Write a random model of the cohort into a folder; `fields` are of `ModelConfig`."""
    loaded = scored_model.model(SIDE, **fields)
    version = Lake(config.lake.uri).version(INSTANCES)
    export_model(folder, loaded.model, {**asdict(loaded.info), "cohort": "cxr", "dataset_version": version})
    info = json.loads((folder / "model.json").read_text())
    return OpenModel("unit/1", model_digest(folder), folder, info)


def unscored(root: Path) -> tuple[Config, OpenModel]:
    """Make a lake and a model with a calibration that only names itself; nothing is scored."""
    config = stored(root)
    model = opened(config, root / "model")
    row = {"calibration_id": "c", "model": model.ref, "model_digest": model.digest, "cohort": "cxr"}
    row |= {"dataset_version": model.dataset_version, "preprocess_id": "p", "scorer": "l1", "map_scale": 1.0}
    row |= {"false_positive_rate": 0.1, "threshold": 1.0, "num_normals": 24, "created_at": START}
    Lake(config.lake.uri).append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]))
    return config, model


def judged(root: Path, *settings: str, **fields: Any) -> tuple[Config, OpenModel]:
    """Make a lake and a model, calibrate it and score everything; the calibration is called `c`."""
    config = stored(root, *settings)
    model = opened(config, root / "model", **fields)
    calibrate(config, Lake(config.lake.uri), model)
    score(config, model)
    return config, model
