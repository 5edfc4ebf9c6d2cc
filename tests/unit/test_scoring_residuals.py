"""Residual features and the low-rank Gaussian, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from memmc.errors import DataError
from memmc.scoring.masks import Reconstruction
from memmc.scoring.residuals import (
    NUM_BANDS,
    MapStatistics,
    ResidualStatistics,
    describe,
    split_bands,
)


def reconstruction(mean_BCHW: torch.Tensor) -> Reconstruction:
    return Reconstruction(mean_BCHW, torch.zeros_like(mean_BCHW), torch.ones(len(mean_BCHW), 4, dtype=torch.long))


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_bands_sum_to_the_image() -> None:
    image = noise((2, 1, 64, 64))
    bands, rest = split_bands(image)
    assert len(bands) == NUM_BANDS
    torch.testing.assert_close(sum(bands, rest), image)


def test_bands_of_a_larger_copy_are_the_larger_bands() -> None:
    # Widths are shares of the side, so the same picture at twice the size has the same energy per band.
    coarse = torch.nn.functional.interpolate(noise((1, 1, 16, 16)), size=64, mode="bicubic")
    fine = torch.nn.functional.interpolate(coarse, size=128, mode="bicubic")
    for small, large in zip(split_bands(coarse)[0], split_bands(fine)[0], strict=True):
        assert float(large.square().mean()) == pytest.approx(float(small.square().mean()), rel=0.15)


def test_features_have_the_stated_length_and_see_place_and_scale() -> None:
    image = noise((1, 1, 64, 64))
    expected = image - 0.01
    base = describe(image, reconstruction(expected), 4)[0]
    assert base.shape == (1, (2 * NUM_BANDS + 1) * 16)
    assert base.dtype == np.float32
    checks = 0.2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2) - 0.1

    def change(other: torch.Tensor) -> np.ndarray:
        """(2 NUM_BANDS + 1, 4, 4): residual from fine to broad, then the image."""
        return (describe(image, reconstruction(other), 4)[0] - base).reshape(-1, 4, 4)

    fine = expected.clone()
    fine[..., :16, :16] += checks  # first cell of the raster
    assert np.unravel_index(np.abs(change(fine)).argmax(), (2 * NUM_BANDS + 1, 4, 4)) == (0, 0, 0)
    np.testing.assert_array_equal(change(fine)[NUM_BANDS + 1 :], 0)  # the image is as it was
    broad = change(expected - 0.2)
    assert broad[NUM_BANDS].min() > 1
    np.testing.assert_allclose(np.delete(broad, NUM_BANDS, 0), 0, atol=1e-4)


def test_energies_are_those_of_numpy() -> None:
    image, expected = noise((1, 1, 32, 32)), noise((1, 1, 32, 32), seed=1)
    found = describe(image, reconstruction(expected), 2)[0][0].reshape(-1, 2, 2)
    band = split_bands(image - expected)[0][1][0, 0].numpy().astype(np.float64)
    assert found[1, 1, 0] == pytest.approx(0.5 * np.log((band[16:, :16] ** 2).mean() + 1e-6), rel=1e-5)
    detail = split_bands(image)[0][2][0, 0].numpy().astype(np.float64)
    assert found[NUM_BANDS + 3, 0, 1] == pytest.approx(0.5 * np.log((detail[:16, 16:] ** 2).mean() + 1e-6), rel=1e-5)


def test_too_little_residual_is_as_far_as_too_much() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(200, 20))
    fitted = ResidualStatistics.fit(normals, components=4)
    low, high = fitted.distance(normals.mean(0) + 3 * np.array([[-1.0], [1.0]]))
    assert low == pytest.approx(high, rel=1e-6)
    assert low > np.quantile(fitted.distance(normals), 0.99)


def test_distance_equals_mahalanobis_under_the_stated_covariance() -> None:
    rng = np.random.default_rng(1)
    normals = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 12)) + 0.3 * rng.normal(size=(60, 12))
    fitted = ResidualStatistics.fit(normals, components=3)
    basis = fitted.basis_QF
    covariance = basis.T @ np.diag(fitted.variance_Q) @ basis + fitted.noise_variance * (np.eye(12) - basis.T @ basis)
    other = rng.normal(size=(5, 12))
    z = (other - normals.mean(0)) / normals.std(0, ddof=1)
    expected = np.sqrt(np.einsum("nf,fg,ng->n", z, np.linalg.inv(covariance), z) / 12)
    np.testing.assert_allclose(fitted.distance(other), expected, rtol=1e-8)


def test_new_normals_lie_near_one_with_fewer_images_than_features() -> None:
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(5, 300))
    draw = rng.normal(size=(200, 5)) @ mixing + 0.5 * rng.normal(size=(200, 300))
    fitted = ResidualStatistics.fit(draw[:100], components=16)
    normal = fitted.distance(draw[100:])
    shifted = fitted.distance(draw[100:] + 1.0 * rng.choice([-1, 1], size=300))
    assert 0.7 < np.median(normal) < 1.5
    assert stats.mannwhitneyu(shifted, normal).statistic / (100 * 100) > 0.99


def test_components_are_limited_by_the_images() -> None:
    normals = np.random.default_rng(3).normal(size=(16, 40))
    assert ResidualStatistics.fit(normals, components=16).basis_QF.shape == (4, 40)


def test_one_feature_cannot_carry_the_distance_away() -> None:
    normals = np.random.default_rng(4).normal(size=(100, 30))
    fitted = ResidualStatistics.fit(normals, components=4)
    outlier = normals[:1].copy()
    outlier[0, 0] = 1e6
    assert fitted.distance(outlier)[0] < 10


def test_rounding_in_a_constant_feature_does_not_count() -> None:
    normals = np.random.default_rng(5).normal(size=(50, 6))
    normals[:, 2] = 1.0
    fitted = ResidualStatistics.fit(normals, components=2)
    moved = normals[:1].copy()
    moved[0, 2] += 1e-7
    assert fitted.distance(moved)[0] == pytest.approx(fitted.distance(normals[:1])[0], rel=1e-4)
    moved[0, 2] += 1.0  # a marker where no normal image has anything
    assert fitted.distance(moved)[0] > 3


def test_unusable_normals_are_refused() -> None:
    with pytest.raises(DataError, match="at least 8"):
        ResidualStatistics.fit(np.zeros((7, 3)), 2)
    broken = np.zeros((20, 3))
    broken[0, 0] = np.nan
    with pytest.raises(DataError, match="1 residual features are not finite"):
        ResidualStatistics.fit(broken, 2)


def test_map_statistics_find_the_odd_place() -> None:
    images = noise((31, 1, 64, 64), seed=6)
    expected = images + 0.02 * (noise((31, 1, 64, 64), seed=7) - 0.5)
    expected[30, :, 40:56, 8:24] += 0.1
    maps = describe(images, reconstruction(expected), 4)[1]
    assert maps.shape == (31, 10, 64, 64)
    assert maps.dtype == np.float32
    anomaly = MapStatistics.fit(maps[:30]).anomaly(maps)
    assert anomaly.shape == (31, 64, 64)
    assert (anomaly >= 0).all()
    row, column = np.unravel_index(anomaly[30].argmax(), (64, 64))
    assert 38 <= row < 58
    assert 6 <= column < 26
    assert anomaly[30].max() > 3 * anomaly[:30].max(axis=(1, 2)).mean()


def test_map_anomaly_equals_the_dense_mahalanobis_distance() -> None:
    rng = np.random.default_rng(8)
    mixing = rng.normal(size=(3, 3))
    maps = np.einsum("mk,nkhw->nmhw", mixing, rng.normal(size=(50, 3, 4, 5))).astype(np.float32)
    fitted = MapStatistics.fit(maps)
    pixel = maps[:, :, 2, 1].astype(np.float64)
    std = np.maximum(pixel.std(0, ddof=1), 0.25 * np.median(maps.std(0, ddof=1), axis=(1, 2)) + 1e-4)
    z = (pixel - pixel.mean(0)) / std
    correlation = (50 * z.T @ z / 49 + 3 * np.eye(3)) / 53
    expected = np.sqrt(np.einsum("nm,mk,nk->n", z, np.linalg.inv(correlation), z) / 3)
    np.testing.assert_allclose(fitted.anomaly(maps)[:, 2, 1], expected, rtol=1e-4)


def test_a_map_channel_that_never_changes_does_no_harm() -> None:
    maps = np.random.default_rng(9).normal(size=(12, 3, 4, 4)).astype(np.float32)
    maps[:, 1] = 0.5
    anomaly = MapStatistics.fit(maps).anomaly(maps)
    assert np.isfinite(anomaly).all()
    assert 0.3 < anomaly.mean() < 1.5


def test_maps_of_large_images_are_kept_small() -> None:
    images = noise((1, 3, 160, 200))
    assert describe(images, reconstruction(images), 4)[1].shape == (1, 10, 51, 64)
