"""Statistics of stored pixels that a change of window, gain, detector or resolution moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "darkest 1 %", "lower quartile", "median", "upper quartile", "brightest 1 %", "mean", "spread",
    "share at black", "share at white", "sharpness",
)  # fmt: skip


def pixel_statistics(images_NHW: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Return (N,) of each statistic of grey images in [0, 1].

    Sharpness is the standard deviation of the differences between neighbours over that of the image: noise, blur and
    resampling move it, gain and offset do not.
    """
    flat_NP = images_NHW.reshape(len(images_NHW), -1).astype(np.float64)
    spread_N = flat_NP.std(1)
    steps_N = np.sqrt(
        (np.square(np.diff(images_NHW, axis=1)).mean((1, 2)) + np.square(np.diff(images_NHW, axis=2)).mean((1, 2))) / 2
    ).astype(np.float64)
    columns = [
        *np.quantile(flat_NP, (0.01, 0.25, 0.5, 0.75, 0.99), axis=1),
        flat_NP.mean(1),
        spread_N,
        (flat_NP <= 0).mean(1),
        (flat_NP >= 1).mean(1),
        steps_N / np.maximum(spread_N, 1e-9),
    ]
    return dict(zip(NAMES, columns, strict=True))
