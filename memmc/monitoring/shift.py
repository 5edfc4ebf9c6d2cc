"""Two-sample tests between a window of new instances and a baseline; every p-value is exact or by permutation.

A window may hold a dozen images, so nothing rests on large numbers. Instances of one patient are not independent:
samples hold one instance a patient. Effects are on one scale, [0, 1]: the share of images that would have to change
for the two samples to agree, or a bound below it.

Shape legend: N instances of the baseline, M of the window, A = N + M, F features, C categories, R resamplings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PRINCIPAL = 12  # components that a multivariate test keeps [choice]
_CHUNK = 2000  # resamplings at once


@dataclass(frozen=True)
class Difference:
    """How surprising a difference is, and how large.

    Attributes:
        p_value: of no difference at all.
        effect: size of the difference, [0, 1].
    """

    p_value: float
    effect: float


def categories(
    baseline: Sequence[str], window: Sequence[str], resamplings: int, rng: np.random.Generator
) -> Difference:
    """Compare counts of categories: the chi-square statistic, judged by tables of the same margins.

    No cell is too small for it: the null distribution is drawn and not approximated. The effect is the distance of
    total variation.
    """
    names = sorted({*baseline, *window})
    index = {name: place for place, name in enumerate(names)}
    old_C, new_C = (
        np.bincount([index[value] for value in values], minlength=len(names)) for values in (baseline, window)
    )
    total_C = old_C + new_C
    expected_C = total_C * (len(window) / total_C.sum())

    def statistic(counts_RC: NDArray[np.int64]) -> Floats:
        # Both rows of the table deviate alike, so the window's row is enough to order tables of equal margins.
        return ((counts_RC - expected_C) ** 2 / expected_C).sum(-1)

    seen = float(statistic(new_C))
    drawn_RC = rng.multivariate_hypergeometric(total_C, len(window), size=resamplings)
    beyond = int((statistic(drawn_RC) >= seen * (1 - 1e-9)).sum())
    effect = 0.5 * float(np.abs(old_C / len(baseline) - new_C / len(window)).sum())
    return Difference((1 + beyond) / (resamplings + 1), effect)


def numbers(baseline: ArrayLike, window: ArrayLike) -> Difference:
    """Compare values: Kolmogorov-Smirnov, two-sided; ties make it err on the quiet side."""
    from scipy.stats import ks_2samp

    found: Any = ks_2samp(np.asarray(baseline, np.float64), np.asarray(window, np.float64), method="auto")
    return Difference(float(found.pvalue), float(found.statistic))


def share(baseline: tuple[int, int], window: tuple[int, int]) -> Difference:
    """Compare two (count, total): Fisher's exact test; the effect is the difference of the shares."""
    from scipy.stats import fisher_exact

    table = [[baseline[0], baseline[1] - baseline[0]], [window[0], window[1] - window[0]]]
    found: Any = fisher_exact(table)
    return Difference(float(found.pvalue), abs(baseline[0] / baseline[1] - window[0] / window[1]))


def vectors(baseline_NF: Floats, window_MF: Floats, resamplings: int, rng: np.random.Generator) -> Difference:
    """Compare vectors: maximum mean discrepancy under a Gaussian kernel, judged by permutation.

    Both samples together are scaled to equal spread and reduced to their principal components before they are told
    apart, so that a permutation changes nothing but who belongs to which. The kernel's width is the median distance.
    The effect is the Kolmogorov-Smirnov distance of the witness function, less what permutations give by chance.

    Source: Gretton et al., A Kernel Two-Sample Difference, JMLR 2012, eq. 5 (biased estimate) and section 3.
    """
    kernel_AA = _kernel(np.concatenate([baseline_NF, window_MF]))
    old, new = len(baseline_NF), len(window_MF)
    seen = float(_discrepancy(kernel_AA, _weights(np.arange(old + new)[None], new)).item())
    beyond = done = 0
    while done < resamplings:
        count = min(_CHUNK, resamplings - done)
        order_RA = rng.permuted(np.tile(np.arange(old + new), (count, 1)), axis=1)
        beyond += int((_discrepancy(kernel_AA, _weights(order_RA, new)) >= seen * (1 - 1e-9)).sum())
        done += count
    shuffled = [_witness_distance(kernel_AA, rng.permutation(old + new), new) for _ in range(20)]
    chance = float(np.mean(shuffled))
    effect = max(0.0, (_witness_distance(kernel_AA, np.arange(old + new), new) - chance) / max(1e-9, 1.0 - chance))
    return Difference((1 + beyond) / (resamplings + 1), effect)


def uniform(
    p_values: Mapping[str, Floats], num_normals: Mapping[str, int], above: float, resamplings: int,
    rng: np.random.Generator,
) -> Difference:  # fmt: skip
    """Ask whether conformal p-values above a level are uniform there, as those of normal images are.

    Abnormal images have small p-values; leaving out those up to `above` leaves the question to the normals, whatever
    share of the stream they are. The null distribution draws calibration sets of the same sizes too, since p-values
    of one calibration set depend on each other through it.

    Args:
        p_values: by stratum.
        num_normals: size of each stratum's calibration set.
        above: level in (0, 1).
        resamplings: draws of the null distribution.
        rng: source of the draws.

    Source: Vovk et al., Algorithmic Learning in a Random World, 2005 (validity); Bates et al., arXiv:2104.08279
    (dependence through the calibration set).
    """
    kept = {name: values[values > above] for name, values in p_values.items()}
    if not any(len(values) for values in kept.values()):  # each uniform p-value is that small with probability `above`
        count = sum(len(values) for values in p_values.values())
        return Difference(max(above**count, 1 / (resamplings + 1)), 1.0)
    seen = _distance_to_uniform(np.concatenate(list(kept.values())), above)
    drawn = np.empty(resamplings)
    sizes = {name: round(len(values) / (1.0 - above)) for name, values in kept.items() if len(values)}
    for index in range(resamplings):
        parts = [_conformal(rng, num_normals[name], size) for name, size in sizes.items()]
        drawn[index] = _distance_to_uniform(np.concatenate(parts), above)
    return Difference((1 + int((drawn >= seen - 1e-12).sum())) / (resamplings + 1), seen)


def _conformal(rng: np.random.Generator, num_normals: int, count: int) -> Floats:
    """Return p-values of `count` exchangeable images against one calibration set."""
    normals = np.sort(rng.random(num_normals))
    at_least = num_normals - np.searchsorted(normals, rng.random(count))
    return ((1.0 + at_least) / (num_normals + 1.0)).astype(np.float64)


def _distance_to_uniform(p_values: Floats, above: float) -> float:
    kept = np.sort(p_values[p_values > above])
    if not kept.size:
        return 1.0
    level = (kept - above) / (1.0 - above)
    steps = np.arange(kept.size + 1) / kept.size
    return float(max(np.abs(level - steps[1:]).max(), np.abs(level - steps[:-1]).max()))


def _kernel(vectors_AF: Floats) -> Floats:
    centred = vectors_AF - vectors_AF.mean(0)
    spread_F = centred.std(0)
    centred = centred[:, spread_F > 1e-12] / spread_F[spread_F > 1e-12]
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left[:, :PRINCIPAL] * sizes[:PRINCIPAL]
    square = np.square(scores).sum(1)
    distance_AA = np.maximum(square[:, None] + square[None] - 2 * scores @ scores.T, 0)
    middle = float(np.median(distance_AA[np.triu_indices(len(scores), 1)])) or 1.0
    return np.exp(-distance_AA / middle)


def _weights(order_RA: NDArray[np.int64], new: int) -> Floats:
    """Return w with w' K w = MMD²: 1 / M at the last `new` of each order, -1 / N at the others."""
    old = order_RA.shape[1] - new
    weights = np.full(order_RA.shape, -1.0 / old)
    np.put_along_axis(weights, order_RA[:, old:], 1.0 / new, axis=1)
    return weights


def _discrepancy(kernel_AA: Floats, weights_RA: Floats) -> Floats:
    return ((weights_RA @ kernel_AA) * weights_RA).sum(1)


def _witness_distance(kernel_AA: Floats, order_A: NDArray[np.int64], new: int) -> float:
    """Return the Kolmogorov-Smirnov distance between the witness function's values on the two samples."""
    weights_A = _weights(order_A[None], new)[0]
    # Summed in the order of the witness's values, the weights are the difference of the two distribution functions.
    return float(np.abs(np.cumsum(weights_A[np.argsort(kernel_AA @ weights_A)])).max())
