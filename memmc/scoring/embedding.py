"""One vector per image: what the encoder makes of the whole of it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from memmc.model.artifact import LoadedModel

_BATCH = 32


@torch.inference_mode()
def embeddings(loaded: LoadedModel, images_NHWC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return (N, D): the mean of the last level's patch tokens, every patch visible; no draw enters it.

    Args:
        loaded: the model.
        images_NHWC: in [0, 1].
    """
    model, info = loaded.model, loaded.info
    device = next(model.parameters()).device
    parts: list[NDArray[np.float64]] = []
    for start in range(0, len(images_NHWC), _BATCH):
        images_BCHW = torch.from_numpy(images_NHWC[start : start + _BATCH]).permute(0, 3, 1, 2).to(device)
        patches_BLP = model.patchify((images_BCHW - info.pixel_mean) / info.pixel_std)
        ids_BL = torch.arange(model.num_patches, device=device).expand(len(patches_BLP), -1)
        tokens_BLD = model.encode(patches_BLP, ids_BL)[-1][:, 1:]
        parts.append(tokens_BLD.mean(1).double().cpu().numpy())
    return np.concatenate(parts)
