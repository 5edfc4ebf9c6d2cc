"""Residual statistics: is this error unusual for this place and this scale?

A masked autoencoder errs most where a healthy image has most detail, and least
on the haze that hides it: the plain error is *lower* on smooth pathology than on
healthy lungs. So the error is not summed but described, per cell of a coarse
grid and per band of scales, beside the detail the image has there, and the
description is judged against held-out normals by a low-rank Gaussian. The distance is two-sided: too little residual is
as unusual as too much [choice].

Shape legend: B or N images, C channels, H and W pixels, F features, M map
channels, Q components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memmc.errors import DataError
from memmc.scoring.masks import Reconstruction
from memmc.scoring.similarity import gaussian_blur

Floats = NDArray[np.floating]

NUM_BANDS = 4
FINEST_SIGMA_SHARE = 0.011  # of the side: 0.7 px at 64 px; doubled from band to band
ENERGY_FLOOR = 1e-6  # squared grey values in [0, 1]: one thousandth of the range
MAP_SIDE = 64  # longer side at which maps of normals are kept, px
MAP_SIGMA_SHARES = (0.02, 0.04, 0.08)  # of the side
DETAIL_SIGMA_SHARE = 0.04  # over which a map takes the image's own detail, of the side
MIN_FIT = 8
STD_FLOOR = 1e-3  # of a feature: below it lies rounding, not anatomy
Z_CLIP = 8.0


def split_bands(images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return differences of Gaussians, finest first, and the smooth rest; they sum to the image.

    Widths are shares of the shorter side and double from band to band.
    """
    sigma_px = FINEST_SIGMA_SHARE * min(images_BCHW.shape[-2:])
    bands: list[Tensor] = []
    smoother = images_BCHW
    for band in range(NUM_BANDS):
        smooth = gaussian_blur(images_BCHW, sigma_px * 2**band)
        bands.append(smoother - smooth)
        smoother = smooth
    return bands, smoother


def describe(
    images_BCHW: Tensor, reconstruction: Reconstruction, grid: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return `residual_vectors`, and `map_channels` shrunk, as arrays."""
    expected_BCHW, (details, _) = reconstruction.mean_BCHW, split_bands(images_BCHW)
    vectors_BF = residual_vectors(images_BCHW, expected_BCHW, details, grid)
    return vectors_BF.float().cpu().numpy(), shrink_maps(map_channels(images_BCHW, expected_BCHW, details))


def residual_vectors(images_BCHW: Tensor, expected_BCHW: Tensor, details: Sequence[Tensor], grid: int) -> Tensor:
    """Return (B, F) features of images in [0, 1], their reconstruction in the same unit and their bands (B, C, H, W).

    Per cell of a grid x grid raster the log energy of the residual in each band and in the smooth rest, then of the
    image itself in each band: what could not be predicted from elsewhere, and how much detail there was to predict.
    The Gaussian of both weighs the one against the other as normals do. F = (2 NUM_BANDS + 1) grid^2 C [choice].
    """
    residuals, rest_BCHW = split_bands(images_BCHW - expected_BCHW)
    return torch.cat([_log_energy(band_BCHW, grid) for band_BCHW in [*residuals, rest_BCHW, *details]], dim=1)


def map_channels(images_BCHW: Tensor, expected_BCHW: Tensor, details: Sequence[Tensor]) -> Tensor:
    """Return (B, M, H, W): signed and absolute residual smoothed at each width, and the log energy of each band.

    Arguments are those of `residual_vectors`.
    """
    residual_BCHW = (images_BCHW - expected_BCHW).mean(1, keepdim=True)
    side = min(images_BCHW.shape[-2:])
    maps = [gaussian_blur(x, share * side) for share in MAP_SIGMA_SHARES for x in (residual_BCHW, residual_BCHW.abs())]
    energies = [gaussian_blur(band.mean(1, keepdim=True).square(), DETAIL_SIGMA_SHARE * side) for band in details]
    return torch.cat([*maps, *(_log(energy) for energy in energies)], dim=1)


def shrink_maps(maps_BMHW: Tensor) -> NDArray[np.float32]:
    """Return `shrunk` maps as an array."""
    return shrunk(maps_BMHW).cpu().numpy()


def shrunk(maps_BMHW: Tensor) -> Tensor:
    """Return the maps area-averaged to a longer side of at most `MAP_SIDE` px.

    Not rounded: float16 would turn a difference in the last bit, between batches, into one of 5e-4.
    """
    longer = max(maps_BMHW.shape[-2:])
    if longer > MAP_SIDE:
        size = [max(1, round(n * MAP_SIDE / longer)) for n in maps_BMHW.shape[-2:]]
        maps_BMHW = F.interpolate(maps_BMHW, size=size, mode="area")
    return maps_BMHW.float()


@dataclass(frozen=True)
class ResidualStatistics:
    """A low-rank Gaussian of feature vectors: probabilistic PCA of standardised features.

    ``d(x)^2 = (sum_q (u_q . z)^2 / lambda_q + |z - U U^T z|^2 / sigma^2) / F``, with z the standardised features, U the
    leading eigenvectors and sigma^2 the mean of the other eigenvalues: the Mahalanobis distance under the model of
    Tipping and Bishop. It needs no full-rank covariance, so fewer images than features are enough.

    Source: Tipping and Bishop, Probabilistic Principal Component Analysis, JRSS B 1999; its use here is [choice].

    Attributes:
        mean_F, std_F: of the normals' features, std_F at least `STD_FLOOR`; standardised features are cut at 8.
        basis_QF: orthonormal rows.
        variance_Q: along the rows, shrunk towards the mean eigenvalue.
        noise_variance: of every direction outside them.
    """

    mean_F: Floats
    std_F: Floats
    basis_QF: Floats
    variance_Q: Floats
    noise_variance: float

    @classmethod
    def fit(cls, features_NF: Floats, components: int) -> ResidualStatistics:
        """Fit on normals; at most N / 4 components are kept.

        Raises:
            DataError: fewer than 8 images, or a feature is not finite.
        """
        features_NF = features_NF.astype(np.float64)
        count, width = features_NF.shape
        if count < MIN_FIT:
            raise DataError(f"{count} normal images to fit residual statistics; expected at least {MIN_FIT}")
        if not np.isfinite(features_NF).all():
            raise DataError(f"{int((~np.isfinite(features_NF)).sum())} residual features are not finite")
        mean_F, std_F = features_NF.mean(0), np.maximum(features_NF.std(0, ddof=1), STD_FLOOR)
        _, singular, basis = np.linalg.svd(_standardise(features_NF, mean_F, std_F), full_matrices=False)
        eigenvalues = singular**2 / (count - 1)
        kept = max(1, min(components, count // 4, width - 1))
        mean_eigenvalue = max(eigenvalues.sum() / width, 1e-12)
        noise = max((eigenvalues.sum() - eigenvalues[:kept].sum()) / max(width - kept, 1), 1e-3 * mean_eigenvalue)
        shrinkage = kept / (kept + count)
        variance_Q = (1 - shrinkage) * eigenvalues[:kept] + shrinkage * mean_eigenvalue
        return cls(mean_F, std_F, basis[:kept], variance_Q, float(noise))

    def distance(self, features_NF: Floats) -> NDArray[np.float64]:
        """Return (N,) distances, about 1 for a normal image; larger is less like the normals."""
        z_NF = _standardise(features_NF.astype(np.float64), self.mean_F, self.std_F)
        inside_NQ = z_NF @ self.basis_QF.T
        outside_N = np.maximum((z_NF**2).sum(1) - (inside_NQ**2).sum(1), 0.0)
        square_N = (inside_NQ**2 / self.variance_Q).sum(1) + outside_N / self.noise_variance
        return np.sqrt(square_N / z_NF.shape[1])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` takes back."""
        return {
            "mean_F": self.mean_F,
            "std_F": self.std_F,
            "basis_QF": np.ascontiguousarray(self.basis_QF),
            "variance_Q": self.variance_Q,
            "noise_variance": np.array([self.noise_variance]),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> ResidualStatistics:
        """Return the statistics that `state_dict` described."""
        arrays = [state[name] for name in ("mean_F", "std_F", "basis_QF", "variance_Q")]
        return cls(*arrays, noise_variance=float(state["noise_variance"][0]))


@dataclass(frozen=True)
class MapStatistics:
    """A Gaussian over the map channels of every pixel.

    Attributes:
        mean_MHW, std_MHW: of the normals.
        whitening_HWMM: lower triangular W, with W'W the inverse of the correlation of the standardised channels, shrunk
            towards none by M / (M + N) [choice].
    """

    mean_MHW: Floats
    std_MHW: Floats
    whitening_HWMM: Floats

    @classmethod
    def fit(cls, maps_NMHW: Floats) -> MapStatistics:
        """Fit on normals; a deviation is not taken below a quarter of its map channel's median."""
        count, channels, height, width = maps_NMHW.shape
        mean_MHW, std_MHW = np.empty((2, channels, height, width), np.float32)
        for row in range(height):  # one at a time: a wider copy of all maps would not fit beside many normals
            part_NMW = maps_NMHW[:, :, row].astype(np.float64)
            mean_MHW[:, row], std_MHW[:, row] = part_NMW.mean(0), part_NMW.std(0, ddof=1)
        floor_M11 = 0.25 * np.median(std_MHW, axis=(1, 2), keepdims=True) + 1e-4
        std_MHW = np.maximum(std_MHW, floor_M11)
        shrinkage = channels / (channels + count)
        whitening_HWMM = np.empty((height, width, channels, channels), np.float32)
        for row in range(height):
            z_NMW = (maps_NMHW[:, :, row].astype(np.float64) - mean_MHW[:, row]) / std_MHW[:, row]
            z_WMN = z_NMW.transpose(2, 1, 0)
            correlation_WMM = z_WMN @ z_WMN.transpose(0, 2, 1) / (count - 1)
            shrunk_WMM = (1 - shrinkage) * correlation_WMM + shrinkage * np.eye(channels)
            whitening_HWMM[row] = np.linalg.inv(np.linalg.cholesky(shrunk_WMM))
        return cls(mean_MHW, std_MHW, whitening_HWMM)

    def anomaly(self, maps_NMHW: Floats) -> NDArray[np.float32]:
        """Return (N, h, w): Mahalanobis distance of the channels from normal by the root of M, about 1 where normal."""
        z_NMHW = (maps_NMHW.astype(np.float32) - self.mean_MHW) / self.std_MHW
        white_HWMN = self.whitening_HWMM.astype(np.float32) @ z_NMHW.transpose(2, 3, 1, 0)
        return np.ascontiguousarray(np.sqrt((white_HWMN**2).mean(2)).transpose(2, 0, 1))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` takes back."""
        return {
            "map_mean_MHW": self.mean_MHW,
            "map_std_MHW": self.std_MHW,
            "map_whitening_HWMM": self.whitening_HWMM,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> MapStatistics:
        """Return the statistics that `state_dict` described."""
        return cls(state["map_mean_MHW"], state["map_std_MHW"], state["map_whitening_HWMM"])


def _cells(maps_BCHW: Tensor, grid: int) -> Tensor:
    return F.adaptive_avg_pool2d(maps_BCHW, grid).flatten(1)


def _log_energy(band_BCHW: Tensor, grid: int) -> Tensor:
    return _log(_cells(band_BCHW.square(), grid))


def _log(energies: Tensor) -> Tensor:
    return 0.5 * torch.log(energies + ENERGY_FLOOR)


def _standardise(features_NF: Floats, mean_F: Floats, std_F: Floats) -> Floats:
    return np.clip((features_NF - mean_F) / std_F, -Z_CLIP, Z_CLIP)
