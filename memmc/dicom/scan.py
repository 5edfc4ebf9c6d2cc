"""A structural walk over an encoded data set, before any parser sees it.

It allocates nothing that a length field asks for and never recurses, so that
lying lengths and deep nesting cost a code instead of memory or a stack.
Source: PS3.5 section 7 (data set), section 7.5 (nesting), A.4 (encapsulation).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from pydicom.datadict import dictionary_has_tag, dictionary_VR

from memmc.dicom.reasons import Rejected

MAX_DEPTH = 64  # as DCMTK's DCMTK_MAX_SEQUENCE_NESTING
MAX_ELEMENTS = 50_000
MAX_HEADER_BYTES = 32 << 20
MAX_TRAILING_BYTES = 1 << 20
UNDEFINED = 0xFFFFFFFF

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
_FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT_VR_NAMES = "AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US"
_SHORT_VRS = frozenset(vr.encode() for vr in _SHORT_VR_NAMES.split())
_VRS = _LONG_VRS | _SHORT_VRS


class Encoding(NamedTuple):
    """How elements are encoded: PS3.5 section 7.1."""

    implicit: bool
    little: bool


@dataclass(frozen=True)
class PixelSpan:
    """Where the value of Pixel Data (7FE0,0010) lies.

    Attributes:
        start: offset of the first value byte.
        end: offset after the last value byte (native) or after the sequence delimiter (encapsulated).
        vr: OB or OW; empty under implicit VR.
        fragments: (start, end) of each fragment but the offset table; None for native pixel data.
        offsets: the Basic Offset Table, empty where there is none.
    """

    start: int
    end: int
    vr: str
    fragments: tuple[tuple[int, int], ...] | None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What the walk found.

    Attributes:
        header_end: offset of the Pixel Data element, or of the end of the data set.
        pixels: its value, None where there is none.
        float_pixels: (7FE0,0008) or (7FE0,0009) is there.
    """

    header_end: int
    pixels: PixelSpan | None
    float_pixels: bool


class _Level(NamedTuple):
    """An open container: its end, whether that end was declared, and what it holds."""

    end: int
    declared: bool
    kind: str  # "elements", "items" or "fragments"
    implicit: bool


def scan_data_set(buffer: memoryview, start: int, encoding: Encoding) -> Layout:
    """Walk the elements from `start` to Pixel Data.

    Raises:
        Rejected: PARSE_LENGTH, PARSE_TRUNCATED, PARSE_DEPTH, PARSE_ELEMENTS, PARSE_HEADER_SIZE, PARSE_BAD_VR,
            PARSE_TRAILING.
    """
    return _Scan(buffer, encoding).run(start)


class _Scan:
    def __init__(self, buffer: memoryview, encoding: Encoding) -> None:
        self.buffer = buffer
        self.total = len(buffer)
        self.little = encoding.little
        order = "<" if encoding.little else ">"
        self.tag_of = struct.Struct(order + "HH").unpack_from
        self.u16 = struct.Struct(order + "H").unpack_from
        self.u32 = struct.Struct(order + "I").unpack_from
        self.levels = [_Level(self.total, True, "elements", encoding.implicit)]
        self.depth = 0

    def run(self, start: int) -> Layout:
        position, count, float_pixels = start, 0, False
        while True:
            level = self._close_finished(position)
            if level is None:
                return Layout(position, None, float_pixels)
            if position - start > MAX_HEADER_BYTES:
                raise Rejected("PARSE_HEADER_SIZE")
            count += 1
            if count > MAX_ELEMENTS:
                raise Rejected("PARSE_ELEMENTS")
            if self.total - position < 8:
                raise Rejected("PARSE_TRUNCATED")
            group, element = self.tag_of(self.buffer, position)
            tag = group << 16 | element
            if level.kind != "elements":
                position = self._item(level, tag, position)
            elif tag == _ITEM_END:
                position = self._item_end(level, position)
            else:
                vr, length, value = self._element_header(level, position)
                if tag == _PIXEL_DATA and len(self.levels) == 1:
                    return Layout(position, self._pixels(vr, length, value), float_pixels)
                float_pixels = float_pixels or (tag in _FLOAT_PIXELS and len(self.levels) == 1)
                position = self._element(level, tag, vr, length, value)

    def _close_finished(self, position: int) -> _Level | None:
        """Pop what ends here; None at the end of the data set."""
        while True:
            level = self.levels[-1]
            if position < level.end:
                return level
            if position > level.end:
                raise Rejected("PARSE_LENGTH")
            if not level.declared:
                raise Rejected("PARSE_TRUNCATED" if level.end == self.total else "PARSE_LENGTH")
            self._pop()
            if not self.levels:
                return None

    def _pop(self) -> None:
        if self.levels.pop().kind == "items":
            self.depth -= 1

    def _push(self, kind: str, value: int, length: int, implicit: bool) -> int:
        outer = self.levels[-1]
        if kind == "items":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Rejected("PARSE_DEPTH")
        declared = length != UNDEFINED
        end = value + length if declared else outer.end
        if end > outer.end:
            raise self._overrun(end, length)
        self.levels.append(_Level(end, declared, kind, implicit))
        return value

    def _overrun(self, end: int, length: int) -> Rejected:
        """A cut object has plausible, even lengths; anything else is a lie."""
        cut = end > self.total and len(self.levels) == 1 and length < 1 << 31 and length % 2 == 0
        return Rejected("PARSE_TRUNCATED" if cut else "PARSE_LENGTH")

    def _item(self, level: _Level, tag: int, position: int) -> int:
        (length,) = self.u32(self.buffer, position + 4)
        value = position + 8
        if tag == _SEQUENCE_END and not level.declared:
            self._pop()
            return value
        if tag != _ITEM:
            raise Rejected("PARSE_LENGTH")
        if level.kind == "fragments":
            if length == UNDEFINED or value + length > level.end:
                raise Rejected("PARSE_LENGTH")
            return value + length
        return self._push("elements", value, length, level.implicit or self._looks_implicit(value))

    def _looks_implicit(self, value: int) -> bool:
        """Some writers put implicit VR items into an explicit VR object; a VR is two capital letters."""
        if self.total - value < 8 or self.u16(self.buffer, value)[0] == 0xFFFE:
            return False
        first, second = self.buffer[value + 4], self.buffer[value + 5]
        return not (0x41 <= first <= 0x5A and 0x41 <= second <= 0x5A)

    def _item_end(self, level: _Level, position: int) -> int:
        if level.declared:
            raise Rejected("PARSE_LENGTH")
        self._pop()
        return position + 8

    def _element_header(self, level: _Level, position: int) -> tuple[bytes, int, int]:
        """Return VR (empty when implicit), length and value offset."""
        if level.implicit:
            return b"", self.u32(self.buffer, position + 4)[0], position + 8
        vr = bytes(self.buffer[position + 4 : position + 6])
        if vr in _SHORT_VRS:
            return vr, self.u16(self.buffer, position + 6)[0], position + 8
        if vr not in _VRS:
            raise Rejected("PARSE_BAD_VR")
        if self.total - position < 12:
            raise Rejected("PARSE_TRUNCATED")
        return vr, self.u32(self.buffer, position + 8)[0], position + 12

    def _element(self, level: _Level, tag: int, vr: bytes, length: int, value: int) -> int:
        if length == UNDEFINED:
            if vr in (b"OB", b"OW") or (not vr and tag == _PIXEL_DATA):
                return self._push("fragments", value, length, level.implicit)
            if vr in (b"SQ", b"UN", b""):
                # UN of undefined length is an implicit VR sequence: PS3.5 section 6.2.2 note 2.
                return self._push("items", value, length, level.implicit or vr == b"UN")
            raise Rejected("PARSE_LENGTH")
        if length and (vr == b"SQ" or (not vr and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ")):
            return self._push("items", value, length, level.implicit)
        if value + length > level.end:
            raise self._overrun(value + length, length)
        return value + length

    def _pixels(self, vr: bytes, length: int, value: int) -> PixelSpan:
        fragments: tuple[tuple[int, int], ...] | None = None
        if length == UNDEFINED:
            fragments, end = self._fragments(value)
        else:
            end = value + length
            if end > self.total:
                raise self._overrun(end, length)
        if self.total - end > MAX_TRAILING_BYTES:
            raise Rejected("PARSE_TRAILING")
        return PixelSpan(value, end, vr.decode(), fragments, self._offsets(value) if fragments else ())

    def _offsets(self, position: int) -> tuple[int, ...]:
        """Return the Basic Offset Table, the first item of encapsulated Pixel Data."""
        count = min(self.u32(self.buffer, position + 4)[0] // 4, MAX_ELEMENTS)
        return struct.unpack_from(f"<{count}I", self.buffer, position + 8)

    def _fragments(self, position: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """Return the fragments after the Basic Offset Table (PS3.5 A.4) and the offset after the delimiter."""
        spans: list[tuple[int, int]] = []
        while True:
            if position == self.total and self._ends_codestream(spans):
                return tuple(spans[1:]), position
            if self.total - position < 8 or len(spans) > MAX_ELEMENTS:
                raise Rejected("PARSE_TRUNCATED" if self.total - position < 8 else "PARSE_ELEMENTS")
            group, element = self.tag_of(self.buffer, position)
            (length,) = self.u32(self.buffer, position + 4)
            tag, position = group << 16 | element, position + 8
            if tag == _SEQUENCE_END:
                return tuple(spans[1:]), position
            if tag != _ITEM or length == UNDEFINED:
                raise Rejected("PARSE_LENGTH")
            if position + length > self.total:
                raise self._overrun(position + length, length)
            spans.append((position, position + length))
            position += length

    def _ends_codestream(self, spans: list[tuple[int, int]]) -> bool:
        """Whether only the sequence delimiter is missing: JPEG and JPEG 2000 streams end with FFD9, then a pad byte."""
        return len(spans) > 1 and bytes(self.buffer[spans[-1][1] - 3 : spans[-1][1]]).rstrip(b"\0").endswith(
            b"\xff\xd9"
        )


def looks_explicit(buffer: memoryview, start: int) -> bool:
    """Whether the element at `start` has a known value representation after its tag."""
    return bytes(buffer[start + 4 : start + 6]) in _VRS
