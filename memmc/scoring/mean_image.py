"""The default score without a model: the training normals' mean image in place of a reconstruction.

What it finds, the statistics around a reconstruction find too. A model earns its training by what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memmc.config import ScoreConfig
from memmc.scoring.masks import Reconstruction
from memmc.scoring.scorer import Features, Scorer, make_scorer

Grey = NDArray[np.floating]

_BATCH = 64


class MeanImage:
    """Reconstructs every image as the mean of `train_NHW`, grey values in [0, 1]."""

    def __init__(self, train_NHW: Grey) -> None:
        self._mean_1HW = torch.from_numpy(train_NHW.mean(0, keepdims=True, dtype=np.float64).astype(np.float32))

    def __call__(self, images_BCHW: Tensor, _names: Sequence[str] = ()) -> Reconstruction:
        """Return the same expectation for all images (B, 1, H, W), without spread."""
        return Reconstruction.certain(self._mean_1HW.expand_as(images_BCHW))


@dataclass(frozen=True)
class FittedMeanImage:
    """The default score around the mean image, as a model's is taken around its own; each image is scored by itself.

    Attributes:
        mean: in place of a reconstruction.
        scorer: fitted on held-out normals.
    """

    mean: MeanImage
    scorer: Scorer

    @classmethod
    def fit(cls, score: ScoreConfig, train_NHW: Grey, held_NHW: Grey) -> FittedMeanImage:
        """Fit the statistics.

        Args:
            score: grid and components of the statistics; its scorer does not matter.
            train_NHW: normals whose mean stands for a reconstruction; all images in [0, 1] and of one size.
            held_NHW: the normals the model is calibrated on; the statistics are fitted on them.

        Raises:
            DataError: fewer than 10 held-out normals.
        """
        mean, scorer = MeanImage(train_NHW), make_scorer(ScoreConfig(grid=score.grid, components=score.components))
        return cls(mean, scorer.fit(_features(mean, scorer, held_NHW)))

    def scores(self, test_NHW: Grey) -> NDArray[np.float64]:
        """Return (N,) scores of images in [0, 1], of the size of the others."""
        return self.scorer.score_features(_features(self.mean, self.scorer, test_NHW)).anomaly_score_B


def _features(mean: MeanImage, scorer: Scorer, images_NHW: Grey) -> Features:
    parts: list[Features] = []
    for start in range(0, len(images_NHW), _BATCH):
        images_BCHW = torch.from_numpy(images_NHW[start : start + _BATCH].astype(np.float32))[:, None]
        parts.append(scorer.features(images_BCHW, mean(images_BCHW)))
    return Features.join(parts)
