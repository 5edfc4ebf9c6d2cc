"""Reduction of an image to S x S, a stripe of rows at a time.

The filter is a triangle that widens with the reduction: nothing aliases, and
without negative lobes no value leaves the range and no edge rings. Rows go
first, as a product of a few weights with a stripe that is still in the
processor's cache, so the grey image never exists at its own size.

Grey levels are whole numbers of 16 bits and weights whole multiples of 2**-18, so every
product and sum fits the 53 bits of a double and is exact: an image becomes the
same pixels on every processor and with any matrix library.

Shapes: H, W the image's rows and columns; S = data.image_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memmc.config import DataConfig

STRIPE_ROWS = 32  # x 3,000 columns of float64 stay in a second-level cache
WHITE = 65_535
"""The grey level of white; black is 0."""

_WEIGHT_UNITS = 1 << 18

Levels = NDArray[np.float64]
"""Grey levels: whole numbers in [0, WHITE]."""


def resample(rows: Callable[[int, int], Levels], height: int, width: int, data: DataConfig) -> NDArray[np.float64]:
    """Bring an image to S x S as `data.fit` says.

    Args:
        rows: returns the rows from top to bottom - 1, shape (bottom - top, W); the array may be used again.
        height: H.
        width: W.
        data: `image_size` and `fit`.

    Returns:
        Grey levels with fractions, shape (S, S), within the range of the image.
    """
    side = data.image_size
    if data.fit == "pad":
        scale = side / max(height, width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        padded_SS = np.zeros((side, side))
        top, left = (side - inner_height) // 2, (side - inner_width) // 2
        inner = _reduce(rows, triangle(height, inner_height), triangle(width, inner_width))
        padded_SS[top : top + inner_height, left : left + inner_width] = inner
        return padded_SS
    short = min(height, width) if data.fit == "crop" else 0
    spans = [((size - short) / 2, (size + short) / 2) if short else (0.0, float(size)) for size in (height, width)]
    return _reduce(rows, triangle(height, side, *spans[0]), triangle(width, side, *spans[1]))


@functools.lru_cache(maxsize=16)
def triangle(size: int, side: int, start: float = 0.0, stop: float | None = None) -> NDArray[np.float64]:
    """Return the weights that reduce `size` samples, of which [start, stop) count, to `side`.

    Returns:
        Shape (side, size), whole multiples of 2**-18 in units of 2**-18; a row sums to 2**18. Not to be written to:
        images of one size share it.
    """
    stop = float(size) if stop is None else stop
    scale = (stop - start) / side
    centres = start + (np.arange(side) + 0.5) * scale
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    units = np.rint(weights / weights.sum(1, keepdims=True) * _WEIGHT_UNITS)
    units[np.arange(side), units.argmax(1)] += _WEIGHT_UNITS - units.sum(1)
    units.setflags(write=False)
    return units


def _reduce(
    rows: Callable[[int, int], Levels], vertical_SH: NDArray[np.float64], horizontal_SW: NDArray[np.float64]
) -> NDArray[np.float64]:
    height, width = vertical_SH.shape[1], horizontal_SW.shape[1]
    reduced_SW = np.zeros((vertical_SH.shape[0], width))
    for top in range(0, height, STRIPE_ROWS):
        bottom = min(top + STRIPE_ROWS, height)
        weights = vertical_SH[:, top:bottom]
        touched = np.flatnonzero(weights.any(1))
        if touched.size:
            first, last = touched[0], touched[-1] + 1
            reduced_SW[first:last] += weights[first:last] @ rows(top, bottom)
    return (reduced_SW @ horizontal_SW.T) / _WEIGHT_UNITS**2
