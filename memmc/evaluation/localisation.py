"""How well anomaly maps agree with lesion masks, pixel by pixel and region by region.

Maps are stored as float16, which has 65,536 values (V): counting pixels per value is
exact for them and needs constant memory, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.errors import DataError
from memmc.evaluation.metrics import BoolArray, need_both

NUM_VALUES = 1 << 16


def pixel_auroc(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> float:
    """Return the AUROC over all pixels of all images, in constant memory.

    Counts per float16 value, the precision in which maps are stored, so it is exact for stored maps.

    Args:
        maps: (H, W) anomaly maps, higher is more abnormal.
        masks: (H, W), true on abnormal pixels, in the same order.

    Raises:
        DataError: no abnormal or no normal pixel, unequal shapes or numbers, or a map with NaN.
    """
    abnormal_V, normal_V = np.zeros(NUM_VALUES), np.zeros(NUM_VALUES)
    for values, mask in _pixels(maps, masks):
        abnormal_V += np.bincount(values[mask], minlength=NUM_VALUES)
        normal_V += np.bincount(values[~mask], minlength=NUM_VALUES)
    need_both(abnormal_V.sum(), normal_V.sum(), "pixels")
    below_V = np.cumsum(normal_V) - normal_V
    return float((abnormal_V * (below_V + normal_V / 2)).sum() / (abnormal_V.sum() * normal_V.sum()))


def aupro(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike], max_false_positive_rate: float = 0.3) -> float:
    """Return the area under per-region overlap against pixel false-positive rate, divided by its width.

    Every connected region counts the same whatever its size. Exact for maps stored as float16; 1 is perfect.

    Args:
        maps: (H, W) anomaly maps, higher is more abnormal.
        masks: (H, W), true on abnormal pixels, in the same order.
        max_false_positive_rate: where the integral ends, in (0, 1].

    Raises:
        DataError: as `pixel_auroc`.

    Source: Bergmann et al., IJCV 129 (2021), section 5.
    """
    from scipy.ndimage import label

    overlap_V, normal_V, num_regions = np.zeros(NUM_VALUES), np.zeros(NUM_VALUES), 0
    for values, mask in _pixels(maps, masks):
        labelled: Any = label(mask, structure=np.ones((3, 3)))
        regions, num = labelled
        sizes = np.bincount(regions.ravel(), minlength=num + 1)
        overlap_V += np.bincount(values[mask], weights=1 / sizes[regions[mask]], minlength=NUM_VALUES)
        normal_V += np.bincount(values[~mask], minlength=NUM_VALUES)
        num_regions += int(num)
    need_both(num_regions, normal_V.sum(), "pixels")
    fpr_V = np.concatenate([[0.0], np.cumsum(normal_V[::-1]) / normal_V.sum()])
    pro_V = np.concatenate([[0.0], np.cumsum(overlap_V[::-1]) / num_regions])
    inside = fpr_V < max_false_positive_rate
    end = np.interp(max_false_positive_rate, fpr_V, pro_V)
    x, y = np.append(fpr_V[inside], max_false_positive_rate), np.append(pro_V[inside], end)
    return float(np.trapezoid(y, x) / max_false_positive_rate)


def dice(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike], level: float) -> float:
    """Return the mean over images of the Dice coefficient of ``map > level`` with the mask.

    Args:
        maps: (H, W) anomaly maps.
        masks: (H, W), in the same order, each with at least one abnormal pixel.
        level: from the calibration; never chosen on these images.

    Raises:
        DataError: no image, a mask without an abnormal pixel, or as `pixel_auroc`.
    """
    above = _order(np.asarray(np.float16(level)))
    if float(np.float16(level)) > level:  # float16 rounded it up: its own value is already above the level
        above -= 1
    values: list[float] = []
    for ordered, mask in _pixels(maps, masks):
        need_both(mask.sum(), 1, "pixels")
        found = ordered > above
        values.append(2.0 * float((found & mask).sum()) / float(found.sum() + mask.sum()))
    need_both(len(values), 1, "images")
    return float(np.mean(values))


@dataclass(frozen=True)
class PixelFigures:
    """Agreement of maps with lesion masks; `dice` is None where the calibration names no level."""

    pixel_auroc: float
    aupro: float
    dice: float | None


def pixel_figures(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], level: float | None, seed: int = 0
) -> dict[str, PixelFigures]:
    """Return the figures of the maps, and of the same values elsewhere in the image, which need no model.

    `random box`: each map's values, highest first, in growing squares around a random place. `centre prior`: the
    same around the middle of the image. Both flag as many pixels as the map does, at the same level.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(item) for item in maps]
    sets = {
        "model": arrays,
        "random box": [moved(item, rng.random(2)) for item in arrays],
        "centre prior": [moved(item, np.array([0.5, 0.5])) for item in arrays],
    }
    return {
        name: PixelFigures(
            pixel_auroc(chosen, masks), aupro(chosen, masks), None if level is None else dice(chosen, masks, level)
        )
        for name, chosen in sets.items()
    }


def moved(map_HW: NDArray[Any], centre: NDArray[np.float64]) -> NDArray[Any]:
    """Return the map's values in squares around a place, the highest innermost.

    Args:
        map_HW: any map.
        centre: share of height and of width, in [0, 1].
    """
    height, width = map_HW.shape
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    distance = np.maximum(np.abs(rows - centre[0] * height)[:, None], np.abs(columns - centre[1] * width)[None])
    result = np.empty(map_HW.size, map_HW.dtype)
    result[np.argsort(distance, axis=None, kind="stable")] = np.sort(map_HW, axis=None)[::-1]
    return result.reshape(height, width)


def _pixels(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> Iterator[tuple[NDArray[np.uint16], BoolArray]]:
    """Yield each map as integers in the order of its float16 values, and its mask."""
    try:
        for anomaly_map, mask in zip(maps, masks, strict=True):
            half, mask_HW = np.asarray(anomaly_map).astype(np.float16) + np.float16(0), np.asarray(mask, dtype=bool)
            if half.shape != mask_HW.shape or np.isnan(half).any():
                raise DataError(f"pixel metrics: map {half.shape}, mask {mask_HW.shape}; expected equal shapes, no NaN")
            yield _order(half), mask_HW
    except ValueError as error:
        raise DataError(f"pixel metrics: {error}; give one mask per map") from None


def _order(half: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Return integers in the order of float16 values; both zeros are one."""
    bits = (half + np.float16(0)).view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | 0x8000).astype(np.uint16)
