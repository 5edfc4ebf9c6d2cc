"""A small random model with a fitted scorer and images, for tests of what stands on the whole of scoring."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from memmc.config import ModelConfig, ScoreConfig
from memmc.model.artifact import LoadedModel, export_model, load_model
from memmc.model.mae import MemMCMAE
from memmc.scoring.exported import Calibrated, ids_for
from memmc.scoring.masks import reconstruct
from memmc.scoring.scorer import make_scorer

INFO = {"preprocess_id": "p", "cohort": "c", "dataset_version": 1, "steps": 1, "train_seconds": 1.0, "config_id": "x"}
PASSES = 4


def model(size: int = 32, channels: int = 1, seed: int = 0, **fields: Any) -> LoadedModel:
    """Return a model of random weights, through its files."""
    sizes: dict[str, Any] = {"encoder_dim": 16, "encoder_depth": 2, "encoder_heads": 2, "memory_slots": 4}
    sizes |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "patch_size": 8, **fields}
    torch.manual_seed(seed)
    made = MemMCMAE(ModelConfig(**sizes), size, channels)
    info = {**INFO, "image_size": size, "channels": channels, "pixel_mean": 0.4, "pixel_std": 0.2, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        export_model(folder, made, info)
        return load_model(folder)


def pixels(count: int, size: int = 32, channels: int = 1, bits: int = 16, seed: int = 0) -> np.ndarray:
    """Return smooth, noisy images (count, size, size, channels) as stored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, size // 8, size // 8, generator=generator)
    images = 0.1 + 0.7 * F.interpolate(coarse, size=size, mode="bilinear")
    images += 0.05 * torch.rand(images.shape, generator=generator)
    stored = (images.permute(0, 2, 3, 1).numpy() * (2**bits - 1)).round()
    return np.ascontiguousarray(stored.astype(np.uint8 if bits == 8 else np.uint16))


def calibrated(loaded: LoadedModel, stored: np.ndarray, scorer: str = "residual_statistics") -> Calibrated:
    """Return a scorer fitted and judged on these images; its threshold flags half of them."""
    ids = ids_for(loaded, uids(len(stored)), PASSES)
    images = torch.from_numpy(stored.astype(np.float32) / np.iinfo(stored.dtype).max).permute(0, 3, 1, 2)
    mean, std = loaded.info.pixel_mean, loaded.info.pixel_std
    reconstruction = reconstruct(loaded.model, (images - mean) / std, torch.from_numpy(ids)).rescale(mean, std)
    unfitted = make_scorer(ScoreConfig.model_validate({"scorer": scorer}))
    features = unfitted.features(images, reconstruction)
    fitted = unfitted.fit(features)
    batch = fitted.score_features(features)
    scores = tuple(batch.anomaly_score_B.tolist())
    return Calibrated(fitted, scores, float(np.median(scores)), float(np.quantile(batch.anomaly_map_BHW, 0.995)))


def uids(count: int) -> list[str]:
    """Return names of instances."""
    return [f"2.25.{number}" for number in range(count)]
