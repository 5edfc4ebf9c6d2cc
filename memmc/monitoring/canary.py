"""Planted lesions of known size and contrast: what a model is asked to find in scans that are normal.

Shape legend: H, W the stored image; h, w the lesion's shadow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.phantom.lesions import Lesion, place
from memmc.phantom.projection import Rays, cross, union_length
from memmc.phantom.thorax import build_thorax

Floats = NDArray[np.float32]

# Where both lungs lie on a frontal chest film, shares of the side; on other images merely two places off the middle.
_COLUMNS = ((0.20, 0.40), (0.60, 0.80))
_ROWS = (0.25, 0.60)
_REACH = 0.62  # of the diameter, from the centre to beyond the lobulations


@dataclass(frozen=True)
class Planted:
    """One lesion to plant: its diameter and brightness as shares, and a seed that fixes place and shape."""

    size: float
    contrast: float
    seed: int


@dataclass(frozen=True)
class Sensitivity:
    """A share found, with an interval; scans are what is drawn, since lesions on one scan fare alike."""

    sensitivity: float
    low: float
    high: float


def shadow(seed: int, diameter_px: float) -> Floats:
    """Return (h, w) in [0, 1]: path lengths through a lobulated nodule seen along parallel rays, its longest 1."""
    nodule = place(Lesion("nodule", seed), build_thorax(seed))
    middle = np.stack([body.center for body in nodule.bodies]).mean(axis=0)
    half = max(1, int(np.ceil(_REACH * diameter_px)))
    offset_mm = np.arange(-half, half + 1, dtype=np.float32) * np.float32(nodule.size_mm / diameter_px)
    across, down = (axis.ravel() for axis in np.meshgrid(offset_mm, offset_mm))
    point = np.stack([middle[0] + across, np.full_like(across, middle[1]), middle[2] - down]).astype(np.float32)
    direction = np.broadcast_to(np.array([[0], [-1], [0]], np.float32), point.shape)
    path = union_length([cross(body, Rays(point, direction)) for body in nodule.bodies])
    path_hw = path.reshape(2 * half + 1, 2 * half + 1).astype(np.float32)
    return path_hw / max(float(path_hw.max()), 1e-6)


def plant(image_HW: Floats, lesion: Planted) -> Floats:
    """Return a copy with a lesion; grey values in [0, 1], dense tissue bright.

    A film for presentation is about linear in the logarithm of the exposure, so a path through something dense adds
    grey in proportion to its length. At its thickest the lesion adds `contrast` times the image's 10 - 90 % range.
    """
    height, width = image_HW.shape
    rng = np.random.default_rng([lesion.seed, 7])
    columns = _COLUMNS[int(rng.integers(2))]
    row, column = round(height * rng.uniform(*_ROWS)), round(width * rng.uniform(*columns))
    shadow_hw = shadow(lesion.seed, lesion.size * min(height, width))
    half = shadow_hw.shape[0] // 2
    top, left = max(0, row - half), max(0, column - half)
    bottom, right = min(height, row + half + 1), min(width, column + half + 1)
    part = shadow_hw[top - row + half : bottom - row + half, left - column + half : right - column + half]
    dark, bright = np.quantile(image_HW, (0.10, 0.90))
    planted = image_HW.copy()
    planted[top:bottom, left:right] += np.float32(lesion.contrast * float(bright - dark)) * part
    return planted.clip(0, 1)


def sensitivity(found_by_scan: Iterable[float], confidence: float, seed: int, resamplings: int = 2000) -> Sensitivity:
    """Return the mean share found per scan, and its percentile interval over bootstrapped scans."""
    shares_N = np.array(list(found_by_scan), np.float64)
    draw = np.random.default_rng(seed).integers(len(shares_N), size=(resamplings, len(shares_N)))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(shares_N[draw].mean(1), (tail, 1.0 - tail))
    return Sensitivity(float(shares_N.mean()), float(low), float(high))


def chance_of_no_fall(before_by_scan: ArrayLike, now_by_scan: ArrayLike) -> float:
    """Return the one-sided p-value of shares found now being no lower than before (Mann and Whitney, ties corrected).

    Args:
        before_by_scan: share of the lesions found in each scan, at promotion.
        now_by_scan: the same, now, in other scans.
    """
    from scipy.stats import mannwhitneyu

    before, now = (np.asarray(values, np.float64) for values in (before_by_scan, now_by_scan))
    if np.ptp(np.concatenate([before, now])) == 0:
        return 1.0
    return float(mannwhitneyu(now, before, alternative="less").pvalue)
