"""Pictures with the gross look of a frontal chest radiograph, drawn in a moment: for tests of the quality gate."""

from __future__ import annotations

import numpy as np

TOP = 65535


def chest(seed: int, side: int = 64) -> np.ndarray:
    """Return one, uint16: two dark lungs, a heart to the right of the middle, dark air beside the shoulders."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]

    def ellipse(cy: float, cx: float, ry: float, rx: float) -> np.ndarray:
        cy, cx, ry, rx = (v + 0.02 * rng.standard_normal() for v in (cy, cx, ry, rx))
        return 1 / (1 + np.exp(12 * (np.hypot((y - cy) / ry, (x - cx) / rx) - 1)))

    grey = 0.75 - 0.5 * ellipse(0.45, 0.3, 0.33, 0.15) - 0.5 * ellipse(0.45, 0.7, 0.33, 0.15)
    grey += (
        0.3 * ellipse(0.6, 0.57, 0.17, 0.14) - 0.5 * ellipse(0.0, 0.03, 0.22, 0.2) - 0.5 * ellipse(0.0, 0.97, 0.22, 0.2)
    )
    grey += 0.03 * rng.standard_normal() * np.sin(6 * x + rng.uniform(0, 6)) + 0.02 * rng.standard_normal(grey.shape)
    return np.rint(grey.clip(0, 1) * TOP).astype(np.uint16)
