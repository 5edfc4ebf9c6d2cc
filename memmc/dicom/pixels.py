"""Pixel Data to the stored image: decode -> grey -> fit -> resize -> unsigned integers.

The output range is fixed by the header (window output, or the stored range
after the Modality LUT); the image's own extremes never enter, so equal pixels
stay equal between images.

Shapes: H, W the instance's rows and columns; S = data.image_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from memmc.config import DataConfig
from memmc.dicom.decode import Geometry, bit_patterns, decode_frame
from memmc.dicom.grey import frame_header, grey_table
from memmc.dicom.read import Instance, texts
from memmc.dicom.reasons import Rejected
from memmc.dicom.resample import STRIPE_ROWS, WHITE, Levels, resample

_LUMA = np.array((299, 587, 114))  # thousandths; ITU-R BT.601, the Y of PS3.3 C.7.6.3.1.2

_SHAPES = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")  # of a pixel, down and across
_MOST_OBLONG = 1.01  # by rounding

GreyRows = Callable[[int, int], Levels]
"""Gives the rows from top to bottom - 1, at most `STRIPE_ROWS`, as display grey; valid until the next call."""


@dataclass(frozen=True)
class Prepared:
    """Stored images: little-endian unsigned pixels, C-order, shape (frames, height, width, channels)."""

    pixels: bytes
    frames: int
    height: int
    width: int
    channels: int
    bits: int


def prepare(
    instance: Instance,
    geometry: Geometry,
    data: DataConfig,
    frames: Sequence[int] = (0,),
    inspect: Callable[[NDArray[np.uint8]], None] | None = None,
) -> Prepared:
    """Decode frames of one instance and prepare them as `data` says.

    Args:
        instance: with pixels.
        geometry: of the instance, checked.
        data: what to prepare.
        frames: 0-based.
        inspect: called with each frame at its own size, 0 black .. 255 white, shape (H, W); may raise `Rejected`.

    Raises:
        Rejected: META_DIMENSIONS, a PIX_* code, or what `inspect` raises. Decoders raise what they like besides.
    """
    if data.fit != "stretch" and not has_square_pixels(instance.dataset):
        raise Rejected("META_DIMENSIONS")
    top = (1 << data.bits) - 1
    images: list[bytes] = []
    for frame in frames:
        rows = _grey(instance, geometry, data, frame)
        if inspect is not None:
            inspect(_bytes(rows, geometry))
        levels_SS = resample(rows, geometry.rows, geometry.columns, data)
        pixels_SS = np.rint(levels_SS * top / WHITE).astype("<u2" if data.bits == 16 else "u1")
        images.append(pixels_SS.tobytes())
    return Prepared(b"".join(images), len(images), data.image_size, data.image_size, 1, data.bits)


def has_square_pixels(dataset: Dataset) -> bool:
    """Tell whether pixels are square by every spacing and aspect ratio there is: PS3.3 C.7.6.3.1.7."""
    for keyword in _SHAPES:
        try:
            down, across = (float(value) for value in texts(dataset, keyword))
        except (ValueError, TypeError):  # absent, or no two numbers
            continue
        if min(down, across) > 0 and max(down, across) > _MOST_OBLONG * min(down, across):
            return False
    return True


def frames_to_store(geometry: Geometry, policy: Literal["each", "middle", "refuse"]) -> tuple[int, ...]:
    """Return the 0-based frames that `select.frames` stores; of an even number, the later of the two in the middle."""
    return tuple(range(geometry.frames)) if policy == "each" else (geometry.frames // 2,)


def grey_image(instance: Instance, geometry: Geometry, data: DataConfig, frame: int = 0) -> NDArray[np.float32]:
    """Decode one frame to display grey at its own size: float32, shape (H, W), 0 black .. 1 white.

    Raises:
        Rejected: a PIX_* code. Decoders raise what they like besides.
    """
    rows = _grey(instance, geometry, data, frame)
    grey_HW = np.empty((geometry.rows, geometry.columns), dtype=np.float32)
    for top in range(0, geometry.rows, STRIPE_ROWS):
        bottom = min(top + STRIPE_ROWS, geometry.rows)
        grey_HW[top:bottom] = rows(top, bottom) / WHITE
    return grey_HW


def _bytes(rows: GreyRows, geometry: Geometry) -> NDArray[np.uint8]:
    """Return the whole image as bytes."""
    bytes_HW = np.empty((geometry.rows, geometry.columns), dtype=np.uint8)
    for top in range(0, geometry.rows, STRIPE_ROWS):
        stripe = rows(top, min(top + STRIPE_ROWS, geometry.rows))
        bytes_HW[top : top + len(stripe)] = stripe * (255 / WHITE) + 0.5
    return bytes_HW


def _grey(instance: Instance, geometry: Geometry, data: DataConfig, frame: int) -> GreyRows:
    """Decode one frame; return what gives its rows as display grey."""
    decoded, photometric = decode_frame(instance, geometry, frame)
    if geometry.samples == 3:
        luminance_HW = _luminance(decoded, photometric, geometry.bits_stored)
        return lambda top, bottom: luminance_HW[top:bottom]
    if geometry.photometric == "PALETTE COLOR":
        table_V = _palette_table(instance, geometry)
    else:
        table_V = grey_table(
            frame_header(instance.dataset, frame),
            geometry.bits_stored,
            geometry.signed,
            instance.little_endian,
            data.window,
        )
    return _grey_rows(decoded, np.rint(table_V * WHITE))


def _grey_rows(decoded_HW: NDArray[np.generic], table_V: Levels) -> GreyRows:
    """Return what maps rows of bit patterns through the table, into one array that each call fills anew.

    Bits above the table's size (overlays, sign) are masked off: PS3.5 8.1.1.
    """
    bits_HW = bit_patterns(decoded_HW)
    mask = bits_HW.dtype.type(table_V.size - 1)
    masked = table_V.size < 1 << (bits_HW.dtype.itemsize * 8)
    shape = (STRIPE_ROWS, bits_HW.shape[1])
    low, index, grey = np.empty(shape, bits_HW.dtype), np.empty(shape, dtype=np.intp), np.empty(shape)

    def rows(top: int, bottom: int) -> Levels:
        window = index[: bottom - top]
        bits = bits_HW[top:bottom]
        np.copyto(window, np.bitwise_and(bits, mask, out=low[: bottom - top]) if masked else bits)
        return np.take(table_V, window, out=grey[: bottom - top], mode="clip")

    return rows


def _luminance(decoded_HW3: NDArray[np.generic], photometric: str, bits_stored: int) -> Levels:
    """Return the luminance of colour pixels as grey levels: Y of YBR as it is, of RGB by its weights."""
    bits_HW3 = bit_patterns(decoded_HW3)
    top = (1 << bits_stored) - 1
    if photometric.startswith("YBR_FULL"):
        return np.rint(bits_HW3[..., 0] * (WHITE / top))
    if photometric != "RGB":
        raise Rejected("PIX_PHOTOMETRIC_UNSUPPORTED")
    thousandths_HW = sum(bits_HW3[..., channel] * np.float64(weight) for channel, weight in enumerate(_LUMA))
    return np.rint(thousandths_HW * (WHITE / (1000 * top)))


def _palette_table(instance: Instance, geometry: Geometry) -> NDArray[np.float64]:
    """Return the luminance of every palette entry, 0..1: PS3.3 C.7.9."""
    indices_V = np.arange(1 << geometry.bits_stored, dtype=np.uint16 if geometry.bits_stored > 8 else np.uint8)
    try:
        colours_V3 = apply_color_lut(indices_V, _palette(instance))[:, :3]
        bits = int(instance.dataset.RedPaletteColorLookupTableDescriptor[2])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        raise Rejected("PIX_LUT_INVALID") from None
    # Entries of 8 bits may lie in words of 16 (PS3.3 C.7.6.3.1.6); larger ones belie the descriptor.
    top = 255 if bits == 8 and colours_V3.max() <= 255 else np.iinfo(colours_V3.dtype).max
    return (colours_V3.astype(np.int64) @ _LUMA) / (1000.0 * top)


def _palette(instance: Instance) -> Dataset:
    """Return what holds the palette, its words little-endian; pydicom reads them in the machine's order."""
    dataset = instance.dataset
    if instance.little_endian or "RedPaletteColorLookupTableData" not in dataset:  # segments it reads as they are
        return dataset
    palette = Dataset()
    for colour in ("Red", "Green", "Blue"):
        table = f"{colour}PaletteColorLookupTable"
        setattr(palette, f"{table}Descriptor", dataset[f"{table}Descriptor"].value)
        setattr(palette, f"{table}Data", np.frombuffer(dataset[f"{table}Data"].value, ">u2").astype("<u2").tobytes())
    return palette


def fit_mask(mask_HW: NDArray[np.bool_], data: DataConfig) -> NDArray[np.bool_]:
    """Bring a mask of the original image to the geometry of stored pixels; half covered counts as covered."""
    levels_HW = mask_HW.astype(np.float64)
    levels_SS = resample(lambda top, bottom: levels_HW[top:bottom], levels_HW.shape[0], levels_HW.shape[1], data)
    return levels_SS >= 0.5
