"""Pixel Data to stored values: geometry checked, frames found, one pinned decoder per transfer syntax.

Stored values are what the encoder was given (PS3.5 section 8): before any
lookup table, window or colour conversion. Frames are decoded one at a time, so
memory follows the frame and not the object.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from memmc.config import IngestConfig
from memmc.dicom.codestream import Size, check_codestream
from memmc.dicom.read import ENCAPSULATED, Instance, integer, text
from memmc.dicom.reasons import Rejected
from memmc.dicom.scan import PixelSpan

PLUGINS = {  # the one decoder of each compressed transfer syntax; there is no second try with another
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "gdcm",
    "1.2.840.10008.1.2.4.53": "gdcm",  # retired, in old archives
    "1.2.840.10008.1.2.4.55": "gdcm",
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
RLE = "1.2.840.10008.1.2.5"
_JPEG_2000 = ("1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")
_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("50", "51", "53", "55", "81", "91", "203"))
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


@dataclass(frozen=True)
class Geometry:
    """The Image Pixel module (PS3.3 C.7.6.3), checked; `planar` is 1 for native pixels by colour plane alone."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    planar: int
    frames: int = 1


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
    frames = integer(dataset, "NumberOfFrames")
    frames = 1 if frames is None else frames
    if frames < 1:
        raise Rejected("META_DIMENSIONS")
    if frames * rows * columns * samples * max(allocated // 8, 1) > ingest.max_decoded_bytes:
        raise Rejected("PIX_LIMIT")
    # Of compressed pixels the codestream says how samples lie, and decoders give them by pixel: PS3.5 8.2.
    native = instance.transfer_syntax not in ENCAPSULATED
    planar = 1 if native and samples == 3 and integer(dataset, "PlanarConfiguration") == 1 else 0
    geometry = Geometry(rows, columns, samples, allocated, stored, representation == 1, photometric, planar, frames)
    _check_native_length(instance, geometry)
    return geometry


def _check_native_length(instance: Instance, geometry: Geometry) -> None:
    """Native Pixel Data is as long as the header says, but for the pad byte to even length: PS3.5 8.1.1."""
    if instance.pixels is None or instance.pixels.fragments is not None:
        return
    samples = 2 if geometry.photometric == "YBR_FULL_422" else geometry.samples
    expected = (geometry.frames * geometry.rows * geometry.columns * samples * geometry.bits_allocated + 7) // 8
    if instance.pixels.end - instance.pixels.start not in (expected, expected + expected % 2):
        raise Rejected("PIX_LENGTH")


def decode_frame(instance: Instance, geometry: Geometry, frame: int = 0) -> tuple[NDArray[np.generic], str]:
    """Decode one frame with the pinned decoder.

    Args:
        instance: with pixels.
        geometry: of the instance, checked.
        frame: 0..geometry.frames - 1.

    Returns:
        Stored values, shape (H, W) or (H, W, 3), and their photometric interpretation. Bits above Bits Stored
        of native pixels are as they came.

    Raises:
        Rejected: a META_* or PIX_* code. Decoders raise what they like besides.
    """
    span, syntax = instance.pixels, instance.transfer_syntax
    if span is None:
        raise Rejected("META_NO_PIXELS")
    if span.fragments is None:
        if geometry.bits_allocated == 1 and geometry.frames > 1:
            return _unpack_bits(instance, span, geometry, frame), geometry.photometric
        return _decode_with("", instance.buffer[span.start : span.end], instance, geometry, frame)
    stream = b"".join(instance.buffer[start:end] for start, end in frame_fragments(instance, geometry, frame))
    check_codestream(
        stream, syntax, Size(geometry.rows, geometry.columns, geometry.samples, 0), geometry.bits_allocated
    )
    if PLUGINS[syntax] == "gdcm":
        decoded, photometric = _decode_gdcm(stream, instance, geometry), geometry.photometric
    else:
        decoded, photometric = _decode_with(PLUGINS[syntax], encapsulate([stream]), instance, geometry)
        if PLUGINS[syntax] == "pillow" and geometry.samples == 3 and _is_made_rgb(stream):
            photometric = "RGB"
    return _within_range(decoded, instance, geometry), photometric


def _unpack_bits(instance: Instance, span: PixelSpan, geometry: Geometry, frame: int) -> NDArray[np.generic]:
    """Unpack a frame of single bits, least significant first; frames follow each other without padding: PS3.5 8.1.1.

    pydicom 3.0.2 does not return frames that begin inside a byte.
    """
    packed = np.frombuffer(instance.buffer[span.start : span.end], dtype=np.uint8)
    if not instance.little_endian and span.vr == "OW":
        packed = packed.reshape(-1, 2)[:, ::-1].ravel()
    count = geometry.rows * geometry.columns * geometry.samples
    first = frame * count
    bits = np.unpackbits(packed[first // 8 : -(-(first + count) // 8)], bitorder="little")[first % 8 :][:count]
    return bits.reshape(geometry.rows, geometry.columns, *((geometry.samples,) if geometry.samples > 1 else ()))


def frame_fragments(instance: Instance, geometry: Geometry, frame: int) -> tuple[tuple[int, int], ...]:
    """Return the fragments of one frame: PS3.5 A.4.

    One fragment a frame is taken as such whatever the Basic Offset Table says;
    else the table decides; without one, a frame begins where a codestream does.

    Raises:
        Rejected: PIX_CODESTREAM_MISMATCH, the fragments do not make the header's number of frames.
    """
    span = instance.pixels
    assert span is not None and span.fragments is not None
    fragments = span.fragments
    if geometry.frames == 1:
        return fragments
    if len(fragments) == geometry.frames:
        return (fragments[frame],)
    if len(span.offsets) == geometry.frames:
        origin = fragments[0][0] if fragments else 0
        starts = [origin + offset for offset in span.offsets]
    else:
        begins = _begins_of(instance.transfer_syntax)
        starts = [start for start, _ in fragments if bytes(instance.buffer[start : start + 4]).startswith(begins)]
    if len(starts) != geometry.frames or not fragments or starts[0] != fragments[0][0]:
        raise Rejected("PIX_CODESTREAM_MISMATCH")
    end = starts[frame + 1] if frame + 1 < geometry.frames else span.end
    found = tuple(fragment for fragment in fragments if starts[frame] <= fragment[0] < end)
    if not found or found[0][0] != starts[frame]:
        raise Rejected("PIX_CODESTREAM_MISMATCH")
    return found


def _begins_of(transfer_syntax: str) -> tuple[bytes, ...]:
    """Return the bytes a codestream begins with; an RLE frame is one fragment (PS3.5 A.4.2) and has none."""
    if transfer_syntax == RLE:
        return ()
    jpeg_2000 = transfer_syntax.startswith(_JPEG_2000)
    return (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0c") if jpeg_2000 else (b"\xff\xd8\xff",)


def _decode_with(
    plugin: str, source: bytes | memoryview, instance: Instance, geometry: Geometry, frame: int = 0
) -> tuple[NDArray[np.generic], str]:
    options: dict[str, Any] = {
        "rows": geometry.rows,
        "columns": geometry.columns,
        "number_of_frames": geometry.frames if not plugin else 1,
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
    decoded, found = decoder.as_array(source, index=frame, raw=True, decoding_plugin=plugin, **options)
    return decoded, str(found["photometric_interpretation"])


def _is_made_rgb(stream: bytes) -> bool:
    """Tell whether an Adobe marker says YCbCr: Pillow makes RGB of it, and pydicom 3.0.2 goes on calling it YBR."""
    with Image.open(BytesIO(stream), formats=("JPEG",)) as image:
        return image.info.get("adobe_transform") == 1


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
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(instance.transfer_syntax)))
    allocated, stored = geometry.bits_allocated, geometry.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(geometry.samples, allocated, stored, stored - 1, int(geometry.signed)))
    raw = image.GetBuffer().encode("utf-8", "surrogateescape")
    shape = (geometry.rows, geometry.columns, geometry.samples)
    decoded = np.frombuffer(raw, dtype="u1" if allocated == 8 else "<u2")
    if decoded.size != shape[0] * shape[1] * shape[2]:
        raise Rejected("PIX_DECODE_ERROR")
    return decoded.reshape(shape if geometry.samples == 3 else shape[:2])


def _within_range(decoded: NDArray[np.generic], instance: Instance, geometry: Geometry) -> NDArray[np.generic]:
    """Check that decoded values need no more than Bits Stored; more means another image than the header's.

    Lossy compression overshoots at edges: there, up to a quarter of the range is cut off instead.
    """
    unsigned = bit_patterns(decoded)
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


def bit_patterns(decoded: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """View stored values as bit patterns."""
    if decoded.dtype.kind not in "iu" or decoded.dtype.itemsize > 2:
        raise Rejected("PIX_DECODE_ERROR")
    native = decoded if decoded.dtype.isnative else decoded.astype(decoded.dtype.newbyteorder("="))
    return native.view(np.dtype(f"u{native.dtype.itemsize}"))


def decoder_status() -> dict[str, bool]:
    """Return, by the UID's name, whether the decoder pinned to each compressed transfer syntax can be used."""
    status: dict[str, bool] = {}
    for syntax, plugin in PLUGINS.items():
        status[UID(syntax).name] = (
            importlib.util.find_spec("gdcm") is not None
            if plugin == "gdcm"
            else plugin in get_decoder(syntax).available_plugins
        )
    return status


def preload() -> None:
    """Import every decoder, so that a process with limits need not read files later."""
    importlib.import_module("gdcm")
    with BytesIO() as stream:
        Image.new("L", (8, 8)).save(stream, "JPEG")
        stream.seek(0)
        Image.open(stream).load()
    for syntax, plugin in PLUGINS.items():
        if plugin != "gdcm":
            get_decoder(syntax)
