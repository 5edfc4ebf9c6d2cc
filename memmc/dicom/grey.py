"""Stored values to display grey: one lookup table from the standard's chain of transformations.

Modality LUT or rescale -> VOI LUT or window -> Presentation LUT shape -> padding.
A stored value has at most 16 bits, so the whole chain is computed once per
possible value (at most 65,536) in double precision and then only looked up.
Source: PS3.4 N.2 (the grayscale transformation sequence).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from memmc.dicom.read import decimal, integer, sequence, text
from memmc.dicom.reasons import Rejected

Floats = NDArray[np.float64]


def grey_table(
    dataset: Dataset, bits_stored: int, signed: bool, little_endian: bool, window: Literal["first", "full"]
) -> Floats:
    """Return the grey of every stored bit pattern.

    Args:
        dataset: the header.
        bits_stored: 1..16.
        signed: Pixel Representation (0028,0103) is 1.
        little_endian: byte order of lookup table data.
        window: the object's first VOI LUT or window, or the full stored range.

    Returns:
        Shape (2**bits_stored,), 0 black .. 1 white, indexed by the low `bits_stored` bits.

    Raises:
        Rejected: PIX_LUT_INVALID.
    """
    stored_V = np.arange(1 << bits_stored, dtype=np.int64)
    if signed:
        stored_V[1 << (bits_stored - 1) :] -= 1 << bits_stored
    values_V, low, high = _modality(dataset, stored_V, little_endian)
    grey_V = _value_of_interest(dataset, values_V, little_endian) if window == "first" else None
    if grey_V is None:
        grey_V = (values_V - low) / (high - low)
    if _inverted(dataset):
        grey_V = 1.0 - grey_V
    grey_V[_padding(dataset, stored_V)] = 0.0
    return np.clip(grey_V, 0.0, 1.0)


def frame_header(dataset: Dataset, frame: int) -> Dataset:
    """Return the header of one frame: what its functional groups say of grey over what the object says.

    The frame's own groups go before the shared ones (PS3.3 C.7.6.16.1.1); of the macros, Pixel Value Transformation
    (C.7.6.16.2.9) and Frame VOI LUT (C.7.6.16.2.10) count.

    Args:
        dataset: the header.
        frame: 0-based.
    """
    shared = sequence(dataset, "SharedFunctionalGroupsSequence")[:1]
    own = sequence(dataset, "PerFrameFunctionalGroupsSequence")[frame : frame + 1]
    items = [
        item
        for groups in (*shared, *own)
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence")
        for item in sequence(groups, macro)[:1]
    ]
    if not items:
        return dataset
    merged = Dataset()
    for source in (dataset, *items):
        merged.update(source)
    return merged


def _modality(dataset: Dataset, stored_V: NDArray[np.int64], little_endian: bool) -> tuple[Floats, float, float]:
    """Apply the Modality LUT (0028,3000), or slope and intercept: PS3.3 C.11.1.1; return values and their range.

    An absent or empty slope is 1 and intercept 0. The range is the one the
    stored bits can reach, or the one a table's output bits can.
    """
    tables = sequence(dataset, "ModalityLUTSequence")
    if tables:
        table, first, bits = _lookup_table(
            tables[0], "LUTDescriptor", "LUTData", little_endian, bool(stored_V.min() < 0)
        )
        return _look_up(table, first, stored_V), 0.0, float((1 << bits) - 1)
    slope, intercept = decimal(dataset, "RescaleSlope"), decimal(dataset, "RescaleIntercept")
    slope = 1.0 if slope is None else slope
    if slope == 0 or not 1e-12 < abs(slope) < 1e12 or abs(intercept or 0.0) > 1e15:
        raise Rejected("PIX_LUT_INVALID")
    values_V = stored_V.astype(np.float64) * slope + (intercept or 0.0)
    return values_V, float(values_V.min()), float(values_V.max())


def _value_of_interest(dataset: Dataset, values_V: Floats, little_endian: bool) -> Floats | None:
    """Apply the first VOI LUT (0028,3010), else the first window: PS3.3 C.11.2.1; None where there is neither.

    A window without a width that its function allows is no window.
    """
    tables = sequence(dataset, "VOILUTSequence")
    if tables:
        signed = bool(values_V.min() < 0)
        table, first, bits = _lookup_table(tables[0], "LUTDescriptor", "LUTData", little_endian, signed)
        return _look_up(table, first, np.rint(values_V).astype(np.int64)) / ((1 << bits) - 1)
    center, width = decimal(dataset, "WindowCenter"), decimal(dataset, "WindowWidth")
    if center is None or width is None:
        return None
    function = text(dataset, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR" and width >= 1:  # C.11.2.1.2.1
        if width == 1:
            return (values_V > center - 0.5).astype(np.float64)
        return np.clip((values_V - (center - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)
    if function == "LINEAR_EXACT" and width > 0:  # C.11.2.1.3.2
        return np.clip((values_V - center) / width + 0.5, 0.0, 1.0)
    if function == "SIGMOID" and width > 0:  # C.11.2.1.3.1
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values_V - center) / width, -700.0, 700.0)))
    return None


def _inverted(dataset: Dataset) -> bool:
    """Whether low values are bright.

    Presentation LUT Shape (2050,0020) says so where it is present; for a
    MONOCHROME1 object it must be INVERSE (PS3.3 C.8.11.3), which is one
    inversion and not two. Else the photometric interpretation says (C.7.6.3.1.2).
    """
    shape = text(dataset, "PresentationLUTShape")
    if shape in ("INVERSE", "IDENTITY"):
        return shape == "INVERSE"
    return text(dataset, "PhotometricInterpretation") == "MONOCHROME1"


def _padding(dataset: Dataset, stored_V: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark Pixel Padding Value (0028,0120), up to the Range Limit (0028,0121): PS3.3 C.7.5.1.1.2."""
    bits = int(stored_V.size)
    value = _as_stored(integer(dataset, "PixelPaddingValue"), bits, bool(stored_V.min() < 0))
    if value is None:
        return np.zeros(stored_V.shape, dtype=np.bool_)
    limit = _as_stored(integer(dataset, "PixelPaddingRangeLimit"), bits, bool(stored_V.min() < 0))
    limit = value if limit is None else limit
    return (stored_V >= min(value, limit)) & (stored_V <= max(value, limit))


def _as_stored(value: int | None, num_values: int, signed: bool) -> int | None:
    """Undo the wrong signedness that ambiguous representations (US or SS) get under implicit VR."""
    if value is None:
        return None
    if signed and value >= num_values // 2 and value >= 1 << 15:
        return value - (1 << 16)
    return value + (1 << 16) if not signed and value < 0 else value


def _lookup_table(
    item: Dataset, descriptor_keyword: str, data_keyword: str, little_endian: bool, signed: bool
) -> tuple[Floats, int, int]:
    """Read a lookup table: PS3.3 C.11.1.1.1 and C.11.2.1.1.

    Returns:
        Its entries, the first value mapped, and the bits of an entry.
    """
    descriptor = _words(item, descriptor_keyword, little_endian)
    if descriptor is None or descriptor.size != 3:
        raise Rejected("PIX_LUT_INVALID")
    count, first, bits = (int(number) & 0xFFFF for number in descriptor)
    count = count or 1 << 16
    first = first - (1 << 16) if signed and first >= 1 << 15 else first
    entries = _words(item, data_keyword, little_endian)
    if entries is None or not 8 <= bits <= 16:
        raise Rejected("PIX_LUT_INVALID")
    if entries.size < count <= 2 * entries.size:  # 8-bit entries, two to a word
        packed = entries.astype("<u2" if little_endian else ">u2").tobytes()
        entries = np.frombuffer(packed, dtype=np.uint8).astype(np.int64)
    if entries.size < count or count < 1:
        raise Rejected("PIX_LUT_INVALID")
    return entries[:count].astype(np.float64), first, bits


def _words(item: Dataset, keyword: str, little_endian: bool) -> NDArray[np.int64] | None:
    """Return 16-bit words of an element, whether it came as OW bytes or as numbers."""
    try:
        value = item.get(keyword)
        if isinstance(value, (bytes, bytearray)):
            raw = np.frombuffer(value[: len(value) // 2 * 2], dtype="<u2" if little_endian else ">u2")
            return raw.astype(np.int64)
        if isinstance(value, int):
            return np.array([value], dtype=np.int64)
        return None if value is None else np.array([int(number) for number in value], dtype=np.int64) & 0xFFFF
    except (ValueError, TypeError, AttributeError, NotImplementedError, OverflowError):
        return None


def _look_up(table: Floats, first: int, values_V: NDArray[np.int64]) -> Floats:
    """Map values; those before the first entry or after the last take that entry: PS3.3 C.11.1.1.1."""
    return table[np.clip(values_V - first, 0, table.size - 1)]
