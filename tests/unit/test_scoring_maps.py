"""Map storage, the fixed colour scale, regions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from memmc.errors import DataError
from memmc.scoring.maps import decode_map, encode_map, heat_colours, map_scale, overlay_png, regions


def blobs() -> np.ndarray:
    anomaly = np.zeros((32, 48), np.float32)
    anomaly[2:6, 3:9] = 2.0
    anomaly[20:22, 40:44] = 5.0
    anomaly[22, 44] = 4.0  # touches the second blob at a corner only
    anomaly[30, 1] = 3.0
    return anomaly


def test_a_map_survives_storage_to_half_precision() -> None:
    anomaly = np.random.default_rng(0).gamma(2.0, size=(5, 7)).astype(np.float32)
    data = encode_map(anomaly)
    assert len(data) == 2 * 5 * 7
    np.testing.assert_allclose(decode_map(data, 5, 7), anomaly, rtol=1e-3)
    assert np.frombuffer(data[:2], "<f2")[0] == np.float16(anomaly[0, 0])


def test_values_past_half_precision_stay_finite() -> None:
    assert decode_map(encode_map(np.array([[1e9]])), 1, 1)[0, 0] == 65504


def test_unusable_maps_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        encode_map(np.array([[np.nan]]))
    with pytest.raises(DataError, match="take 40"):
        decode_map(b"\0" * 6, 4, 5)
    with pytest.raises(DataError, match="no maps"):
        map_scale(np.zeros((0, 4, 4)))


def test_the_scale_is_a_quantile_over_all_normals_and_never_zero() -> None:
    maps = np.arange(10_000, dtype=float).reshape(4, 50, 50)
    assert map_scale(maps) == pytest.approx(np.quantile(maps, 0.995))
    assert map_scale(np.zeros((2, 4, 4))) > 0


def test_one_map_value_has_one_colour_whatever_the_image() -> None:
    quiet, loud = np.full((4, 4), 0.5), np.full((4, 4), 0.5)
    loud[0, 0] = 50.0
    for first, second in zip(heat_colours(quiet, 2.0), heat_colours(loud, 2.0), strict=True):
        np.testing.assert_array_equal(first[1:], second[1:])
    _, alpha = heat_colours(np.array([[0.0, 1.0, 2.0, 9.0]]), 2.0)
    assert alpha[0, 0] == 0
    assert alpha[0, 1] < alpha[0, 2] == alpha[0, 3] <= 1


def test_overlay_leaves_normal_places_grey_and_colours_the_others() -> None:
    image = np.full((16, 16), 0.5, np.float32)
    anomaly = np.zeros((16, 16), np.float32)
    anomaly[4:8, 4:8] = 3.0
    picture = np.asarray(Image.open(io.BytesIO(overlay_png(image, anomaly, scale=3.0))))
    assert picture.shape == (16, 16, 3)
    assert (np.ptp(picture[12:, 12:], axis=-1) == 0).all()
    assert picture[5, 5].max() > 200


def test_overlay_takes_colour_images_other_map_sizes_and_a_side() -> None:
    image = np.random.default_rng(1).random((20, 40, 3))
    with Image.open(io.BytesIO(overlay_png(image, np.ones((5, 10)), 1.0, side=100))) as picture:
        assert picture.size == (100, 50)
    with pytest.raises(DataError, match="colour scale"):
        overlay_png(image, np.ones((5, 10)), 0.0)


def test_regions_are_connected_boxed_and_ordered_by_peak() -> None:
    found = regions(blobs(), level=1.0)
    assert [region.peak for region in found] == [5.0, 3.0, 2.0]
    first, _, last = found
    assert (first.x_px, first.y_px, first.width_px, first.height_px, first.area_px) == (40, 20, 5, 3, 9)
    assert (last.x_px, last.y_px, last.width_px, last.height_px, last.area_px) == (3, 2, 6, 4, 24)
    assert len(regions(blobs(), 1.0, min_area_px=2)) == 2
    assert len(regions(blobs(), 1.0, max_regions=1)) == 1
    assert regions(blobs(), 6.0) == []
