"""Where a place of the stored square lies in the original image, and back; the counterpart of `resample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fit = Literal["stretch", "pad", "crop"]


@dataclass(frozen=True)
class Box:
    """A rectangle, px from the top left corner of the image; edges lie between pixels."""

    x_px: float
    y_px: float
    width_px: float
    height_px: float


@dataclass(frozen=True)
class Geometry:
    """How an image of `rows` x `columns` became a square of `side`, by `data.fit`."""

    rows: int
    columns: int
    side: int
    fit: Fit

    def to_image(self, box: Box) -> Box:
        """Return a box of the stored square in the original image, cut to the image."""
        (left, across), (top, down) = self._axis(self.columns), self._axis(self.rows)
        x0, x1 = (min(max(left + across * x, 0.0), self.columns) for x in (box.x_px, box.x_px + box.width_px))
        y0, y1 = (min(max(top + down * y, 0.0), self.rows) for y in (box.y_px, box.y_px + box.height_px))
        return Box(x0, y0, x1 - x0, y1 - y0)

    def to_stored(self, box: Box) -> Box:
        """Return a box of the original image in the stored square, cut to the square."""
        (left, across), (top, down) = self._axis(self.columns), self._axis(self.rows)
        x0, x1 = (min(max((x - left) / across, 0.0), self.side) for x in (box.x_px, box.x_px + box.width_px))
        y0, y1 = (min(max((y - top) / down, 0.0), self.side) for y in (box.y_px, box.y_px + box.height_px))
        return Box(x0, y0, x1 - x0, y1 - y0)

    def _axis(self, size: int) -> tuple[float, float]:
        """Return offset and factor: ``image = offset + factor * stored``."""
        if self.fit == "pad":
            inner = max(1, round(size * self.side / max(self.rows, self.columns)))
            factor = size / inner
            return -factor * ((self.side - inner) // 2), factor
        span = min(self.rows, self.columns) if self.fit == "crop" else size
        return (size - span) / 2, span / self.side
