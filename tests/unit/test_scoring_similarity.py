"""Dissimilarity maps against references built on scipy alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from memmc.scoring import similarity

MEASURES = [
    similarity.l1,
    similarity.mse,
    similarity.ssim,
    similarity.ms_ssim,
    similarity.gradient_magnitude,
]


def pair(side: int, seed: int = 0, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((channels, side, side)), (0, 2, 2))
    first = (smooth - smooth.min()) / np.ptp(smooth)
    return first, np.clip(first + 0.1 * rng.standard_normal(first.shape), 0, 1)


def tensors(first: np.ndarray, second: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(first)[None], torch.from_numpy(second)[None]


def reference_terms(x: np.ndarray, y: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    radius = int(np.ceil(3.5 * sigma))

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, sigma, mode="mirror", radius=radius)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 1e-4, 9e-4
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


def test_blur_equals_scipy() -> None:
    image, _ = pair(40)
    for sigma in (0.7, 1.5, 3.0):
        expected = ndimage.gaussian_filter(image[0], sigma, mode="mirror", radius=int(np.ceil(3.5 * sigma)))
        np.testing.assert_allclose(similarity.gaussian_blur(torch.from_numpy(image)[None], sigma)[0, 0], expected)


def test_blur_wider_than_the_image_keeps_a_constant() -> None:
    constant = torch.full((1, 1, 5, 9), 0.3)
    torch.testing.assert_close(similarity.gaussian_blur(constant, 20.0), constant)


@pytest.mark.parametrize("sigma", [1.5, 2.88])
def test_ssim_equals_the_reference_up_to_the_border(sigma: float) -> None:
    first, second = pair(64)
    luminance, structure = reference_terms(first[0], second[0], sigma)
    result = similarity.ssim(*tensors(first, second), sigma)
    assert result.shape == (1, 64, 64)
    np.testing.assert_allclose(result[0], 1 - luminance * structure, atol=1e-10)


def test_ssim_sigma_follows_the_side() -> None:
    first, second = pair(64)
    torch.testing.assert_close(
        similarity.ssim(*tensors(first, second)), similarity.ssim(*tensors(first, second), 0.045 * 64)
    )
    assert similarity.ssim_sigma_px(224) == pytest.approx(10.08)


def test_ms_ssim_equals_the_reference() -> None:
    first, second = pair(64)
    weights = np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001)
    x, y, expected = first[0], second[0], np.ones((64, 64))
    for scale, weight in enumerate(weights):
        luminance, structure = reference_terms(x, y, 1.5)
        term = np.maximum(structure * luminance if scale == 2 else structure, 0)
        if scale:  # bilinear at half-pixel centres is order-1 zoom on grid_mode coordinates
            term = ndimage.zoom(term, 2**scale, order=1, mode="nearest", grid_mode=True)
        expected = expected * term**weight
        x, y = (image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3)) for image in (x, y))
    np.testing.assert_allclose(similarity.ms_ssim(*tensors(first, second))[0], 1 - expected, atol=1e-9)


def test_ms_ssim_scales_follow_the_side() -> None:
    assert [similarity.num_ms_ssim_scales(n) for n in (16, 32, 64, 127, 128, 159, 160, 224)] == [1, 2, 3, 3, 4, 4, 5, 5]


def test_gradient_magnitude_equals_the_reference() -> None:
    first, second = pair(48)
    magnitude = [
        np.hypot(ndimage.prewitt(x[0], 0, mode="mirror"), ndimage.prewitt(x[0], 1, mode="mirror")) / 3
        for x in (first, second)
    ]
    c = 170 / 255**2
    expected = 1 - (2 * magnitude[0] * magnitude[1] + c) / (magnitude[0] ** 2 + magnitude[1] ** 2 + c)
    np.testing.assert_allclose(similarity.gradient_magnitude(*tensors(first, second))[0], expected, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("height", "width", "channels"), [(64, 64, 1), (33, 47, 3)])
def test_a_measure_is_zero_on_equals_not_negative_and_whole(measure, height: int, width: int, channels: int) -> None:
    rng = np.random.default_rng(4)
    first = torch.from_numpy(rng.random((2, channels, height, width)))
    second = torch.from_numpy(rng.random((2, channels, height, width)))
    assert measure(first, first).abs().max() < 1e-9
    result = measure(first, second)
    assert result.shape == (2, height, width)
    assert (result >= 0).all()
    assert result.mean() > 1e-3
    torch.testing.assert_close(measure(first, second), measure(second, first))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_change_in_the_corner_is_seen_at_the_corner(measure) -> None:
    first = torch.from_numpy(pair(64)[0])[None]
    second = first.clone()
    second[..., :4, :4] = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = measure(first, second)[0]
    assert result[:8, :8].mean() > 5 * result[32:, 32:].mean()
    assert result[:2, :2].mean() > 0.5 * result[:8, :8].mean()
