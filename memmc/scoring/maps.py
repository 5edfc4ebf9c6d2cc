"""Anomaly maps: storage, display on one fixed colour scale, regions.

A map is (H, W), at least 0, higher = more abnormal. Its colours run from 0 to the
calibration's `map_scale`, the same for every image, so that a normal image stays
dark: stretching each image to its own maximum paints alarms on healthy ones.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from memmc.errors import DataError

Floats = NDArray[np.floating]

MAP_SCALE_QUANTILE = 0.995
FLOAT16_MAX = float(np.finfo(np.float16).max)
# Black-red-yellow-white in four straight pieces: position on the scale, red, green, blue.
HEAT_STOPS = ((0.0, 0, 0, 0), (0.35, 200, 0, 30), (0.7, 255, 160, 0), (1.0, 255, 255, 230))
MAX_ALPHA = 0.6


@dataclass(frozen=True)
class Region:
    """A connected part of a map at or above a level.

    Attributes:
        x_px, y_px: left and top edge.
        width_px, height_px: extent.
        area_px: pixels in the part.
        peak: highest map value in it.
    """

    x_px: int
    y_px: int
    width_px: int
    height_px: int
    area_px: int
    peak: float


def encode_map(anomaly_map_HW: Floats) -> bytes:
    """Return the map as little-endian float16, row by row; values past float16's range are cut to it.

    Raises:
        DataError: the map holds a value that is not finite.
    """
    if not np.isfinite(anomaly_map_HW).all():
        raise DataError("the anomaly map holds values that are not finite")
    return np.clip(anomaly_map_HW, -FLOAT16_MAX, FLOAT16_MAX).astype("<f2").tobytes()


def decode_map(data: bytes, height: int, width: int) -> NDArray[np.float32]:
    """Return the map (height, width) that `encode_map` stored.

    Raises:
        DataError: the bytes are not height x width float16 values.
    """
    if len(data) != 2 * height * width:
        raise DataError(
            f"anomaly map of {len(data)} bytes; {height} x {width} float16 values take {2 * height * width}"
        )
    return np.frombuffer(data, dtype="<f2").reshape(height, width).astype(np.float32)


def map_scale(normal_maps_NHW: Floats) -> float:
    """Return the 99.5 % pixel quantile over held-out normals, the top of the colour scale; always above 0.

    Raises:
        DataError: there is no map.
    """
    if normal_maps_NHW.size == 0:
        raise DataError("no maps of held-out normals; the colour scale needs at least one")
    return max(float(np.quantile(normal_maps_NHW, MAP_SCALE_QUANTILE)), 1e-6)


def heat_colours(anomaly_map_HW: Floats, scale: float) -> tuple[NDArray[np.uint8], Floats]:
    """Return colours (H, W, 3) and opacity (H, W) in [0, 1] of a map on the scale 0 .. `scale`."""
    level_HW = np.clip(anomaly_map_HW.astype(np.float64) / scale, 0.0, 1.0)
    stops = np.array(HEAT_STOPS)
    channels = [np.interp(level_HW, stops[:, 0], stops[:, 1 + c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8), MAX_ALPHA * level_HW


def overlay(image_HW: Floats, anomaly_map_HW: Floats, scale: float, side: int | None = None) -> NDArray[np.uint8]:
    """Return the grey image with the heat laid over it, RGB (H, W, 3).

    Args:
        image_HW: in [0, 1]; colour images are (H, W, C) and shown by their mean.
        anomaly_map_HW: of the image's size or another; it is brought to the image's bilinearly.
        scale: top of the colour scale, `map_scale` of the calibration.
        side: longer side of the picture, px; the image's own when absent.

    Raises:
        DataError: `scale` is not above 0.
    """
    from PIL import Image

    if not scale > 0:
        raise DataError(f"colour scale of {scale}; expected the calibration's map_scale, above 0")
    grey_HW = image_HW.mean(-1) if image_HW.ndim == 3 else image_HW
    height, width = grey_HW.shape
    if side is not None:
        height, width = (max(1, round(n * side / max(grey_HW.shape))) for n in grey_HW.shape)
    bilinear = Image.Resampling.BILINEAR
    grey = Image.fromarray(np.clip(grey_HW, 0, 1).astype(np.float32)).resize((width, height), bilinear)
    heat = Image.fromarray(anomaly_map_HW.astype(np.float32)).resize((width, height), bilinear)
    colours, alpha = heat_colours(np.asarray(heat), scale)
    mixed = np.asarray(grey)[..., None] * 255.0 * (1 - alpha[..., None]) + colours * alpha[..., None]
    return mixed.round().astype(np.uint8)


def overlay_png(image_HW: Floats, anomaly_map_HW: Floats, scale: float, side: int | None = None) -> bytes:
    """Return `overlay` as PNG."""
    return png(overlay(image_HW, anomaly_map_HW, scale, side))


def png(picture_HW3: NDArray[np.uint8]) -> bytes:
    """Return an RGB picture as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture_HW3, mode="RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def regions(anomaly_map_HW: Floats, level: float, min_area_px: int = 1, max_regions: int | None = None) -> list[Region]:
    """Return the 8-connected parts at or above `level`, highest peak first."""
    from scipy import ndimage

    labelled, _ = cast(
        tuple[NDArray[np.int32], int], ndimage.label(anomaly_map_HW >= level, structure=np.ones((3, 3), int))
    )
    found: list[Region] = []
    for index, box in enumerate(ndimage.find_objects(labelled), start=1):
        inside = labelled[box] == index
        area = int(inside.sum())
        if area < min_area_px:
            continue
        rows, columns = box
        found.append(
            Region(
                x_px=int(columns.start),
                y_px=int(rows.start),
                width_px=int(columns.stop - columns.start),
                height_px=int(rows.stop - rows.start),
                area_px=area,
                peak=float(anomaly_map_HW[box][inside].max()),
            )
        )
    found.sort(key=lambda region: (-region.peak, region.y_px, region.x_px))
    return found[:max_regions]
