"""The default score without a model: the training normals' mean image in place of a reconstruction.

What it finds, the statistics around a reconstruction find too. A model earns its training by what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memmc.config import ScoreConfig
from memmc.scoring.masks import Reconstruction
from memmc.scoring.scorer import Features, make_scorer

Grey = NDArray[np.floating]

_BATCH = 64


class MeanImage:
    """Reconstructs every image as the mean of `train_NHW`, grey values in [0, 1]."""

    def __init__(self, train_NHW: Grey) -> None:
        self._mean_1HW = torch.from_numpy(train_NHW.mean(0, keepdims=True, dtype=np.float64).astype(np.float32))

    def __call__(self, images_BCHW: Tensor, _names: Sequence[str] = ()) -> Reconstruction:
        """Return the same expectation for all images (B, 1, H, W), without spread."""
        return Reconstruction.certain(self._mean_1HW.expand_as(images_BCHW))


def mean_image_scores(score: ScoreConfig, train_NHW: Grey, held_NHW: Grey, test_NHW: Grey) -> NDArray[np.float64]:
    """Return (N,) default scores of test images around the mean image, as a model's are taken around its own.

    Args:
        score: grid and components of the statistics; its scorer does not matter.
        train_NHW: normals whose mean stands for a reconstruction; all images in [0, 1] and of one size.
        held_NHW: the normals the model is calibrated on; the statistics are fitted on them.

    Raises:
        DataError: fewer than 8 held-out normals.
    """
    mean, scorer = MeanImage(train_NHW), make_scorer(ScoreConfig(grid=score.grid, components=score.components))

    def features(images_NHW: Grey) -> Features:
        parts: list[Features] = []
        for start in range(0, len(images_NHW), _BATCH):
            images_BCHW = torch.from_numpy(images_NHW[start : start + _BATCH].astype(np.float32))[:, None]
            parts.append(scorer.features(images_BCHW, mean(images_BCHW)))
        return Features.join(parts)

    return scorer.fit(features(held_NHW)).score_features(features(test_NHW)).anomaly_score_B
