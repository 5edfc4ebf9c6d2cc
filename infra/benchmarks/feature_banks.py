"""PatchCore and PaDiM on the features of a trained MemMC-MAE's own encoder; for the comparison of `peers.py`.

A patch is described by its tokens at two levels of the encoder, every patch visible, averaged over its 3 x 3
neighbours.

Shape legend: N or B images, L patches, P all patches of all images, F features of a patch, Q features drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from quality_figures import batches
from quality_sets import Images
from torch import Tensor
from torch.nn.functional import avg_pool2d

from memmc.model.artifact import LoadedModel

DRAWN = 100
"""Features that PaDiM draws of all, as in the paper."""

CORESET, PROJECTED, NEIGHBOURS = 1000, 64, 9


@torch.inference_mode()
def patch_features(loaded: LoadedModel, images: Images) -> Tensor:
    """Return features_NLF, the levels at half and at five sixths of the depth beside each other."""
    model, info = loaded.model, loaded.info
    depth, side = model.config.encoder_depth, round(model.num_patches**0.5)
    chosen = (max(0, depth // 2 - 1), max(0, round(depth * 5 / 6) - 1))
    parts: list[Tensor] = []
    for images_BCHW, _ in batches(images):
        patches_BLP = model.patchify((images_BCHW - info.pixel_mean) / info.pixel_std)
        levels = model.encode(patches_BLP, torch.arange(model.num_patches).expand(len(patches_BLP), -1))
        tokens_BLF = torch.cat([levels[level][:, 1:] for level in chosen], dim=2)
        maps_BFhw = tokens_BLF.transpose(1, 2).unflatten(2, (side, side))
        parts.append(avg_pool2d(maps_BFhw, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2))
    return torch.cat(parts)


def padim(train_NLF: Tensor, test_NLF: Tensor, seed: int) -> NDArray[np.float64]:
    """Return the largest Mahalanobis distance of a patch from the normals' Gaussian at its place, (N,).

    Source: Defard et al., "PaDiM", ICPR 2021: random features, covariance + 0.01 I, the maximum over the map.
    """
    width = train_NLF.shape[2]
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: min(DRAWN, width)]
    train_LNQ, test_LNQ = (item[:, :, drawn].transpose(0, 1).double() for item in (train_NLF, test_NLF))
    mean_L1Q = train_LNQ.mean(1, keepdim=True)
    centred = train_LNQ - mean_L1Q
    covariance_LQQ = centred.transpose(1, 2) @ centred / (centred.shape[1] - 1)
    covariance_LQQ += 0.01 * torch.eye(len(drawn), dtype=torch.float64)
    rest_LNQ = test_LNQ - mean_L1Q
    solved = torch.linalg.solve(covariance_LQQ, rest_LNQ.transpose(1, 2)).transpose(1, 2)
    return (rest_LNQ * solved).sum(2).clamp_min(0).sqrt().amax(0).numpy()


def patch_core(train_NLF: Tensor, test_NLF: Tensor, seed: int) -> NDArray[np.float64]:
    """Return the distance of the strangest patch to its nearest normal one, wherever that lies, (N,).

    It is lowered where the normal one's own neighbours are as far: ``(1 - softmax of the distances) * distance``.

    Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022. [choice] a core set of 1,000
    patches at most, chosen in 64 random projections.
    """
    bank_PF = coreset(train_NLF.flatten(0, 1), seed)
    scores: list[float] = []
    for patches_LF in test_NLF:
        distance_LP = torch.cdist(patches_LF, bank_PF)
        nearest_L, at_L = distance_LP.min(1)
        strangest = int(nearest_L.argmax())
        normal_F = bank_PF[at_L[strangest]]
        around = torch.cdist(normal_F[None], bank_PF)[0].topk(min(NEIGHBOURS, len(bank_PF)), largest=False).indices
        weights = torch.softmax(distance_LP[strangest, around], dim=0)
        here = (around == at_L[strangest]).nonzero()[0, 0]
        scores.append(float((1 - weights[here]) * nearest_L[strangest]))
    return np.array(scores)


def coreset(patches_PF: Tensor, seed: int) -> Tensor:
    """Return patches such that none of all is far from one of them: the farthest is taken, again and again."""
    generator = torch.Generator().manual_seed(seed)
    small_PQ = patches_PF @ torch.randn(patches_PF.shape[1], PROJECTED, generator=generator)
    taken = [int(torch.randint(len(small_PQ), (1,), generator=generator))]
    away_P = (small_PQ - small_PQ[taken[0]]).square().sum(1)
    while len(taken) < min(CORESET, len(small_PQ)):
        taken.append(int(away_P.argmax()))
        away_P = torch.minimum(away_P, (small_PQ - small_PQ[taken[-1]]).square().sum(1))
    return patches_PF[taken]
