"""Thresholds and p-values from held-out normals alone (split conformal prediction).

The guarantee rests on exchangeability only: where a new normal image is drawn
like the n held-out ones, its p-value is at most `a` with probability at most `a`,
whatever the model and the score. It holds on average over calibration sets; for
one given set the rate varies, and `false_positive_interval` says by how much.

Source: Vovk et al., Algorithmic Learning in a Random World, 2005; Angelopoulos and Bates, arXiv:2107.07511.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.errors import DataError, GateRefused

Floats = NDArray[np.float64]


def p_values(scores: ArrayLike, normal_scores: ArrayLike) -> Floats:
    """Return ``(1 + #{normal >= score}) / (n + 1)`` per score, in [1 / (n + 1), 1]; small is abnormal.

    Raises:
        DataError: no normal scores, or a score is not finite.
    """
    normals = np.sort(_finite(normal_scores, "normal scores"))
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} scores are not finite; no p-value exists for them")
    at_least = normals.size - np.searchsorted(normals, values, side="left")
    return ((1.0 + at_least) / (normals.size + 1.0)).astype(np.float64)


def smallest_rate(num_normals: int) -> float:
    """Return the smallest false-positive rate that `num_normals` held-out normals can promise."""
    return 1.0 / (num_normals + 1)


def threshold_at(normal_scores: ArrayLike, false_positive_rate: float) -> float:
    """Return the threshold t such that flagging ``score > t`` flags a new normal with at most this probability.

    t is the k-th smallest of n normal scores with ``k = ceil((n + 1) (1 - rate))``: ``score > t`` holds exactly
    where the p-value is at most the rate.

    Raises:
        GateRefused: fewer normals than the rate needs, ``1 / rate - 1``.
        DataError: no normal scores, or one is not finite.
    """
    normals = np.sort(_finite(normal_scores, "normal scores"))
    count = normals.size
    rank = _rank(count, false_positive_rate)
    if rank > count:
        needed = math.ceil(1.0 / false_positive_rate - 1.0 - 1e-9)
        raise GateRefused(
            f"{count} held-out normal images cannot carry a false-positive rate of {false_positive_rate:g}: "
            f"expected at least {needed}; add normals or raise calibrate.false_positive_rate"
        )
    return float(normals[rank - 1])


def false_positive_interval(
    num_normals: int, false_positive_rate: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the central interval of the true false-positive rate of a threshold set on `num_normals` normals.

    Over calibration sets the rate beyond the k-th of n order statistics follows Beta(n + 1 - k, k) for a continuous
    score; with ties it is lower.

    Raises:
        GateRefused: as `threshold_at`.
    """
    from scipy.stats import beta

    rank = _rank(num_normals, false_positive_rate)
    if rank > num_normals:
        raise GateRefused(f"{num_normals} held-out normal images cannot carry a rate of {false_positive_rate:g}")
    tail = (1.0 - confidence) / 2.0
    low, high = beta.ppf([tail, 1.0 - tail], num_normals + 1 - rank, rank)
    return float(low), float(high)


def observed_rate_interval(
    num_normals: int, false_positive_rate: float, num_new: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the central interval of the rate seen on `num_new` new normals, by a threshold set on `num_normals`.

    Both the calibration set and the new images vary: the count of flagged images is beta-binomial. Being discrete, it
    lies inside at least as often as the confidence says.

    Raises:
        GateRefused: as `threshold_at`.
    """
    from scipy.stats import betabinom

    rank = _rank(num_normals, false_positive_rate)
    if rank > num_normals:
        raise GateRefused(f"{num_normals} held-out normal images cannot carry a rate of {false_positive_rate:g}")
    tail = (1.0 - confidence) / 2.0
    counts = np.asarray(betabinom.ppf([tail, 1.0 - tail], num_new, num_normals + 1 - rank, rank), dtype=np.float64)
    return float(counts[0]) / num_new, float(counts[1]) / num_new


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion seen as `successes` of `trials`, for instance flagged normals.

    Raises:
        DataError: `successes` is not in 0 .. trials, or there is no trial.

    Source: Clopper and Pearson, Biometrika 1934.
    """
    from scipy.stats import beta

    if not 0 <= successes <= trials or trials < 1:
        raise DataError(f"{successes} successes of {trials} trials: expected 0 to {max(trials, 1)} of at least 1")
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1.0 - tail, successes + 1, trials - successes))
    return low, high


def _rank(count: int, rate: float) -> int:
    # (n + 1)(1 - rate) may stand a rounding error above a whole number.
    return max(1, math.ceil((count + 1) * (1.0 - rate) - 1e-9))


def _finite(values: ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise DataError(f"no {what}; calibrate on held-out normals first")
    if not np.isfinite(array).all():
        raise DataError(f"{int((~np.isfinite(array)).sum())} of {array.size} {what} are not finite")
    return array
