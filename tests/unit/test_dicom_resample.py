"""Reduction to the square, against Pillow's triangle filter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from memmc.config import DataConfig
from memmc.dicom.resample import WHITE, resample, triangle


def reduced(image_HW, **fields):
    """Reduce an image of 0..1; the result is 0..1 too."""
    levels_HW = np.rint(image_HW * float(WHITE))
    return resample(lambda top, bottom: levels_HW[top:bottom], *image_HW.shape, DataConfig(**fields)) / WHITE


@pytest.mark.parametrize("shape", [(480, 640), (2000, 37), (64, 64), (20, 500), (17, 19), (1, 1)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_equals_the_library_on_any_shape(shape, fit):
    image_HW = np.random.default_rng(3).random(shape, dtype=np.float32)
    height, width = shape
    pillow = Image.fromarray(image_HW)
    if fit == "pad":
        scale = 64 / max(shape)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        expected = np.zeros((64, 64), np.float32)
        top, left = (64 - inner[1]) // 2, (64 - inner[0]) // 2
        expected[top : top + inner[1], left : left + inner[0]] = pillow.resize(inner, Image.Resampling.BILINEAR)
    else:
        short = min(shape) if fit == "crop" else None
        box = (
            (0, 0, width, height)
            if short is None
            else ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
        )
        expected = np.asarray(pillow.resize((64, 64), Image.Resampling.BILINEAR, box=box))
    np.testing.assert_allclose(reduced(image_HW, image_size=64, fit=fit), expected, atol=2e-5)


def test_a_flat_image_stays_flat_and_no_value_leaves_the_range():
    np.testing.assert_allclose(reduced(np.full((333, 777), 0.7, np.float32), image_size=64), 0.7, atol=1e-5)
    checkers_HW = (np.indices((301, 299)).sum(0) % 2).astype(np.float32)
    small_SS = reduced(checkers_HW, image_size=64)
    assert small_SS.min() >= 0 and small_SS.max() <= 1
    assert abs(float(small_SS.mean()) - 0.5) < 0.01  # nothing aliases


@pytest.mark.parametrize("shape", [(2500, 2048), (97, 16_384)])
def test_the_arithmetic_is_exact_so_that_no_matrix_library_can_change_a_pixel(shape):
    levels_HW = np.random.default_rng(5).integers(0, WHITE, shape, endpoint=True)
    levels_HW[:50] = WHITE
    rows, columns = (triangle(size, 64).astype(np.int64) for size in shape)
    assert (rows.sum(1) == 1 << 18).all() and rows.min() >= 0
    exact_SS = (rows @ levels_HW) @ columns.T  # whole numbers of 64 bits
    values_HW = levels_HW.astype(np.float64)
    small_SS = resample(lambda top, bottom: values_HW[top:bottom], *shape, DataConfig(image_size=64))
    assert (small_SS * 2.0**36 == exact_SS).all()
