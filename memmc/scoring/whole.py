"""The whole scorer as one module of tensors: stored pixels in, score, p-value, verdict and map out.

It computes what `memmc.scoring.bulk` computes for the lake, with the same formulas and
nothing outside torch, so that it can be exported: standardisation, complementary
masking, reconstruction, the score and its calibration are all inside. Only which
patches a pass shows comes from outside, since that depends on the instance's UID
(`memmc.scoring.masks.mask_ids`).

Shape legend: B images, H and W pixels, C channels, P passes, K visible patches, L patches, D values of a patch,
F features, Q components, M map channels, n held-out normals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memmc.errors import DataError
from memmc.model.artifact import LoadedModel
from memmc.model.masking import mask_from_ids_keep
from memmc.scoring.residuals import Z_CLIP, map_channels, residual_vectors, shrunk, split_bands
from memmc.scoring.scorer import LOWEST, PEAK_SHARE, ResidualStatisticsScorer, Scorer, SimilarityScorer


class WholeScorer(nn.Module):
    """One model, one fitted scorer and one calibration.

    Args:
        loaded: the model.
        scorer: fitted.
        normal_scores: of the held-out normals.
        threshold: score above which an image is abnormal.
        bits: of a stored pixel; 2^bits - 1 is white.

    Raises:
        DataError: the scorer has no exportable form (`head_of`), or needs a fit and has none.
    """

    normals_n: Tensor

    def __init__(
        self, loaded: LoadedModel, scorer: Scorer, normal_scores: Sequence[float], threshold: float, bits: int
    ) -> None:
        super().__init__()
        self.model, self.info = loaded.model, loaded.info
        self.white, self.threshold = float(2**bits - 1), threshold
        self.register_buffer("normals_n", torch.tensor(sorted(normal_scores), dtype=torch.float64))
        head = head_of(scorer)
        if head is None:
            raise DataError(f"scorer {scorer.name!r} has no exportable form; calibrate with another score.scorer first")
        self.head = head

    def forward(self, pixels_BHWC: Tensor, ids_keep_BPK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score stored pixels.

        Args:
            pixels_BHWC: uint8 or uint16, as in the lake.
            ids_keep_BPK: int64, the visible patches of each pass; every patch is hidden in at least one.

        Returns:
            anomaly_score_B: float64, higher is more abnormal.
            p_value_B: float64, conformal, in [1 / (n + 1), 1].
            is_abnormal_B: bool, score above the threshold.
            anomaly_map_BHW: float32.
        """
        images_BCHW = (pixels_BHWC.float() / self.white).permute(0, 3, 1, 2)
        score_B, map_BHW = self.head(images_BCHW, self.reconstruct(images_BCHW, ids_keep_BPK))
        at_least_B = (self.normals_n >= score_B[:, None]).sum(1).double()
        p_value_B = (1.0 + at_least_B) / (self.normals_n.numel() + 1.0)
        return score_B, p_value_B, score_B > self.threshold, map_BHW

    def reconstruct(self, images_BCHW: Tensor, ids_keep_BPK: Tensor) -> Tensor:
        """Return (B, C, H, W) in [0, 1]: the mean, per patch, of the predictions of the passes that hid it."""
        mean, std = self.info.pixel_mean, self.info.pixel_std
        pred_BPLD = self.model.predict((images_BCHW - mean) / std, ids_keep_BPK)
        batch, passes, kept = ids_keep_BPK.shape
        hidden = mask_from_ids_keep(ids_keep_BPK.reshape(batch * passes, kept), self.model.num_patches)
        hidden_BPL1 = hidden.reshape(batch, passes, self.model.num_patches, 1)
        # A visible patch's prediction is untrained and may be anything: chosen away, not multiplied by zero.
        total_BLD = torch.where(hidden_BPL1 > 0, pred_BPLD, 0.0).sum(1)
        return self.model.unpatchify(total_BLD / hidden_BPL1.sum(1)) * std + mean


def head_of(scorer: Scorer) -> nn.Module | None:
    """Return a scorer as a module of tensors; None for one without an exportable form.

    Raises:
        DataError: the scorer needs a fit and has none.
    """
    if isinstance(scorer, ResidualStatisticsScorer):
        return ResidualHead(scorer)
    return SimilarityHead(scorer) if isinstance(scorer, SimilarityScorer) else None


class ResidualHead(nn.Module):
    """`ResidualStatisticsScorer` in torch; its formulas are described there and in `memmc.scoring.residuals`."""

    mean_F: Tensor
    std_F: Tensor
    basis_QF: Tensor
    variance_Q: Tensor
    map_mean_MHW: Tensor
    map_std_MHW: Tensor
    map_whitening_HWMM: Tensor

    def __init__(self, scorer: ResidualStatisticsScorer) -> None:
        super().__init__()
        vectors, maps = scorer.vectors, scorer.maps
        if vectors is None or maps is None:
            raise DataError("residual statistics are not fitted; calibrate first")
        self.grid, self.noise_variance = scorer.grid, vectors.noise_variance
        self.name, self.peak_scale = scorer.name, scorer.peak_scale
        for name in ("mean_F", "std_F", "basis_QF", "variance_Q"):
            self.register_buffer(name, torch.from_numpy(np.asarray(getattr(vectors, name), np.float64)))
        for name in ("mean_MHW", "std_MHW", "whitening_HWMM"):
            self.register_buffer(f"map_{name}", torch.from_numpy(np.asarray(getattr(maps, name), np.float32)))

    def forward(self, images_BCHW: Tensor, expected_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B,) float64 and maps (B, H, W) float32."""
        details, _ = split_bands(images_BCHW)
        maps_BMhw = shrunk(map_channels(images_BCHW, expected_BCHW, details))
        z_BMhw = (maps_BMhw - self.map_mean_MHW) / self.map_std_MHW
        white_hwMB = self.map_whitening_HWMM @ z_BMhw.permute(2, 3, 1, 0)
        map_Bhw = white_hwMB.square().mean(2).sqrt().permute(2, 0, 1)
        if self.name == "residual_peak":
            return self.peak(map_Bhw), enlarged(map_Bhw, images_BCHW.shape[2], images_BCHW.shape[3])
        score_B = self.distance(residual_vectors(images_BCHW, expected_BCHW, details, self.grid).double())
        if self.peak_scale is not None:
            intercept, slope = self.peak_scale
            peak_B = torch.exp(intercept + slope * torch.log(self.peak(map_Bhw).clamp(min=LOWEST)))
            score_B = torch.maximum(score_B, peak_B)
        return score_B, enlarged(map_Bhw, images_BCHW.shape[2], images_BCHW.shape[3])

    @staticmethod
    def peak(map_Bhw: Tensor) -> Tensor:
        """Return (B,), as `ResidualStatisticsScorer.peak`."""
        flat_BP = map_Bhw.flatten(1).double()
        return flat_BP.topk(max(1, round(PEAK_SHARE * flat_BP.shape[1])), dim=1).values.mean(1)

    def distance(self, features_BF: Tensor) -> Tensor:
        """Return (B,), as `ResidualStatistics.distance`."""
        z_BF = ((features_BF - self.mean_F) / self.std_F).clamp(-Z_CLIP, Z_CLIP)
        inside_BQ = z_BF @ self.basis_QF.t()
        outside_B = (z_BF.square().sum(1) - inside_BQ.square().sum(1)).clamp(min=0.0)
        square_B = (inside_BQ.square() / self.variance_Q).sum(1) + outside_B / self.noise_variance
        return (square_B / self.mean_F.numel()).sqrt()


class SimilarityHead(nn.Module):
    """`SimilarityScorer` in torch."""

    def __init__(self, scorer: SimilarityScorer) -> None:
        super().__init__()
        self.dissimilarity = scorer.dissimilarity

    def forward(self, images_BCHW: Tensor, expected_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B,) float64 and maps (B, H, W) float32."""
        map_BHW = self.dissimilarity(images_BCHW, expected_BCHW)
        small_Bhw = shrunk(map_BHW[:, None])[:, 0].float()
        return map_BHW.mean((1, 2)).double(), enlarged(small_Bhw, images_BCHW.shape[2], images_BCHW.shape[3])


def enlarged(map_Bhw: Tensor, height: int, width: int) -> Tensor:
    """Return the maps brought to the image's size bilinearly."""
    if tuple(map_Bhw.shape[1:]) == (height, width):
        return map_Bhw
    return F.interpolate(map_Bhw[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
