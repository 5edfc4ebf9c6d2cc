"""Why a place scored as it did: memory slots, look-alikes among normals, scales of the score.

Shape legend: B images, P passes, K visible patches, L patches, D encoder width, S layers, h heads, M memory slots,
F features of the score.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memmc.model.attention import MemoryAttention
from memmc.model.mae import MemMCMAE
from memmc.scoring.residuals import (
    FINEST_SIGMA_SHARE,
    MAP_SIGMA_SHARES,
    NUM_BANDS,
    Z_CLIP,
    MapStatistics,
    ResidualStatistics,
)
from memmc.scoring.scorer import PEAK_SHARE, WHOLE_OR_PEAK, Features, ResidualStatisticsScorer, Scorer


@dataclass(frozen=True)
class SlotUse:
    """One memory slot: attention it gets from the tokens of a place, and from all tokens; both in [0, 1]."""

    layer: int
    head: int
    slot: int
    attention: float
    attention_everywhere: float


@dataclass(frozen=True)
class Share:
    """One part of a score and its share; the shares of all parts sum to 1, and one may be negative."""

    part: str
    share: float


@torch.inference_mode()
def patch_features(model: MemMCMAE, images_BCHW: Tensor, ids_keep_BPK: Tensor) -> Tensor:
    """Return (B, L, D), unit length: what the encoder's last level makes of each patch where it is visible.

    Args:
        images_BCHW: standardised.
        ids_keep_BPK: complementary masks, so that each patch is visible in some pass; the mean over those is taken.
    """
    patches_BLP = model.patchify(images_BCHW)
    parts: list[Tensor] = []
    for ids_BK in ids_keep_BPK.unbind(1):
        tokens_BKD = model.encode(patches_BLP, ids_BK)[-1][:, 1:].float()
        total_BLD = tokens_BKD.new_zeros(len(tokens_BKD), model.num_patches, tokens_BKD.shape[2])
        parts.append(total_BLD.scatter_add(1, ids_BK[..., None].expand_as(tokens_BKD), tokens_BKD))
    return torch.nn.functional.normalize(torch.stack(parts).sum(0), dim=2)


@torch.inference_mode()
def slot_uses(model: MemMCMAE, image_CHW: Tensor, ids_keep_PK: Tensor, place_L: Tensor, top: int = 5) -> list[SlotUse]:
    """Return the slots that the visible tokens of a place attend to most, highest first; empty without a memory.

    Args:
        image_CHW: standardised.
        ids_keep_PK: complementary masks.
        place_L: true on the patches of the place.
        top: how many.
    """
    layers = [module for module in model.encoder.modules() if isinstance(module, MemoryAttention)]
    if model.config.memory_slots == 0:
        return []
    captured: list[Tensor] = []
    with _attention_inputs(layers, captured):
        model.encode(model.patchify(image_CHW[None]).expand(len(ids_keep_PK), -1, -1), ids_keep_PK)
    inside_PK = place_L[ids_keep_PK]
    means: list[Tensor] = []
    for layer, tokens in zip(layers, captured, strict=True):
        query, key, _ = layer.project(tokens)
        weights = (query.float() @ key.float().transpose(-1, -2) * layer.head_dim**-0.5).softmax(-1)
        slots_PKhM = weights[:, :, 1:, -layer.memory_slots :].transpose(1, 2)
        means.append(torch.stack([slots_PKhM[inside_PK].mean(0), slots_PKhM.flatten(0, 1).mean(0)]))
    here_ShM, everywhere_ShM = torch.stack(means).unbind(1)
    order = here_ShM.flatten().argsort(descending=True)[:top]
    places = [np.unravel_index(int(index), here_ShM.shape) for index in order]
    return [
        SlotUse(int(s) + 1, int(h) + 1, int(m) + 1, float(here_ShM[s, h, m]), float(everywhere_ShM[s, h, m]))
        for s, h, m in places
    ]


def scale_shares(scorer: Scorer, features: Features, size_px: int) -> list[Share]:
    """Return which scale of the residual carried the score of one image; empty for scores that have no such parts."""
    if not isinstance(scorer, ResidualStatisticsScorer) or scorer.vectors is None or scorer.maps is None:
        return []
    whole_B, peak_B, _ = scorer.parts(features.take(np.arange(1)))
    if scorer.name == "residual_peak" or (scorer.name == WHOLE_OR_PEAK and peak_B[0] > whole_B[0]):
        return _peak_shares(scorer.maps, features.maps_NMHW[0], size_px)
    shares_F = distance_shares(scorer.vectors, features.vectors_NF[0])
    widths = _band_widths(size_px)
    names = [
        *(f"residual of about {width}" for width in widths),
        "broad residual",
        *(f"the image's own detail of about {width}" for width in widths),
    ]
    parts = np.split(shares_F, len(names))
    return [Share(name, float(part.sum())) for name, part in zip(names, parts, strict=True)]


def distance_shares(statistics: ResidualStatistics, features_F: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the part (F,) of each feature in the squared distance; sums to 1.

    With S the covariance the statistics describe and z the standardised features, d^2 = z' S^-1 z / F; feature f has
    the part z_f (S^-1 z)_f. Correlated features share theirs, so a part may be negative.
    """
    z_F = np.clip((features_F.astype(np.float64) - statistics.mean_F) / statistics.std_F, -Z_CLIP, Z_CLIP)
    inside_Q = statistics.basis_QF @ z_F
    outside_F = z_F - statistics.basis_QF.T @ inside_Q
    solved_F = statistics.basis_QF.T @ (inside_Q / statistics.variance_Q) + outside_F / statistics.noise_variance
    parts_F = z_F * solved_F
    return parts_F / max(parts_F.sum(), 1e-12)


def _peak_shares(statistics: MapStatistics, maps_MHW: NDArray[np.floating], size_px: int) -> list[Share]:
    """Return the parts of the map channels in the squared height of the peak, dealt out as in `distance_shares`."""
    z_MP = ((maps_MHW.astype(np.float64) - statistics.mean_MHW) / statistics.std_MHW).reshape(len(maps_MHW), -1)
    whitening_PMM = statistics.whitening_HWMM.reshape(-1, len(z_MP), len(z_MP)).astype(np.float64)
    white_PM1 = whitening_PMM @ z_MP.T[..., None]
    parts_MP = z_MP * (whitening_PMM.transpose(0, 2, 1) @ white_PM1)[..., 0].T
    count = max(1, round(PEAK_SHARE * z_MP.shape[1]))
    total_M = parts_MP[:, np.argsort(parts_MP.sum(0))[-count:]].sum(1)
    names = [
        f"{kind} of about {share * size_px:.1f} px"
        for share in MAP_SIGMA_SHARES
        for kind in ("signed residual", "size of residual")
    ]
    names += [f"the image's own detail of about {width}" for width in _band_widths(size_px)]
    return [Share(name, float(part)) for name, part in zip(names, total_M / max(total_M.sum(), 1e-12), strict=True)]


def _band_widths(size_px: int) -> list[str]:
    return [f"{FINEST_SIGMA_SHARE * size_px * 2**band:.1f} px" for band in range(NUM_BANDS)]


@contextmanager
def _attention_inputs(layers: list[MemoryAttention], captured: list[Tensor]) -> Generator[None]:
    def capture(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.append(inputs[0])

    handles = [layer.register_forward_pre_hook(capture) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
