"""Stored pixels to model input, with one random affine per image.

Shape legend: B images, H height, W width, C channels.

Source: [choice] random resized crop, small rotation and shift; no flip, since the heart is on one side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

MAX_ASPECT = 1.1


def standardise(
    pixels_BHWC: NDArray[np.unsignedinteger] | Tensor,
    *,
    bits: int,
    pixel_mean: float,
    pixel_std: float,
    device: torch.device,
) -> Tensor:
    """Return images_BCHW in float32: ``(pixel / (2^bits - 1) - mean) / std``.

    Args:
        pixels_BHWC: unsigned integers as stored.
        bits: of a stored pixel.
        pixel_mean: of the training images in [0, 1].
        pixel_std: of the training images, above 0.
        device: where the images go; the integers travel, not the floats.
    """
    if isinstance(pixels_BHWC, Tensor):
        pixels = pixels_BHWC
    else:
        pixels = torch.from_numpy(pixels_BHWC if pixels_BHWC.flags.writeable else pixels_BHWC.copy())
    images_BHWC = pixels.to(device, non_blocking=True).to(torch.float32)
    scale = 1.0 / ((2**bits - 1) * pixel_std)
    return images_BHWC.mul_(scale).sub_(pixel_mean / pixel_std).permute(0, 3, 1, 2).contiguous()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; a GPU is not waited for, as it would be from memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def random_affines(batch: int, crop_scale: float, rotate_degrees: float, generator: torch.Generator) -> Tensor:
    """Return affines of shape (B, 2, 3) that map output to input positions, both in [-1, 1].

    The crop covers a share of the area uniform in [crop_scale, 1], its sides' ratio is log-uniform within
    `MAX_ASPECT` (1 where nothing is cropped), its place uniform within the image; the turn is uniform within the bound.

    Args:
        batch: number of images.
        crop_scale: smallest share of the area, in (0, 1].
        rotate_degrees: bound of the rotation, degrees.
        generator: on the CPU.
    """
    draw_5B = torch.rand(5, batch, generator=generator)
    area = crop_scale + (1.0 - crop_scale) * draw_5B[0]
    widest = math.log(MAX_ASPECT) / 2.0 if crop_scale < 1.0 else 0.0
    aspect = torch.exp((2.0 * draw_5B[1] - 1.0) * widest)
    width, height = (area.sqrt() * aspect).clamp(max=1.0), (area.sqrt() / aspect).clamp(max=1.0)
    angle = (2.0 * draw_5B[2] - 1.0) * math.radians(rotate_degrees)
    cosine, sine = angle.cos(), angle.sin()
    shift_x, shift_y = (2.0 * draw_5B[3] - 1.0) * (1.0 - width), (2.0 * draw_5B[4] - 1.0) * (1.0 - height)
    rows = [width * cosine, -height * sine, shift_x, width * sine, height * cosine, shift_y]
    return torch.stack(rows, dim=1).view(batch, 2, 3)


def augment(images_BCHW: Tensor, crop_scale: float, rotate_degrees: float, generator: torch.Generator) -> Tensor:
    """Return randomly cropped, turned and shifted images of the same shape; bilinear, borders repeated."""
    affines = random_affines(len(images_BCHW), crop_scale, rotate_degrees, generator)
    grid = affine_grid(sent(affines, images_BCHW.device), list(images_BCHW.shape), align_corners=False)
    return grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
