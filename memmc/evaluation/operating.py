"""What a threshold does on labelled images: sensitivity at a chosen specificity, and whether a promised rate holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.evaluation.metrics import (
    BoolArray,
    FloatArray,
    Interval,
    class_weights,
    patient_bootstrap,
    proportion_interval,
)


@dataclass(frozen=True)
class SensitivityAt:
    """The sensitivity where a share of the evaluated normals stays below the threshold."""

    specificity: float
    sensitivity: float
    interval: Interval


@dataclass(frozen=True)
class RatePoint:
    """A promised false-positive rate and the one observed.

    Attributes:
        nominal: share of normals with a p-value at most this, as promised.
        observed: as seen on evaluated normals.
        interval: exact, of the observed share.
        num_normal: evaluated normals.
        expected: where the observed share lies if these normals are like those that the threshold was set on; both sets
            vary (`memmc.scoring.calibration.observed_rate_interval`).
    """

    nominal: float
    observed: float
    interval: Interval
    num_normal: int
    expected: Interval

    @property
    def holds(self) -> bool:
        """Whether no more are flagged than such a threshold flags of normals like its own."""
        return self.observed <= self.expected.high + 1e-12


def sensitivity_at(labels: BoolArray, scores: FloatArray, weights: FloatArray | None, specificity: float) -> FloatArray:
    """Return the highest sensitivity whose specificity is at least the given one, per row of weights, (R,).

    Args:
        labels: (N,), true where abnormal.
        scores: (N,), higher is more abnormal; those of equal score are flagged together.
        weights: (R, N) counts of each image; one row of ones when absent.
        specificity: least share of normals below the threshold.
    """
    abnormal_RG, normal_RG = (counts[:, ::-1] for counts in class_weights(labels, scores, weights))
    flagged_RG = np.cumsum(normal_RG, axis=1) / normal_RG.sum(axis=1, keepdims=True)
    found_RG = np.cumsum(abnormal_RG, axis=1) / abnormal_RG.sum(axis=1, keepdims=True)
    return np.where(flagged_RG <= 1 - specificity + 1e-12, found_RG, 0.0).max(axis=1)


def sensitivities(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str] | NDArray[Any],
    specificities: Sequence[float],
    *,
    resamplings: int,
    confidence: float,
    seed: int,
) -> tuple[SensitivityAt, ...]:
    """Return the sensitivity at each specificity; the interval resamples patients, the threshold moving with them.

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    labels_N, scores_N = np.asarray(labels, bool), np.asarray(scores, np.float64)
    found: list[SensitivityAt] = []
    for specificity in specificities:

        def statistic(
            labels: BoolArray, scores: FloatArray, weights: FloatArray, least: float = specificity
        ) -> FloatArray:
            return sensitivity_at(labels, scores, weights, least)

        interval = patient_bootstrap(labels_N, scores_N, patients, statistic, resamplings, confidence, seed)
        value = float(sensitivity_at(labels_N, scores_N, None, specificity)[0])
        found.append(SensitivityAt(specificity, value, interval))
    return tuple(found)


def rate_points(p_values: ArrayLike, expected: Mapping[float, Interval], confidence: float) -> tuple[RatePoint, ...]:
    """Return observed against promised false-positive rates: the data of a calibration plot.

    Args:
        p_values: (N,) of evaluated normals.
        expected: by nominal rate, where the observed one lies if the promise holds.
        confidence: of the exact intervals, which count images as independent.

    Raises:
        DataError: no p-value.
    """
    values = np.asarray(p_values, np.float64)
    found: list[RatePoint] = []
    for rate, between in expected.items():
        count = int((values <= rate + 1e-12).sum())
        interval = proportion_interval(count, values.size, confidence)
        found.append(RatePoint(rate, count / values.size, interval, values.size, between))
    return tuple(found)
