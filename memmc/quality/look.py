"""One look at one image: what is wrong with it alone, and what the cohort compares of it.

Shapes: H, W the stored image; T = `THUMBNAIL_SIDE`; a thumbnail's T x T values
have mean 0 and standard deviation 1 before they are rounded, so that exposure
and window do not count, and the shape of the grey levels does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from memmc.config import QualityConfig
from memmc.quality.flags import CONSTANT, SATURATED, TOO_SMALL, in_order

THUMBNAIL_SIDE = 16
LOOK_FORMAT = 1
"""Number of the way thumbnails and hashes are made; a new way looks at every image again."""

_HASH_SIDE = 32
_STEPS_PER_SD = 24.0  # of a thumbnail's value; int8 ends at 5.3 standard deviations


@dataclass(frozen=True)
class Look:
    """What one image shows.

    Attributes:
        flags: QC_* codes that follow from the image alone.
        perceptual_hash: 16 hex digits, 64 bits; pictures that look the same differ in few of them.
        thumbnail: int8, T x T, C order.
    """

    flags: tuple[str, ...]
    perceptual_hash: str
    thumbnail: bytes


def look(image_HW: NDArray[np.generic], top: int, rows: int | None, columns: int | None, rules: QualityConfig) -> Look:
    """Look at one stored image.

    Args:
        image_HW: grey levels.
        top: the brightest level, 2**bits - 1.
        rows: (0028,0010) of the object, px; None when it is not known.
        columns: (0028,0011) of the object, px.
        rules: thresholds.
    """
    grey_HW = image_HW.astype(np.float32)
    found: set[str] = set()
    if grey_HW.min() == grey_HW.max():
        found.add(CONSTANT)
    elif max((grey_HW <= 0).mean(), (grey_HW >= top).mean()) > rules.max_saturated:
        found.add(SATURATED)
    if min(rows or rules.min_side_px, columns or rules.min_side_px) < rules.min_side_px:
        found.add(TOO_SMALL)
    return Look(in_order(found), _hash(grey_HW), _thumbnail(grey_HW).tobytes())


def thumbnails_from_bytes(thumbnails: list[bytes]) -> NDArray[np.float32]:
    """Return thumbnails_NTT of `Look.thumbnail`s, mean 0 and standard deviation 1 each; constant ones are 0."""
    side = THUMBNAIL_SIDE
    return standardised(np.frombuffer(b"".join(thumbnails), np.int8).reshape(-1, side, side))


def standardised(images_NHW: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return images with mean 0 and standard deviation 1 each; constant ones are 0."""
    grey_NHW = images_NHW.astype(np.float32)
    grey_NHW = grey_NHW - grey_NHW.mean(axis=(1, 2), keepdims=True)
    deviation_N11 = grey_NHW.std(axis=(1, 2), keepdims=True)
    return grey_NHW / np.where(deviation_N11 > 0, deviation_N11, 1)


def _thumbnail(grey_HW: NDArray[np.float32]) -> NDArray[np.int8]:
    small_TT = standardised(_shrink(grey_HW, THUMBNAIL_SIDE)[None])[0]
    return np.rint(small_TT * _STEPS_PER_SD).clip(-127, 127).astype(np.int8)


def _hash(grey_HW: NDArray[np.float32]) -> str:
    """Return the signs of 8 x 8 low frequencies of the cosine transform, about their median; the constant rows and
    columns of frequency 0 are left out, since borders and exposure dominate them."""
    low_FF = np.asarray(dctn(_shrink(grey_HW, _HASH_SIDE), norm="ortho"))[1:9, 1:9]
    bits = np.packbits((low_FF > np.median(low_FF)).ravel())
    return bits.tobytes().hex()


def _shrink(grey_HW: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return the image at side x side: means over areas, fractional borders included."""
    return (_areas(grey_HW.shape[0], side) @ grey_HW @ _areas(grey_HW.shape[1], side).T).astype(np.float32)


@functools.cache
def _areas(size: int, side: int) -> NDArray[np.float32]:
    """Return weights (side, size): the share of each pixel in each of `side` equal stretches, rows summing to 1."""
    edges = np.linspace(0, size, side + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(size)[None]
    overlap = np.minimum(pixel + 1, right) - np.maximum(pixel, left)
    return (overlap.clip(0) * (side / size)).astype(np.float32)
