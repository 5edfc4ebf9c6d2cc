"""Numbers that say how well scores separate abnormal from normal, with their uncertainty.

Labels are true where abnormal, scores are higher where more abnormal. Arrays
carry their shape in their name: N images, P patients, R resamplings, H and W
the sides of an image, px. Ties are exact everywhere. The intervals resample patients, since
the images of one patient are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.errors import DataError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Statistic = Callable[[BoolArray, FloatArray, FloatArray], FloatArray]
"""(labels_N, scores_N, weights_RN) -> values_R; `auroc` and `average_precision` are such functions."""

_CELLS_PER_CHUNK = 4_000_000  # weights held at once by the bootstrap: 32 MB of float64


@dataclass(frozen=True)
class Interval:
    """A closed confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class RocCurve:
    """Points of a ROC curve, from (0, 0) to (1, 1), one per distinct score.

    Attributes:
        false_positive_rate: (T,) share of normals at or above the threshold.
        sensitivity: (T,) share of abnormals at or above the threshold.
        thresholds: (T,) falling; the first is infinity.
    """

    false_positive_rate: FloatArray
    sensitivity: FloatArray
    thresholds: FloatArray


@dataclass(frozen=True)
class OperatingPoint:
    """What flagging every score above a threshold does."""

    threshold: float
    sensitivity: float
    false_positive_rate: float


@dataclass(frozen=True)
class Evaluation:
    """One model on one labelled set of images; labels, scores and flagged are (N,)."""

    labels: BoolArray
    scores: FloatArray
    flagged: BoolArray
    num_patients: int
    auroc: float
    auroc_interval: Interval
    average_precision: float
    average_precision_interval: Interval
    sensitivity: float
    sensitivity_interval: Interval
    false_positive_rate: float
    false_positive_rate_interval: Interval
    confidence: float
    resamplings: int

    @property
    def num_normal(self) -> int:
        """Normal images."""
        return int((~self.labels).sum())

    @property
    def num_abnormal(self) -> int:
        """Abnormal images."""
        return int(self.labels.sum())


def evaluate_scores(
    labels: ArrayLike,
    scores: ArrayLike,
    flagged: ArrayLike,
    patients: Sequence[str] | NDArray[Any],
    *,
    resamplings: int,
    confidence: float,
    seed: int,
) -> Evaluation:
    """Return every headline number of one model on one labelled set.

    Args:
        labels: (N,), true where abnormal.
        scores: (N,), higher is more abnormal.
        flagged: (N,), true where the calibrated threshold calls the image abnormal.
        patients: (N,) keys; images of one key are resampled together.
        resamplings: bootstrap resamplings.
        confidence: in (0, 1), of every interval.
        seed: of the bootstrap.

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    labels_N, scores_N = _checked(labels, scores)
    flagged_N = np.asarray(flagged, dtype=bool)
    hits, alarms = int((flagged_N & labels_N).sum()), int((flagged_N & ~labels_N).sum())
    num_abnormal, num_normal = int(labels_N.sum()), int((~labels_N).sum())

    def interval(statistic: Statistic) -> Interval:
        return patient_bootstrap(labels_N, scores_N, patients, statistic, resamplings, confidence, seed)

    return Evaluation(
        labels=labels_N,
        scores=scores_N,
        flagged=flagged_N,
        num_patients=len(np.unique(np.asarray(patients))),
        auroc=auroc(labels_N, scores_N),
        auroc_interval=interval(auroc),
        average_precision=average_precision(labels_N, scores_N),
        average_precision_interval=interval(average_precision),
        sensitivity=hits / num_abnormal,
        sensitivity_interval=proportion_interval(hits, num_abnormal, confidence),
        false_positive_rate=alarms / num_normal,
        false_positive_rate_interval=false_positive_rate_interval(alarms, num_normal, confidence),
        confidence=confidence,
        resamplings=resamplings,
    )


@overload
def auroc(labels: ArrayLike, scores: ArrayLike) -> float: ...
@overload
def auroc(labels: ArrayLike, scores: ArrayLike, weights: FloatArray) -> FloatArray: ...
def auroc(labels: ArrayLike, scores: ArrayLike, weights: FloatArray | None = None) -> float | FloatArray:
    """Return the area under the ROC curve: P(abnormal > normal) + P(equal) / 2.

    Args:
        labels: (N,), true where abnormal.
        scores: (N,), higher is more abnormal.
        weights: (R, N) counts of each image; one area per row is returned then, (R,).

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    labels_N, scores_N = _checked(labels, scores)
    abnormal_RG, normal_RG = class_weights(labels_N, scores_N, weights)
    below_RG = np.cumsum(normal_RG, axis=1) - normal_RG
    wins_R = (abnormal_RG * (below_RG + normal_RG / 2)).sum(axis=1)
    area_R = wins_R / (abnormal_RG.sum(axis=1) * normal_RG.sum(axis=1))
    return float(area_R[0]) if weights is None else area_R


@overload
def average_precision(labels: ArrayLike, scores: ArrayLike) -> float: ...
@overload
def average_precision(labels: ArrayLike, scores: ArrayLike, weights: FloatArray) -> FloatArray: ...
def average_precision(labels: ArrayLike, scores: ArrayLike, weights: FloatArray | None = None) -> float | FloatArray:
    """Return the sum over falling thresholds of precision x gain in sensitivity; no interpolation.

    Args and Raises as `auroc`.
    """
    labels_N, scores_N = _checked(labels, scores)
    abnormal_RG, normal_RG = (counts[:, ::-1] for counts in class_weights(labels_N, scores_N, weights))
    hits_RG = np.cumsum(abnormal_RG, axis=1)
    flagged_RG = hits_RG + np.cumsum(normal_RG, axis=1)
    precision_RG = np.divide(hits_RG, flagged_RG, out=np.zeros_like(hits_RG), where=flagged_RG > 0)
    value_R = (precision_RG * abnormal_RG).sum(axis=1) / hits_RG[:, -1]
    return float(value_R[0]) if weights is None else value_R


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """Return the ROC curve; its trapezoidal area equals `auroc`.

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    labels_N, scores_N = _checked(labels, scores)
    abnormal_G, normal_G = (counts[0, ::-1] for counts in class_weights(labels_N, scores_N, None))
    return RocCurve(
        false_positive_rate=np.concatenate([[0.0], np.cumsum(normal_G) / normal_G.sum()]),
        sensitivity=np.concatenate([[0.0], np.cumsum(abnormal_G) / abnormal_G.sum()]),
        thresholds=np.concatenate([[np.inf], np.unique(scores_N)[::-1]]),
    )


def operating_points(labels: ArrayLike, scores: ArrayLike, thresholds: ArrayLike) -> list[OperatingPoint]:
    """Return sensitivity and false-positive rate of `score > threshold`, the rule of calibration, one per threshold.

    Raises:
        DataError: a class is missing, or a score is not finite.
    """
    labels_N, scores_N = _checked(labels, scores)
    normal, abnormal = np.sort(scores_N[~labels_N]), np.sort(scores_N[labels_N])
    return [
        OperatingPoint(
            threshold=float(threshold),
            sensitivity=1 - float(np.searchsorted(abnormal, threshold, side="right")) / len(abnormal),
            false_positive_rate=1 - float(np.searchsorted(normal, threshold, side="right")) / len(normal),
        )
        for threshold in np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    ]


def bootstrap_values(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str] | NDArray[Any],
    statistic: Statistic,
    resamplings: int,
    seed: int,
) -> FloatArray:
    """Return the statistic of each resampling of patients, (R,).

    Patients are drawn with replacement within three groups (only normal, only abnormal, both kinds of image), so
    that each resampling holds both classes. Equal patients, labels and seed give equal resamplings
    whatever the scores: the difference of two calls is a paired difference.

    Raises:
        DataError: a class is missing, a score is not finite, or patients and scores differ in number.
    """
    labels_N, scores_N = _checked(labels, scores)
    keys, patient_N = np.unique(np.asarray(patients), return_inverse=True)
    if patient_N.shape != labels_N.shape:
        raise DataError(f"bootstrap: {patient_N.size} patient keys for {labels_N.size} labels; give one key per image")
    has_abnormal_P = np.bincount(patient_N, weights=labels_N, minlength=len(keys)) > 0
    has_normal_P = np.bincount(patient_N, weights=~labels_N, minlength=len(keys)) > 0
    stratum_P = has_abnormal_P * 2 + has_normal_P
    rng = np.random.default_rng(seed)
    values: list[FloatArray] = []
    chunk = max(1, _CELLS_PER_CHUNK // len(labels_N))
    for start in range(0, resamplings, chunk):
        num = min(chunk, resamplings - start)
        draws_RP = np.zeros((num, len(keys)))
        for stratum in np.unique(stratum_P):
            members = np.flatnonzero(stratum_P == stratum)
            draws_RP[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=num)
        values.append(statistic(labels_N, scores_N, draws_RP[:, patient_N]))
    return np.concatenate(values)


def patient_bootstrap(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str] | NDArray[Any],
    statistic: Statistic,
    resamplings: int,
    confidence: float,
    seed: int,
) -> Interval:
    """Return the percentile interval of `bootstrap_values`.

    It has no width where the statistic is at its bound (perfect separation): the data cannot show how far it is from
    it, which is not certainty.

    Raises:
        DataError: as `bootstrap_values`.
    """
    return percentile_interval(bootstrap_values(labels, scores, patients, statistic, resamplings, seed), confidence)


def percentile_interval(values: ArrayLike, confidence: float) -> Interval:
    """Return the central interval that holds the given share of the values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [tail, 1 - tail])
    return Interval(float(low), float(high))


def false_positive_rate_interval(k: int, n: int, confidence: float) -> Interval:
    """Return the exact (Clopper-Pearson) interval of the false-positive rate: k of n normal images flagged.

    Raises:
        DataError: not 0 <= k <= n, or n = 0.
    """
    return proportion_interval(k, n, confidence)


def proportion_interval(k: int, n: int, confidence: float) -> Interval:
    """Return the exact interval of a binomial proportion, k of n.

    Raises:
        DataError: not 0 <= k <= n, or n = 0.

    Source: Clopper and Pearson, Biometrika 26 (1934), by quantiles of the beta distribution.
    """
    from scipy.stats import beta

    if not 0 <= k <= n or n == 0:
        raise DataError(f"proportion: {k} of {n}; expected 0 <= k <= n and n >= 1")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Interval(low, high)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[BoolArray, FloatArray]:
    labels_N, scores_N = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if labels_N.ndim != 1 or labels_N.shape != scores_N.shape:
        raise DataError(f"metrics: labels {labels_N.shape} and scores {scores_N.shape}; expected two equal (N,)")
    if not np.isfinite(scores_N).all():
        raise DataError(f"metrics: {int((~np.isfinite(scores_N)).sum())} scores are not finite; score again")
    need_both(int(labels_N.sum()), int((~labels_N).sum()), "images")
    return labels_N, scores_N


def need_both(num_abnormal: float, num_normal: float, what: str) -> None:
    """Raise DataError where one of the two counts is zero."""
    if not num_abnormal or not num_normal:
        raise DataError(
            f"metrics: {num_normal:.0f} normal and {num_abnormal:.0f} abnormal {what}; expected some of both"
        )


def class_weights(
    labels_N: BoolArray, scores_N: FloatArray, weights: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Return weights of abnormals and of normals per distinct score, rising, each (R, G).

    Args:
        labels_N: true where abnormal.
        scores_N: higher is more abnormal.
        weights: (R, N) counts of each image; one row of ones when absent.
    """
    order = np.argsort(scores_N, kind="stable")
    ordered = scores_N[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    weights_RN = np.ones((1, len(scores_N))) if weights is None else np.asarray(weights, dtype=np.float64)
    weights_RN, labels_N = weights_RN[:, order], labels_N[order]
    abnormal_RG = np.add.reduceat(weights_RN * labels_N, starts, axis=1)
    return abnormal_RG, np.add.reduceat(weights_RN * ~labels_N, starts, axis=1)
