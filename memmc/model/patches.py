"""Images to patches and back, and where a patch lies.

Shape legend: B images, C channels, H height, W width, L patches, P values of a
patch (patch_size * patch_size * C), D width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memmc.errors import ConfigError


def grid_side(image_size: int, patch_size: int) -> int:
    """Return the number of patches along one side.

    Raises:
        ConfigError: the image's side is no multiple of the patch's.
    """
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise ConfigError(
            f"image side {image_size} px is not a multiple of the patch side {patch_size} px; "
            "change data.image_size or model.patch_size"
        )
    return image_size // patch_size


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Return patches_BLP: patches row by row, within one row by row, channels last.

    Height and width must be multiples of `patch_size`.

    Source: [MAE], the order of its targets.
    """
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = images_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches_BLP: Tensor, patch_size: int, channels: int) -> Tensor:
    """Return images_BCHW of a square grid of patches; the inverse of `patchify`."""
    batch, num_patches, _ = patches_BLP.shape
    side = round(num_patches**0.5)
    tiles = patches_BLP.reshape(batch, side, side, patch_size, patch_size, channels)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, side * patch_size)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Return fixed 2-D positions, shape (side * side, dim): half of the width tells the row, half the column.

    Each half holds sin and cos of ``coordinate / 10000^(2i / (dim / 2))``.

    Raises:
        ConfigError: `dim` is no multiple of 4.

    Source: [MAE].
    """
    if dim % 4:
        raise ConfigError(f"width {dim} is not a multiple of 4, which 2-D sin-cos positions need")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None, :].expand(side, side, -1)
    columns = axis[None, :, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, dim).float()
