"""Places of the stored square and of the original image are each other's, as the resampling lays them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmc.config import DataConfig
from memmc.dicom.geometry import Box, Fit, Geometry
from memmc.dicom.pixels import fit_mask

FITS: tuple[Fit, ...] = ("stretch", "pad", "crop")
sizes = st.integers(40, 300)


@given(rows=sizes, columns=sizes, fit=st.sampled_from(FITS))
def test_there_and_back(rows: int, columns: int, fit: Fit) -> None:
    geometry = Geometry(rows, columns, 64, fit)
    inside = geometry.to_stored(Box(0, 0, columns, rows))
    back = geometry.to_stored(geometry.to_image(inside))
    np.testing.assert_allclose(list(vars(back).values()), list(vars(inside).values()), atol=1e-9)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("rows", "columns"), [(160, 160), (240, 160), (130, 260)])
def test_a_rectangle_lands_where_resampling_puts_it(fit: Fit, rows: int, columns: int) -> None:
    """The oracle is a mask that goes the way of the pixels."""
    top, left, height, width = rows // 2 - 20, columns // 2 - 25, 40, 50
    mask = np.zeros((rows, columns), bool)
    mask[top : top + height, left : left + width] = True
    stored = fit_mask(mask, DataConfig(image_size=64, fit=fit))
    ys, xs = np.nonzero(stored)
    box = Geometry(rows, columns, 64, fit).to_stored(Box(left, top, width, height))
    found = (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
    np.testing.assert_allclose(list(vars(box).values()), found, atol=1.0)


def test_what_is_cropped_or_padded_has_no_extent_outside() -> None:
    cropped = Geometry(100, 200, 50, "crop")
    assert cropped.to_stored(Box(0, 0, 40, 100)).width_px == 0  # the middle 100 columns are kept
    padded = Geometry(100, 200, 50, "pad")
    assert padded.to_image(Box(0, 0, 50, 10)).height_px == 0  # 12 rows of padding on top
    assert padded.to_image(Box(0, 0, 50, 50)) == Box(0, 0, 200, 100)
