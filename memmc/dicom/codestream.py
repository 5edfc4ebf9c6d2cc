"""What a compressed codestream says about itself, read before a decoder allocates for it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from memmc.dicom.reasons import Rejected

_JPEG_PROCESSES = {  # ISO/IEC 10918-1 Table B.1 start-of-frame markers that each transfer syntax allows
    "1.2.840.10008.1.2.4.50": (0xC0, 0xC1),
    "1.2.840.10008.1.2.4.51": (0xC0, 0xC1),
    "1.2.840.10008.1.2.4.53": (0xC2,),  # retired: spectral selection and full progression
    "1.2.840.10008.1.2.4.55": (0xC2,),
    "1.2.840.10008.1.2.4.57": (0xC3,),
    "1.2.840.10008.1.2.4.70": (0xC3,),
    "1.2.840.10008.1.2.4.80": (0xF7,),  # ISO/IEC 14495-1 SOF55
    "1.2.840.10008.1.2.4.81": (0xF7,),
}
_FRAME_MARKERS = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))
_RLE = "1.2.840.10008.1.2.5"
_MAX_TILES = 65_535


class Size(NamedTuple):
    """Size fields of a codestream; precision in bits per sample."""

    rows: int
    columns: int
    samples: int
    precision: int


def check_codestream(stream: bytes, transfer_syntax: str, expected: Size, bits_allocated: int) -> None:
    """Compare a codestream's own size with the header's.

    Args:
        stream: one frame.
        transfer_syntax: UID of a compressed transfer syntax.
        expected: rows, columns and samples of the header; its precision is not compared, since archives hold
            12-bit objects in 16-bit streams.
        bits_allocated: of the header; the codestream's precision must fit.

    Raises:
        Rejected: PIX_CODESTREAM_MISMATCH, or PIX_DECODE_ERROR where the stream has no size at all.
    """
    try:
        if transfer_syntax == _RLE:
            _check_rle(stream, expected.samples * (bits_allocated // 8))
            return
        found = (
            _jpeg_size(stream, _JPEG_PROCESSES[transfer_syntax])
            if transfer_syntax in _JPEG_PROCESSES
            else _jpeg2000_size(stream)
        )
    except (struct.error, IndexError):
        raise Rejected("PIX_DECODE_ERROR") from None
    if found[:3] != expected[:3] or not 2 <= found.precision <= bits_allocated:
        raise Rejected("PIX_CODESTREAM_MISMATCH")


def _jpeg_size(stream: bytes, processes: tuple[int, ...]) -> Size:
    """Read the start of frame: ISO/IEC 10918-1 B.2.2."""
    if stream[:2] != b"\xff\xd8":
        raise Rejected("PIX_DECODE_ERROR")
    position = 2
    while True:
        if stream[position] != 0xFF:
            raise Rejected("PIX_DECODE_ERROR")
        marker = stream[position + 1]
        if marker == 0xFF:  # fill byte, B.1.1.2
            position += 1
        elif marker in _FRAME_MARKERS:
            precision, rows, columns, samples = struct.unpack_from(">BHHB", stream, position + 4)
            if marker not in processes:
                raise Rejected("PIX_CODESTREAM_MISMATCH")
            return Size(rows, columns, samples, precision)
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:
            position += 2
        else:
            (length,) = struct.unpack_from(">H", stream, position + 2)
            position += 2 + max(length, 2)


def _jpeg2000_size(stream: bytes) -> Size:
    """Read the SIZ marker segment: ISO/IEC 15444-1 A.5.1; a JP2 wrapper is looked through."""
    position = 0
    if stream[4:8] == b"jP  ":
        position = stream.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
    if position < 0 or stream[position : position + 4] != b"\xff\x4f\xff\x51":
        raise Rejected("PIX_DECODE_ERROR")
    fields = struct.unpack_from(">HH8IH", stream, position + 4)
    right, bottom, left, top, tile_width, tile_height = fields[2:8]
    samples = fields[10]
    if not (tile_width and tile_height) or left >= right or top >= bottom:
        raise Rejected("PIX_CODESTREAM_MISMATCH")
    if -(-right // tile_width) * -(-bottom // tile_height) > _MAX_TILES:
        raise Rejected("PIX_CODESTREAM_MISMATCH")
    precisions: set[int] = set()
    for index in range(min(samples, 4)):
        depth, step_x, step_y = struct.unpack_from(">3B", stream, position + 42 + 3 * index)
        precisions.add((depth & 0x7F) + 1)
        if (step_x, step_y) != (1, 1):
            raise Rejected("PIX_CODESTREAM_MISMATCH")
    return Size(bottom - top, right - left, samples, max(precisions, default=0))


def _check_rle(stream: bytes, num_segments: int) -> None:
    """Check the RLE header: PS3.5 G.5."""
    count, *offsets = struct.unpack_from("<16I", stream)
    if count != num_segments:
        raise Rejected("PIX_CODESTREAM_MISMATCH")
    used = offsets[:count]
    if used != sorted(set(used)) or not used or used[0] < 64 or used[-1] >= len(stream):
        raise Rejected("PIX_CODESTREAM_MISMATCH")
