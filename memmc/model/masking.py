"""Which patches an encoder sees.

Shape legend: B images, L patches, K kept (visible) patches, G passes of a round, X values of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memmc.errors import ConfigError, UsageError


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Return K = int(L * (1 - r)) [MAE].

    Raises:
        ConfigError: no patch would be visible, or none hidden.
    """
    kept = int(num_patches * (1.0 - mask_ratio) + 1e-9)
    if not 0 < kept < num_patches:
        raise ConfigError(
            f"mask ratio {mask_ratio} keeps {kept} of {num_patches} patches; some must be kept and some removed"
        )
    return kept


def num_groups(num_patches: int, num_keep: int) -> int:
    """Return the passes of one round: the least that show and hide every patch.

    Raises:
        UsageError: `num_keep` is not in 1 .. num_patches - 1.
    """
    if not 0 < num_keep < num_patches:
        raise UsageError(f"{num_keep} visible patches of {num_patches}: expected 1 to {num_patches - 1}")
    return max(-(-num_patches // num_keep), -(-num_patches // (num_patches - num_keep)))


def ring_places(num_patches: int, num_keep: int) -> NDArray[np.int64]:
    """Return which places of a permutation each pass of a round shows: (G, K), int64.

    Pass g shows the K places that follow place floor(g L / G) on a ring: each is shown at least once and hidden at
    least once.

    Raises:
        UsageError: no round exists for these sizes.
    """
    groups = num_groups(num_patches, num_keep)
    starts_G = np.arange(groups) * num_patches // groups
    return (starts_G[:, None] + np.arange(num_keep)) % num_patches


def random_ids_keep(
    batch: int,
    num_patches: int,
    kept: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return ids_keep_BK, an independent uniform draw of K distinct patches per image, ascending.

    Args:
        generator: source of randomness, on the device of the draw; the global one when None.

    Source: [MAE], per-sample random masking.
    """
    noise_BL = torch.rand(batch, num_patches, generator=generator, device=device)
    return noise_BL.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def mask_from_ids_keep(ids_keep_BK: Tensor, num_patches: int) -> Tensor:
    """Return mask_BL in float32: 1 = removed, 0 = kept."""
    mask_BL = torch.ones(ids_keep_BK.shape[0], num_patches, device=ids_keep_BK.device)
    return mask_BL.scatter_(1, ids_keep_BK, 0.0)


def gather_tokens(tokens_BLX: Tensor, ids_keep_BK: Tensor) -> Tensor:
    """Return the kept tokens, shape (B, K, X)."""
    return tokens_BLX.gather(1, ids_keep_BK[:, :, None].expand(-1, -1, tokens_BLX.shape[2]))
