"""Where an image could hold text: blocks that edges cross to and fro, across and down.

A stroke of a letter is a rising and a falling edge a few pixels apart; anatomy
is smooth at that scale, and what is not (a collimator's edge, a clip, a cable,
a laterality mark) covers a few per cent of a radiograph. A network that reads
text therefore need not see the rest.

Shapes: H, W the working image; R, C its blocks down and across.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WORK_SIDE: Final = 1536  # px of the longer side: letters of 1/150 of it are still 10 px high
BLOCK: Final = 16  # px
_LEAST_EDGES = 4  # of each sign and direction in a block
_LEAST_STEP = 12  # grey levels of 255 over two pixels: a contrast of 5 %
_NOISE_FACTOR = 6.0  # times the image's own median step
_MOST_COVERED = 0.5  # share of the image above which nothing is won by cutting it up
_GAP = 8  # px between pieces

Grey = NDArray[np.uint8]
Piece = tuple[slice, slice]


def working_image(image_HW: Grey) -> Grey:
    """Return an image with its longer side at most `WORK_SIDE`."""
    height, width = image_HW.shape
    scale = max(height, width) / WORK_SIDE
    if scale <= 1:
        return image_HW
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    return np.asarray(Image.fromarray(image_HW).resize(size, Image.Resampling.BILINEAR))


def glyph_blocks(image_HW: Grey) -> NDArray[np.bool_]:
    """Return, shape (R, C), the blocks with steps up and down in both directions, and their neighbours."""
    from scipy import ndimage  # here and below: only where text is read, not in whoever feeds a sandbox

    height, width = image_HW.shape
    padding = ((0, -height % BLOCK), (0, -width % BLOCK))
    levels_HW = np.pad(image_HW, padding, mode="edge").astype(np.int16)
    across_HW, down_HW = np.zeros_like(levels_HW), np.zeros_like(levels_HW)
    across_HW[:, 2:] = levels_HW[:, 2:] - levels_HW[:, :-2]
    down_HW[2:] = levels_HW[2:] - levels_HW[:-2]
    step = _step(across_HW)
    counts = [_count(mask) for change in (across_HW, down_HW) for mask in (change > step, change < -step)]
    found_RC = np.minimum.reduce(counts) >= _LEAST_EDGES
    return np.asarray(ndimage.binary_dilation(found_RC, np.ones((3, 3), dtype=bool)), dtype=np.bool_)


def _step(across_HW: NDArray[np.int16]) -> float:
    """Return the least step that counts as an edge in this image: well above its noise."""
    sample = np.abs(across_HW[::4, ::4])
    changing = sample[sample > 0]
    return max(_LEAST_STEP, _NOISE_FACTOR * float(np.median(changing))) if changing.size else _LEAST_STEP


def _count(mask_HW: NDArray[np.bool_]) -> NDArray[np.uint16]:
    height, width = mask_HW.shape
    blocks = mask_HW.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return blocks.sum(axis=3, dtype=np.uint16).sum(axis=1, dtype=np.uint16)


def glyph_mosaic(image_HW: Grey) -> Grey | None:
    """Return the pieces that could hold text, side by side on one canvas, or None where there are none.

    Sides are multiples of 32 px. An image that could hold text in most places is
    returned whole.
    """
    from scipy import ndimage

    labels_RC = np.empty_like(blocks_RC := glyph_blocks(image_HW), dtype=np.int32)
    ndimage.label(blocks_RC, structure=np.ones((3, 3)), output=labels_RC)
    height, width = image_HW.shape
    pieces: list[Piece] = []
    for rows, columns in ndimage.find_objects(labels_RC):
        top, left = rows.start * BLOCK, columns.start * BLOCK
        pieces.append((slice(top, min(rows.stop * BLOCK, height)), slice(left, min(columns.stop * BLOCK, width))))
    if not pieces:
        return None
    covered = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in pieces)
    if covered > _MOST_COVERED * image_HW.size:
        return np.pad(image_HW, ((0, -height % 32), (0, -width % 32)), mode="edge")
    return _pack(image_HW, pieces, covered)


def _pack(image_HW: Grey, pieces: list[Piece], covered: int) -> Grey:
    """Lay pieces out in rows, tallest first."""
    widest = max(columns.stop - columns.start for _, columns in pieces)
    width = max(widest, int(covered**0.5)) + _GAP
    width += -width % 32
    places: list[tuple[int, int]] = []
    x = y = shelf = 0
    pieces = sorted(pieces, key=lambda piece: piece[0].start - piece[0].stop)
    for rows, columns in pieces:
        if x + columns.stop - columns.start > width:
            x, y, shelf = 0, y + shelf + _GAP, 0
        places.append((y, x))
        x += columns.stop - columns.start + _GAP
        shelf = max(shelf, rows.stop - rows.start)
    height = y + shelf
    canvas_HW = np.zeros((height + -height % 32, width), dtype=np.uint8)
    for (top, left), (rows, columns) in zip(places, pieces, strict=True):
        piece_HW = _stretched(image_HW[rows, columns])
        canvas_HW[top : top + piece_HW.shape[0], left : left + piece_HW.shape[1]] = piece_HW
    return canvas_HW


def _stretched(piece_HW: Grey) -> Grey:
    """Return a piece over the whole range of grey, so that faint letters are as plain as others."""
    low, high = int(piece_HW.min()), int(piece_HW.max())
    return ((piece_HW.astype(np.float32) - low) * (255.0 / max(high - low, 1))).astype(np.uint8)
