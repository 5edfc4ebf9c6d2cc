"""Pixel Data to the stored image: decode -> grey -> fit -> resize -> unsigned integers.

The output range is fixed by the header (window output, or the stored range
after the Modality LUT); the image's own extremes never enter, so equal pixels
stay equal between images.

Shapes: H, W the instance's rows and columns; S = data.image_size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID

from memmc.config import DataConfig, IngestConfig
from memmc.dicom.codestream import Size, check_codestream
from memmc.dicom.grey import grey_table
from memmc.dicom.read import ENCAPSULATED, Instance, integer, text
from memmc.dicom.reasons import Rejected
from memmc.dicom.resample import STRIPE_ROWS, resample

_PLUGINS = {  # the one decoder of each compressed transfer syntax; there is no second try with another
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "gdcm",
    "1.2.840.10008.1.2.4.57": "gdcm",
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pydicom",
}
_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("50", "51", "81", "91", "203"))
_SAMPLES = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}
_LUMA = np.array((0.299, 0.587, 0.114), dtype=np.float32)  # ITU-R BT.601, the Y of PS3.3 C.7.6.3.1.2

GreyRows = Callable[[int, int], NDArray[np.float32]]
"""Gives the rows from top to bottom - 1, at most `STRIPE_ROWS`, as display grey 0..1; valid until the next call."""


@dataclass(frozen=True)
class Geometry:
    """The Image Pixel module (PS3.3 C.7.6.3), checked."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    planar: int


@dataclass(frozen=True)
class Prepared:
    """A stored image: little-endian unsigned pixels, C-order, shape (height, width, channels)."""

    pixels: bytes
    height: int
    width: int
    channels: int
    bits: int


def check_geometry(instance: Instance, ingest: IngestConfig) -> Geometry:
    """Check the Image Pixel module against the limits and, for native pixels, against their length.

    Raises:
        Rejected: META_MISSING_TYPE1, META_DIMENSIONS, META_BITS, PIX_PHOTOMETRIC_UNSUPPORTED, PIX_LIMIT, PIX_LENGTH.
    """
    dataset = instance.dataset
    photometric = text(dataset, "PhotometricInterpretation")
    keywords = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")
    if photometric is None or any(keyword not in dataset for keyword in keywords):
        raise Rejected("META_MISSING_TYPE1")
    rows, columns, samples, allocated, stored, representation = (
        -1 if (number := integer(dataset, keyword)) is None else number for keyword in keywords
    )
    high_bit = integer(dataset, "HighBit")
    if not (1 <= rows <= ingest.max_rows and 1 <= columns <= ingest.max_rows and samples in (1, 3)):
        raise Rejected("META_DIMENSIONS")
    bits_fit = allocated in (1, 8, 16) and 1 <= stored <= allocated and representation in (0, 1)
    if (
        not bits_fit
        or high_bit not in (None, stored - 1)
        or (allocated == 1 and instance.transfer_syntax in ENCAPSULATED)
    ):
        raise Rejected("META_BITS")
    if _SAMPLES.get(photometric) != samples:
        raise Rejected("PIX_PHOTOMETRIC_UNSUPPORTED")
    if rows * columns * samples * max(allocated // 8, 1) > ingest.max_decoded_bytes:
        raise Rejected("PIX_LIMIT")
    planar = 1 if samples == 3 and integer(dataset, "PlanarConfiguration") == 1 else 0
    geometry = Geometry(rows, columns, samples, allocated, stored, representation == 1, photometric, planar)
    _check_native_length(instance, geometry)
    return geometry


def _check_native_length(instance: Instance, geometry: Geometry) -> None:
    """Native Pixel Data is as long as the header says, but for the pad byte to even length: PS3.5 8.1.1."""
    if instance.pixels is None or instance.pixels.fragments is not None:
        return
    samples = 2 if geometry.photometric == "YBR_FULL_422" else geometry.samples
    expected = (geometry.rows * geometry.columns * samples * geometry.bits_allocated + 7) // 8
    if instance.pixels.end - instance.pixels.start not in (expected, expected + expected % 2):
        raise Rejected("PIX_LENGTH")


def prepare(
    instance: Instance,
    geometry: Geometry,
    data: DataConfig,
    inspect: Callable[[NDArray[np.uint8]], None] | None = None,
) -> Prepared:
    """Decode one instance and prepare it as `data` says.

    Args:
        instance: the object.
        geometry: what `check_geometry` returned.
        data: how pixels are prepared.
        inspect: called with the image at its own size, 0 black .. 255 white, shape (H, W); may raise `Rejected`.

    Raises:
        Rejected: a PIX_* or QC_* code. Decoders raise what they like besides.
    """
    rows = _grey(instance, geometry, data)
    if inspect is not None:
        inspect(_bytes(rows, geometry))
    grey_SS = resample(rows, geometry.rows, geometry.columns, data)
    top = (1 << data.bits) - 1
    pixels_SS = np.rint(grey_SS.clip(0.0, 1.0) * top).astype("<u2" if data.bits == 16 else "u1")
    if pixels_SS.min() == pixels_SS.max():
        raise Rejected("QC_CONSTANT")
    return Prepared(pixels_SS.tobytes(), data.image_size, data.image_size, 1, data.bits)


def grey_image(instance: Instance, geometry: Geometry, data: DataConfig) -> NDArray[np.float32]:
    """Decode one instance to display grey at its own size: float32, shape (H, W), 0 black .. 1 white.

    Raises:
        Rejected: a PIX_* code. Decoders raise what they like besides.
    """
    rows = _grey(instance, geometry, data)
    grey_HW = np.empty((geometry.rows, geometry.columns), dtype=np.float32)
    for top in range(0, geometry.rows, STRIPE_ROWS):
        bottom = min(top + STRIPE_ROWS, geometry.rows)
        grey_HW[top:bottom] = rows(top, bottom)
    return grey_HW


def _bytes(rows: GreyRows, geometry: Geometry) -> NDArray[np.uint8]:
    """Return the whole image as bytes."""
    bytes_HW = np.empty((geometry.rows, geometry.columns), dtype=np.uint8)
    for top in range(0, geometry.rows, STRIPE_ROWS):
        stripe = rows(top, min(top + STRIPE_ROWS, geometry.rows))
        bytes_HW[top : top + len(stripe)] = stripe.clip(0.0, 1.0) * np.float32(255) + np.float32(0.5)
    return bytes_HW


def _grey(instance: Instance, geometry: Geometry, data: DataConfig) -> GreyRows:
    """Decode one instance; return what gives its rows as display grey."""
    decoded, photometric = _decode(instance, geometry)
    if geometry.samples == 3:
        grey_HW = _luminance(decoded, photometric, geometry.bits_stored)
        return lambda top, bottom: grey_HW[top:bottom]
    if geometry.photometric == "PALETTE COLOR":
        table_V = _palette_table(instance, geometry)
    else:
        table_V = grey_table(
            instance.dataset, geometry.bits_stored, geometry.signed, instance.little_endian, data.window
        )
    return _grey_rows(decoded, table_V)


def _decode(instance: Instance, geometry: Geometry) -> tuple[NDArray[np.generic], str]:
    """Decode with the pinned decoder.

    Returns:
        Stored values, shape (H, W) or (H, W, 3), and their photometric interpretation.
    """
    span, syntax = instance.pixels, instance.transfer_syntax
    if span is None:
        raise Rejected("META_NO_PIXELS")
    if span.fragments is None:
        return _decode_with("", instance.buffer[span.start : span.end], instance, geometry)
    stream = b"".join(instance.buffer[start:end] for start, end in span.fragments)
    check_codestream(
        stream, syntax, Size(geometry.rows, geometry.columns, geometry.samples, 0), geometry.bits_allocated
    )
    if _PLUGINS[syntax] == "gdcm":
        decoded, photometric = _decode_gdcm(stream, instance, geometry), geometry.photometric
    else:
        decoded, photometric = _decode_with(_PLUGINS[syntax], encapsulate([stream]), instance, geometry)
    return _within_range(decoded, instance, geometry), photometric


def _decode_with(
    plugin: str, source: bytes | memoryview, instance: Instance, geometry: Geometry
) -> tuple[NDArray[np.generic], str]:
    options: dict[str, Any] = {
        "rows": geometry.rows,
        "columns": geometry.columns,
        "number_of_frames": 1,
        "samples_per_pixel": geometry.samples,
        "photometric_interpretation": geometry.photometric,
        "bits_allocated": geometry.bits_allocated,
        "bits_stored": geometry.bits_stored,
        "pixel_representation": int(geometry.signed),
        "planar_configuration": geometry.planar,
        "pixel_keyword": "PixelData",
        "pixel_vr": (instance.pixels.vr if instance.pixels else "") or "OW",
        "view_only": True,
        "correct_unused_bits": False,
    }
    decoder = get_decoder(instance.transfer_syntax)
    decoded, found = decoder.as_array(source, index=0, raw=True, decoding_plugin=plugin, **options)
    return decoded, str(found["photometric_interpretation"])


def _decode_gdcm(stream: bytes, instance: Instance, geometry: Geometry) -> NDArray[np.generic]:
    """Decode JPEG lossless and extended with GDCM itself: pydicom's plugin refuses 12-bit extended."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((geometry.columns, geometry.rows, 1))
    image.SetDataElement(element)
    interpretation = gdcm.PhotometricInterpretation.GetPIType(geometry.photometric)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(interpretation))
    if geometry.samples == 3:
        image.SetPlanarConfiguration(geometry.planar)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(instance.transfer_syntax)))
    allocated, stored = geometry.bits_allocated, geometry.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(geometry.samples, allocated, stored, stored - 1, int(geometry.signed)))
    raw = image.GetBuffer().encode("utf-8", "surrogateescape")
    shape = (geometry.rows, geometry.columns, geometry.samples)
    decoded = np.frombuffer(raw, dtype="u1" if allocated == 8 else "<u2")
    if decoded.size != shape[0] * shape[1] * shape[2]:
        raise Rejected("PIX_DECODE_ERROR")
    if geometry.samples == 3 and geometry.planar:
        return decoded.reshape(shape[2], *shape[:2]).transpose(1, 2, 0)
    return decoded.reshape(shape if geometry.samples == 3 else shape[:2])


def _within_range(decoded: NDArray[np.generic], instance: Instance, geometry: Geometry) -> NDArray[np.generic]:
    """Check that decoded values need no more than Bits Stored; more means another image than the header's.

    Lossy compression overshoots at edges: there, up to a quarter of the range is cut off instead.
    """
    unsigned = _unsigned(decoded)
    width, stored = unsigned.dtype.itemsize * 8, geometry.bits_stored
    if stored == width:
        return decoded
    values = unsigned.view(np.dtype(f"i{width // 8}")) if geometry.signed else unsigned
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < 1 << stored:
        return decoded
    bottom, top = (-(1 << (stored - 1)), (1 << (stored - 1)) - 1) if geometry.signed else (0, (1 << stored) - 1)
    if low >= bottom and high <= top:
        return decoded
    slack = 1 << (stored - 2) if stored > 2 and instance.transfer_syntax in _LOSSY else 0
    if low < bottom - slack or high > top + slack:
        raise Rejected("PIX_RANGE")
    return values.clip(bottom, top)


def _unsigned(decoded: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """View stored values as bit patterns."""
    if decoded.dtype.kind not in "iu" or decoded.dtype.itemsize > 2:
        raise Rejected("PIX_DECODE_ERROR")
    native = decoded if decoded.dtype.isnative else decoded.astype(decoded.dtype.newbyteorder("="))
    return native.view(np.dtype(f"u{native.dtype.itemsize}"))


def _grey_rows(decoded_HW: NDArray[np.generic], table_V: NDArray[np.float32]) -> GreyRows:
    """Return what maps rows of bit patterns through the table, into one array that each call fills anew.

    Bits above the table's size (overlays, sign) are masked off: PS3.5 8.1.1.
    """
    bits_HW = _unsigned(decoded_HW)
    mask = np.intp(table_V.size - 1)
    masked = table_V.size < 1 << (bits_HW.dtype.itemsize * 8)
    shape = (STRIPE_ROWS, bits_HW.shape[1])
    index, grey = np.empty(shape, dtype=np.intp), np.empty(shape, dtype=np.float32)

    def rows(top: int, bottom: int) -> NDArray[np.float32]:
        window = index[: bottom - top]
        np.copyto(window, bits_HW[top:bottom])
        if masked:
            np.bitwise_and(window, mask, out=window)
        return np.take(table_V, window, out=grey[: bottom - top], mode="clip")

    return rows


def _luminance(decoded_HW3: NDArray[np.generic], photometric: str, bits_stored: int) -> NDArray[np.float32]:
    """Return the luminance of colour pixels, 0..1: Y of YBR as it is, of RGB by its weights."""
    bits_HW3 = _unsigned(decoded_HW3)
    top = np.float32((1 << bits_stored) - 1)
    if photometric.startswith("YBR_FULL"):
        return bits_HW3[..., 0].astype(np.float32) / top
    if photometric != "RGB":
        raise Rejected("PIX_PHOTOMETRIC_UNSUPPORTED")
    return (bits_HW3.astype(np.float32) @ (_LUMA / top)).astype(np.float32, copy=False)


def _palette_table(instance: Instance, geometry: Geometry) -> NDArray[np.float32]:
    """Return the luminance of every palette entry: PS3.3 C.7.9."""
    indices_V = np.arange(1 << geometry.bits_stored, dtype=np.uint16 if geometry.bits_stored > 8 else np.uint8)
    try:
        colours_V3 = apply_color_lut(indices_V, instance.dataset)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        raise Rejected("PIX_LUT_INVALID") from None
    top = np.float32(np.iinfo(colours_V3.dtype).max)
    return (colours_V3[:, :3].astype(np.float32) @ (_LUMA / top)).astype(np.float32, copy=False)


def fit_mask(mask_HW: NDArray[np.bool_], data: DataConfig) -> NDArray[np.bool_]:
    """Bring a mask of the original image to the geometry of stored pixels; half covered counts as covered."""
    grey_HW = mask_HW.astype(np.float32)
    return resample(lambda top, bottom: grey_HW[top:bottom], grey_HW.shape[0], grey_HW.shape[1], data) >= 0.5


def decoder_status() -> dict[str, bool]:
    """Return, by the UID's name, whether the decoder pinned to each compressed transfer syntax can be used."""
    status: dict[str, bool] = {}
    for syntax, plugin in _PLUGINS.items():
        available = get_decoder(syntax).available_plugins
        status[UID(syntax).name] = (
            importlib.util.find_spec("gdcm") is not None if plugin == "gdcm" else plugin in available
        )
    return status


def preload() -> None:
    """Import every decoder, so that a process with limits need not read files later."""
    importlib.import_module("gdcm")
    with BytesIO() as stream:
        Image.new("L", (8, 8)).save(stream, "JPEG")
        stream.seek(0)
        Image.open(stream).load()
    for syntax in _PLUGINS:
        get_decoder(syntax)
