"""What a run may start from: a model of the same shape and preparation, with its own grey scale."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from memmc.config import Config, load_config
from memmc.errors import ConfigError, ModelError, PreprocessMismatch
from memmc.pipeline.models import OpenModel
from memmc.pipeline.train import training_job

ROW = {"preprocess_id": "p" * 16, "height": 64, "width": 64, "channels": 1, "bits": 16}
ROWS = pa.Table.from_pylist(
    [{**ROW, "pixel_mean": 0.2, "pixel_std": 0.1}, {**ROW, "pixel_mean": 0.4, "pixel_std": 0.1}]
)


def model(config: Config, **changes: object) -> OpenModel:
    info = {
        "model_config": config.model.model_dump(mode="json"), "image_size": 64, "channels": 1,
        "pixel_mean": 0.5, "pixel_std": 0.25, "preprocess_id": "p" * 16, "cohort": "c", "dataset_version": 0,
    }  # fmt: skip
    return OpenModel("memmc-c/1", "d" * 16, Path(), {**info, **changes})


def test_statistics_are_pooled_or_those_of_the_model_started_from() -> None:
    config = load_config()
    cold = training_job(config, "c", 0, ROWS)
    assert cold.pixel_mean == pytest.approx(0.3)
    assert cold.pixel_std == pytest.approx((0.1**2 + 0.1**2) ** 0.5)
    warm = training_job(config, "c", 0, ROWS, model(config))
    assert (warm.pixel_mean, warm.pixel_std) == (0.5, 0.25)


def test_a_model_of_another_shape_or_preparation_is_refused() -> None:
    config = load_config()
    wider = load_config(overrides=["model.encoder_dim=384", "model.memory_slots=4"])
    with pytest.raises(ModelError, match=r"memmc-c/1 cannot be started from: encoder_dim is 384, needed 192"):
        training_job(config, "c", 0, ROWS, model(wider))
    with pytest.raises(ModelError, match="image_size is 128, needed 64"):
        training_job(config, "c", 0, ROWS, model(config, image_size=128))
    with pytest.raises(PreprocessMismatch, match="memmc-c/1"):
        training_job(config, "c", 0, ROWS, model(config, preprocess_id="q" * 16))


def test_selection_and_patience_need_figures() -> None:
    for setting in ("train.select=val_error", "train.patience=3"):
        with pytest.raises(ConfigError, match="validate_share"):
            load_config(overrides=[setting])
    with pytest.raises(ConfigError, match=r"train\.select"):
        load_config(overrides=["train.patience=3", "train.validate_share=0.1"])
    with pytest.raises(ConfigError, match="min_workers"):
        load_config(overrides=["train.min_workers=3"])
    assert load_config(overrides=["train.min_workers=1"]).train.num_workers == 2
