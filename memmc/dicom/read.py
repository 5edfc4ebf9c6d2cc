"""Object bytes to a checked pydicom data set, or a reason code.

Every bound that the bytes themselves can show is checked before pydicom parses
and long before a decoder runs. Only the attributes this package uses are
materialised: names, addresses and free text never become Python values.
"""

from __future__ import annotations

import functools
import logging
import struct
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import pydicom.config
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag

from memmc.dicom.reasons import Rejected
from memmc.dicom.scan import MAX_HEADER_BYTES, MAX_TRAILING_BYTES, Encoding, PixelSpan, looks_explicit, scan_data_set

__all__ = [
    "Instance",
    "Rejected",
    "decimal",
    "integer",
    "read_instance",
    "refused_by_head",
    "sequence",
    "silenced",
    "text",
    "texts",
]

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_DICOMDIR = "1.2.840.10008.1.3.10"
_NATIVE = {
    IMPLICIT_LITTLE: Encoding(True, True),
    EXPLICIT_LITTLE: Encoding(False, True),
    DEFLATED: Encoding(False, True),
    EXPLICIT_BIG: Encoding(False, False),
}
ENCAPSULATED = frozenset(
    "1.2.840.10008.1.2." + suffix
    for suffix in (
        "4.50",
        "4.51",
        "4.53",
        "4.55",
        "4.57",
        "4.70",
        "4.80",
        "4.81",
        "4.90",
        "4.91",
        "4.201",
        "4.202",
        "4.203",
        "5",
    )
)
"""Compressed transfer syntaxes this package has a decoder for: PS3.5 A.4."""

_MAX_INFLATED_BYTES = 512 << 20
_INFLATE_STEP = 8 << 20
_EXECUTABLE = (
    b"MZ",
    b"\x7fELF",
    b"#!",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xce\xfa\xed\xfe",
    b"\xcf\xfa\xed\xfe",
    b"\xca\xfe\xba\xbe",
)
_ARCHIVES = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"\x28\xb5\x2f\xfd",
    b"Rar!",
)

_KEYWORDS = (
    "SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyDate SeriesDate AcquisitionDate ContentDate "
    "AcquisitionDateTime AccessionNumber Modality ConversionType PresentationIntentType Manufacturer "
    "ManufacturerModelName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge BodyPartExamined "
    "ImagerPixelSpacing ViewPosition StudyInstanceUID SeriesInstanceUID Laterality ImageLaterality SamplesPerPixel "
    "PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing PixelAspectRatio "
    "BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit BurnedInAnnotation "
    "WindowCenter WindowWidth RescaleIntercept RescaleSlope VOILUTFunction LossyImageCompression "
    "ModalityLUTSequence VOILUTSequence ViewCodeSequence PresentationLUTShape SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData "
    "SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData"
)


@dataclass(frozen=True)
class Instance:
    """One parsed instance.

    Attributes:
        dataset: the attributes this package uses; never Pixel Data.
        transfer_syntax: UID, one of the supported ones.
        little_endian: byte order of the data set.
        buffer: the (inflated) bytes that `pixels` points into.
        pixels: where Pixel Data lies, or None.
        float_pixels: float pixel data is there instead or as well.
    """

    dataset: Dataset
    transfer_syntax: str
    little_endian: bool
    buffer: memoryview
    pixels: PixelSpan | None
    float_pixels: bool


def read_instance(data: bytes | bytearray | memoryview, max_decoded_bytes: int = _MAX_INFLATED_BYTES) -> Instance:
    """Check the structure of one object and parse its header.

    A preamble without file meta, file meta without a preamble, and a bare
    little-endian data set (with a SOP Class UID) are tolerated.

    Args:
        data: the whole object.
        max_decoded_bytes: bound on the pixels; a deflated data set may inflate to this and a header, bytes.

    Raises:
        Rejected: a FILE_* or PARSE_* code.

    Source: PS3.10 section 7.1.
    """
    buffer = memoryview(data)
    start = _data_start(buffer)
    bare = not _is_file_meta(buffer, start)
    syntax = _guess_bare_syntax(buffer, start) if bare else ""
    if not bare:
        syntax, media_class, start = _file_meta(buffer, start)
        if media_class == _DICOMDIR:
            raise Rejected("FILE_DICOMDIR")
    if syntax == DEFLATED:
        limit = max_decoded_bytes + MAX_HEADER_BYTES + MAX_TRAILING_BYTES
        buffer, start = memoryview(_inflate(buffer[start:], min(limit, _MAX_INFLATED_BYTES))), 0
    encoding = _NATIVE.get(syntax, Encoding(False, True))
    if len(buffer) - start < 8:
        raise Rejected("PARSE_TRUNCATED")
    if encoding.implicit == looks_explicit(buffer, start):
        raise Rejected("PARSE_TS_MISMATCH")
    try:
        layout = scan_data_set(buffer, start, encoding)
    except Rejected:
        if bare:
            raise Rejected("FILE_NOT_DICOM") from None
        raise
    if layout.pixels is not None and (layout.pixels.fragments is None) == (syntax in ENCAPSULATED):
        raise Rejected("PARSE_TS_MISMATCH")
    dataset = read_dataset(
        BytesIO(buffer[start : layout.header_end]),
        is_implicit_VR=encoding.implicit,
        is_little_endian=encoding.little,
        specific_tags=_wanted_tags(),
    )
    if bare and "SOPClassUID" not in dataset:
        raise Rejected("FILE_NOT_DICOM")
    return Instance(dataset, syntax, encoding.little, buffer, layout.pixels, layout.float_pixels)


def refused_by_head(head: bytes) -> str | None:
    """Return the code that `read_instance` has for whatever begins so; None where it takes more than the head."""
    buffer = memoryview(head)
    try:
        start = _data_start(buffer)
        if not _is_file_meta(buffer, start):
            _guess_bare_syntax(buffer, start)
    except Rejected as rejection:
        return rejection.reason
    return None


@functools.cache
def _wanted_tags() -> list[BaseTag | int]:
    return [Tag(keyword) for keyword in _KEYWORDS.split()]


def _data_start(buffer: memoryview) -> int:
    """Return the offset of the first element, past preamble and magic."""
    if not buffer:
        raise Rejected("FILE_EMPTY")
    head = bytes(buffer[:16])
    if bytes(buffer[128:132]) == b"DICM":
        if head.startswith(_EXECUTABLE):
            raise Rejected("FILE_PREAMBLE_EXEC")
        return 132
    if head.startswith(_ARCHIVES) or bytes(buffer[257:262]) == b"ustar":
        raise Rejected("FILE_ARCHIVE_NESTED")
    return 4 if head.startswith(b"DICM") else 0


def _is_file_meta(buffer: memoryview, start: int) -> bool:
    return bytes(buffer[start : start + 2]) == b"\x02\x00" and looks_explicit(buffer, start)


def _guess_bare_syntax(buffer: memoryview, start: int) -> str:
    """Tell explicit from implicit little endian where there is no file meta.

    Only an object that begins with group 0008 is looked at.
    """
    if bytes(buffer[start : start + 2]) != b"\x08\x00" or len(buffer) - start < 16:
        raise Rejected("PARSE_TRUNCATED" if start and len(buffer) - start < 16 else "FILE_NOT_DICOM")
    return EXPLICIT_LITTLE if looks_explicit(buffer, start) else IMPLICIT_LITTLE


def _file_meta(buffer: memoryview, position: int) -> tuple[str, str, int]:
    """Return Transfer Syntax UID (0002,0010), Media Storage SOP Class UID (0002,0002) and the data set's offset.

    The group length is not trusted: the group ends where another begins.
    """
    found = {0x0010: "", 0x0002: ""}
    start = position
    while len(buffer) - position >= 8 and bytes(buffer[position : position + 2]) == b"\x02\x00":
        element, vr, length = struct.unpack_from("<H2sH", buffer, position + 2)
        value = position + 8
        if vr in (b"OB", b"UN", b"OW", b"UT"):
            if len(buffer) - value < 4:
                raise Rejected("PARSE_TRUNCATED")
            (length,) = struct.unpack_from("<I", buffer, value)
            value += 4
        if not looks_explicit(buffer, position):
            raise Rejected("PARSE_BAD_VR")
        position = value + length
        if position > len(buffer):
            raise Rejected("PARSE_LENGTH" if length >= 1 << 31 or length % 2 else "PARSE_TRUNCATED")
        if position - start > MAX_HEADER_BYTES:
            raise Rejected("PARSE_HEADER_SIZE")
        if element in found and length <= 66:
            found[element] = bytes(buffer[value:position]).decode("ascii", "replace").strip("\0 ")
    syntax, media_class = found[0x0010], found[0x0002]
    if syntax not in _NATIVE and syntax not in ENCAPSULATED:
        raise Rejected("PARSE_TS_UNKNOWN")
    return syntax, media_class, position


def _inflate(deflated: memoryview, limit: int) -> bytes:
    """Inflate a raw deflate stream (PS3.5 A.5) without ever holding more than `limit` bytes."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    parts: list[bytes] = []
    size = 0
    pending: bytes | memoryview = deflated
    try:
        while not stream.eof:
            part = stream.decompress(pending, _INFLATE_STEP)
            pending = stream.unconsumed_tail
            size += len(part)
            if size > limit:
                raise Rejected("PARSE_INFLATE_LIMIT")
            parts.append(part)
            if not part and not pending and not stream.eof:
                raise Rejected("PARSE_TRUNCATED")
    except zlib.error:
        raise Rejected("PARSE_INFLATE") from None
    return b"".join(parts)


_LOGGERS = ("pydicom", "highdicom", "pynetdicom", "PIL", "pylibjpeg", "openjpeg", "libjpeg", "jpeg_ls", "py.warnings")


@contextmanager
def silenced() -> Generator[None]:
    """Keep parsers, decoders and makers of objects from printing: their warnings and log lines quote element values."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    mode = pydicom.config.settings.reading_validation_mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            yield
        finally:
            pydicom.config.settings.reading_validation_mode = mode
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_VALUE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, NotImplementedError)


def _first(dataset: Dataset, keyword: str) -> object:
    """Return the first value of an element; None where absent, empty or not convertible."""
    try:
        value = dataset.get(keyword)
    except (*_VALUE_ERRORS, struct.error):
        return None
    if isinstance(value, (str, bytes, int, float)) or value is None:
        return value
    try:
        return value[0] if len(value) else None
    except _VALUE_ERRORS:
        return None


def text(dataset: Dataset, keyword: str) -> str | None:
    """Return the first value as stripped text, None where absent, empty or not text."""
    value = _first(dataset, keyword)
    return (value.strip("\0 \t\r\n") or None) if isinstance(value, str) else None


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """Return all values as stripped text, none where absent, empty or not text."""
    try:
        value = dataset.get(keyword) or []
    except (*_VALUE_ERRORS, struct.error):
        return []
    return [value.strip()] if isinstance(value, str) else [str(part).strip() for part in value]


def sequence(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence, none where it is absent or not one."""
    try:
        items = dataset.get(keyword)
        return [item for item in items if isinstance(item, Dataset)] if items else []
    except (*_VALUE_ERRORS, struct.error, OSError):
        return []


def integer(dataset: Dataset, keyword: str) -> int | None:
    """Return the first value as an int, None where absent or not a whole number."""
    value = decimal(dataset, keyword)
    return int(value) if value is not None and value == int(value) else None


def decimal(dataset: Dataset, keyword: str) -> float | None:
    """Return the first value as a finite float, None where absent or not a number."""
    value = _first(dataset, keyword)
    try:
        number = float(value) if isinstance(value, (str, int, float)) else float("nan")
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
