"""Controls that use no model: what a trivial feature reaches on the same images.

A model that does not beat them has learned the view position or the scanner,
not the disease. Always print them beside a model.

Sidedness: a feature such as brightness may be higher or lower in disease, so a
control's AUROC is max(AUROC, 1 - AUROC), its side chosen with the test labels. That
flatters the control, on purpose: the model gets no such choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.errors import DataError
from memmc.evaluation.metrics import FloatArray, Interval, auroc, bootstrap_values, percentile_interval

GRID = 8  # side of the reduced image, px
NEIGHBOURS = 5
COMPONENTS = 16

CONTROL_TITLES: Mapping[str, str] = {
    "pca_8x8": "Gaussian (16 principal components) of 8 × 8 pixels",
    "knn_8x8": "distance to the 5 nearest training normals, 8 × 8 pixels",
    "mean_intensity": "mean intensity",
    "sharpness": "sharpness (mean horizontal gradient)",
    "mean_image": "residual statistics around the mean of the training normals",
}


@dataclass(frozen=True)
class ControlResult:
    """One control on the images a model was evaluated on.

    Attributes:
        name: key of `CONTROL_TITLES`.
        scores: (N,), turned so that higher is more abnormal.
        auroc: max(AUROC, 1 - AUROC).
        interval: of the AUROC, patients resampled, side fixed.
        flipped: the abnormal images have the lower raw values.
        gain: AUROC of the model minus the control's.
        gain_interval: of the gain, same resamplings for both (paired).
    """

    name: str
    scores: FloatArray
    auroc: float
    interval: Interval
    flipped: bool
    gain: float
    gain_interval: Interval


@dataclass(frozen=True)
class FittedControls:
    """The controls that need pixels alone, fitted on normals; each image is scored by itself.

    Attributes:
        size: height and width of the images, px.
        mean_F: of the reduced training images.
        train_MF: reduced training images, less their mean.
        axes_CF, variance_C, noise: their principal components, and the variance in every other direction.
    """

    size: tuple[int, ...]
    mean_F: FloatArray
    train_MF: FloatArray
    axes_CF: FloatArray
    variance_C: FloatArray
    noise: float

    @classmethod
    def fit(cls, train: ArrayLike) -> FittedControls:
        """Fit the controls.

        Args:
            train: (M, H, W) normal training images in [0, 1], M >= 2.

        Raises:
            DataError: not three dimensions, or fewer than two images.
        """
        train_MHW = np.asarray(train, dtype=np.float64)
        if train_MHW.ndim != 3 or len(train_MHW) < 2:
            raise DataError(f"controls: training images {train_MHW.shape}; expected (M, H, W) with M >= 2")
        reduced_MF = reduce_images(train_MHW)
        mean_F = reduced_MF.mean(axis=0)
        train_MF = reduced_MF - mean_F
        _, singular, axes_CF = np.linalg.svd(train_MF, full_matrices=False)
        variance_C = singular**2 / (len(train_MF) - 1)
        num = min(COMPONENTS, int((variance_C > 1e-12).sum()))
        noise = max(float(variance_C[num:].sum()) / max(train_MF.shape[1] - num, 1), 1e-8)
        return cls(train_MHW.shape[1:], mean_F, train_MF, axes_CF[:num], variance_C[:num], noise)

    def scores(self, test: ArrayLike) -> dict[str, FloatArray]:
        """Return the raw score of each image by each control, (N,) per name.

        `mean_image` comes from `memmc.scoring.mean_image`: it uses the statistics of the default score.

        Args:
            test: (N, H, W) images, prepared as the training images were.

        Raises:
            DataError: not three dimensions, or another size than the training images.
        """
        test_NHW = np.asarray(test, dtype=np.float64)
        if test_NHW.ndim != 3 or test_NHW.shape[1:] != self.size:
            raise DataError(
                f"controls: test images {test_NHW.shape}, training images of {self.size}; "
                "expected (N, H, W) of the same size"
            )
        offset_NF = reduce_images(test_NHW) - self.mean_F
        return {
            "pca_8x8": self._gaussian_distance(offset_NF),
            "knn_8x8": self._neighbour_distance(offset_NF),
            "mean_intensity": test_NHW.mean(axis=(1, 2)),
            "sharpness": np.abs(np.diff(test_NHW, axis=2)).mean(axis=(1, 2)),
        }

    def _gaussian_distance(self, offset_NF: FloatArray) -> FloatArray:
        """Return the Mahalanobis distance under a probabilistic PCA of the training images."""
        inside_NC = offset_NF @ self.axes_CF.T
        residual_N = (offset_NF**2).sum(axis=1) - (inside_NC**2).sum(axis=1)
        return np.sqrt(
            (inside_NC**2 / (self.variance_C + 1e-8)).sum(axis=1) + np.clip(residual_N, 0, None) / self.noise
        )

    def _neighbour_distance(self, offset_NF: FloatArray) -> FloatArray:
        """Return the mean Euclidean distance to the nearest training images."""
        num = min(NEIGHBOURS, len(self.train_MF))
        squares_M = (self.train_MF**2).sum(axis=1)
        scores = np.empty(len(offset_NF))
        for start in range(0, len(offset_NF), 256):
            chunk = offset_NF[start : start + 256]
            squared = (chunk**2).sum(axis=1)[:, None] + squares_M - 2 * chunk @ self.train_MF.T
            nearest = np.partition(np.clip(squared, 0, None), num - 1, axis=1)[:, :num]
            scores[start : start + 256] = np.sqrt(nearest).mean(axis=1)
        return scores


def control_scores(train: ArrayLike, test: ArrayLike) -> dict[str, FloatArray]:
    """Return the raw score of each test image by each control that needs pixels alone; see `FittedControls`."""
    return FittedControls.fit(train).scores(test)


def evaluate_controls(
    controls: Mapping[str, ArrayLike],
    labels: ArrayLike,
    model_scores: ArrayLike,
    patients: Sequence[str] | NDArray[Any],
    *,
    resamplings: int,
    confidence: float,
    seed: int,
) -> tuple[ControlResult, ...]:
    """Return AUROC, interval and the model's gain over each control, best control first.

    Args:
        controls: (N,) raw scores per name, as `FittedControls.scores` returns.
        labels: (N,), true where abnormal.
        model_scores: (N,) of the model, higher is more abnormal.
        patients: (N,) keys.
        resamplings: bootstrap resamplings.
        confidence: in (0, 1), of every interval.
        seed: of the bootstrap.

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    model_auroc = auroc(labels, model_scores)
    model_R = bootstrap_values(labels, model_scores, patients, auroc, resamplings, seed)
    results: list[ControlResult] = []
    for name, raw in controls.items():
        area = auroc(labels, raw)
        flipped = area < 0.5
        scores_N = np.asarray(raw, dtype=np.float64) * (-1 if flipped else 1)
        control_R = bootstrap_values(labels, scores_N, patients, auroc, resamplings, seed)
        results.append(
            ControlResult(
                name=name,
                scores=scores_N,
                auroc=max(area, 1 - area),
                interval=percentile_interval(control_R, confidence),
                flipped=flipped,
                gain=model_auroc - max(area, 1 - area),
                gain_interval=percentile_interval(model_R - control_R, confidence),
            )
        )
    return tuple(sorted(results, key=lambda result: -result.auroc))


def reduce_images(images: FloatArray, side: int = GRID) -> FloatArray:
    """Return (N, side * side) area means of (N, H, W) images; exact where side does not divide H or W."""
    rows, columns = _area_weights(images.shape[1], side), _area_weights(images.shape[2], side)
    return np.einsum("gh,nhw,kw->ngk", rows, images, columns, optimize=True).reshape(len(images), side * side)


def _area_weights(size: int, side: int) -> FloatArray:
    """Return (side, size) rows that average a line of `size` pixels over `side` equal stretches."""
    edges = np.linspace(0, size, side + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.clip(overlap, 0, None) * (side / size)
