"""Why a stored image is kept out of training, calibration and scores: the closed list of flags."""

from __future__ import annotations

from collections.abc import Mapping

CONSTANT = "QC_CONSTANT"
SATURATED = "QC_SATURATED"
TOO_SMALL = "QC_TOO_SMALL"
ORIENTATION = "QC_ORIENTATION"
OOD = "QC_OOD"
DUPLICATE = "QC_DUPLICATE_PIXELS"

FLAGS: Mapping[str, str] = {
    CONSTANT: "every pixel of the stored image has one value",
    SATURATED: "more than quality.max_saturated of the pixels are at the darkest or at the brightest level",
    TOO_SMALL: "the object has fewer Rows (0028,0010) or Columns (0028,0011) than quality.min_side_px",
    ORIENTATION: "turned, mirrored top to bottom or inverted, it would fit the cohort's normals clearly better",
    OOD: "far from what the cohort's normals look like: another body part or view, or no radiograph",
    DUPLICATE: "the same picture as an earlier instance of another patient",
}
"""Flag to meaning, in the order in which an image's flags are written."""

OF_ONE_IMAGE = frozenset({CONSTANT, SATURATED, TOO_SMALL})
"""Flags that follow from the image alone; the others depend on the cohort."""


def in_order(flags: set[str]) -> tuple[str, ...]:
    """Return flags in the order of `FLAGS`."""
    return tuple(flag for flag in FLAGS if flag in flags)
