"""How well regions of maps agree with lesion boxes drawn by readers.

A box is (x, y, width, height) in px. A region finds a lesion where their boxes
overlap by at least `MIN_IOU`, the mildest of the thresholds in use for chest
X-rays: readers draw generously, maps do not follow outlines.

Source: Wang et al., ChestX-ray8, CVPR 2017 (overlap thresholds from 0.1); Chakraborty, free-response methodology.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memmc.errors import DataError

MIN_IOU = 0.1
FALSE_BOXES_PER_IMAGE = (0.25, 0.5, 1.0, 2.0)
DRAWS = 200  # of random places per image

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class BoxImage:
    """One image: what readers drew (T, 4) and what the map shows (R, 4) with peaks (R,), highest first."""

    truth_T4: Boxes
    found_R4: Boxes
    peaks_R: NDArray[np.float64]
    side_px: int


@dataclass(frozen=True)
class BoxFigures:
    """Agreement of regions with boxes.

    Attributes:
        num_images: all images, those without a box included.
        num_boxes: drawn by readers.
        hit_rate: share of the images with a box whose highest region finds one; an image without a region misses.
        hit_rate_random_box: the same for a region of that size at a random place.
        hit_rate_centre_prior: the same in the middle of the image.
        froc: share of boxes found at most at so many false regions per image; regions below the calibrated level are
            not looked at, so the last values repeat where there are no more.
    """

    num_images: int
    num_boxes: int
    hit_rate: float
    hit_rate_random_box: float
    hit_rate_centre_prior: float
    froc: dict[str, float]


def iou(first_N4: Boxes, second_M4: Boxes) -> NDArray[np.float64]:
    """Return (N, M): area of the intersection over that of the union; 0 for two boxes without area."""
    low = np.maximum(first_N4[:, None, :2], second_M4[None, :, :2])
    high = np.minimum((first_N4[:, :2] + first_N4[:, 2:])[:, None], (second_M4[:, :2] + second_M4[:, 2:])[None])
    inside_NM = np.clip(high - low, 0, None).prod(-1)
    union_NM = first_N4[:, 2:].prod(-1)[:, None] + second_M4[:, 2:].prod(-1)[None] - inside_NM
    return np.divide(inside_NM, union_NM, out=np.zeros_like(inside_NM), where=union_NM > 0)


def box_figures(images: Sequence[BoxImage], seed: int = 0) -> BoxFigures:
    """Return how often regions find lesions, beside what places chosen without looking find.

    Raises:
        DataError: no image has a box.
    """
    drawn = [image for image in images if len(image.truth_T4)]
    if not drawn:
        raise DataError(f"{len(images)} images and no box among them; expected at least one")
    rng = np.random.default_rng(seed)
    hits, random, centre = [], [], []
    for image in drawn:
        if not len(image.found_R4):
            hits.append(0.0)
            random.append(0.0)
            centre.append(0.0)
            continue
        top = image.found_R4[:1]
        free = np.clip(image.side_px - top[:, 2:], 0, None)
        places = [top, _at(top, rng.random((DRAWS, 2)) * free), _at(top, free / 2)]
        for into, boxes in zip((hits, random, centre), places, strict=True):
            into.append(float((iou(boxes, image.truth_T4).max(1) >= MIN_IOU).mean()))
    return BoxFigures(
        num_images=len(images),
        num_boxes=sum(len(image.truth_T4) for image in drawn),
        hit_rate=float(np.mean(hits)),
        hit_rate_random_box=float(np.mean(random)),
        hit_rate_centre_prior=float(np.mean(centre)),
        froc=froc(images),
    )


def froc(images: Sequence[BoxImage], rates: Sequence[float] = FALSE_BOXES_PER_IMAGE) -> dict[str, float]:
    """Return the largest share of boxes found at any peak threshold with at most so many false regions per image.

    A region is false when it finds no box; a box is found by its highest region.
    """
    found: list[float] = []  # peak at which each box is found
    false: list[float] = []
    num_boxes = sum(len(image.truth_T4) for image in images)
    for image in images:
        hit_RT = iou(image.found_R4, image.truth_T4) >= MIN_IOU
        found += [float(image.peaks_R[hit_R].max()) for hit_R in hit_RT.T if hit_R.any()]
        false += image.peaks_R[~hit_RT.any(1)].tolist()
    thresholds = np.array(sorted({*found, *false}, reverse=True))
    found_at, false_at = (len(peaks) - np.searchsorted(np.sort(peaks), thresholds) for peaks in (found, false))
    result: dict[str, float] = {}
    for rate in rates:
        allowed = found_at[false_at <= rate * len(images)]
        result[f"{rate:g}"] = float(allowed.max() / max(num_boxes, 1)) if allowed.size else 0.0
    return result


def _at(box_14: Boxes, corners_N2: Boxes) -> Boxes:
    return np.concatenate([corners_N2, np.repeat(box_14[:, 2:], len(corners_N2), axis=0)], axis=1)
