"""MemMC-MAE: a masked autoencoder with a memory-augmented encoder and a multi-level cross-attentional decoder.

Shape legend: B images, C channels, H height, W width, G masks of one image, L patches, K kept (visible)
patches, P values of a patch.

Source: Tian et al., "Unsupervised Anomaly Detection in Medical Images with a Memory-augmented Multi-level
Cross-attentional Masked Autoencoder", MLMI 2023, arXiv:2203.11725 [abstract]; He et al., "Masked Autoencoders Are
Scalable Vision Learners", CVPR 2022 [MAE]; Cornia et al., "Meshed-Memory Transformer for Image Captioning",
CVPR 2020 [M2]. What none of them fixes is marked [choice].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memmc.config import ModelConfig
from memmc.errors import ConfigError
from memmc.model.decoder import Decoder
from memmc.model.encoder import Encoder
from memmc.model.masking import gather_tokens, mask_from_ids_keep, num_kept, random_ids_keep
from memmc.model.patches import grid_side, patchify, unpatchify


class MAEOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: mean squared error over removed patches, a scalar.
        pred_BLP: predicted patches in the unit of the images; untrained where visible, so never score them there.
        mask_BL: 1 = removed, 0 = kept.
        ids_keep_BK: the visible patches.
    """

    loss: Tensor
    pred_BLP: Tensor
    mask_BL: Tensor
    ids_keep_BK: Tensor


class MemMCMAE(nn.Module):
    """Predicts removed patches of standardised images from the visible ones.

    Args:
        config: sizes and switches.
        image_size: side of the square image, px; a multiple of `config.patch_size`.
        channels: native channels of the image.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(self, config: ModelConfig, image_size: int, channels: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"{channels} image channels; at least 1 is needed")
        side = grid_side(image_size, config.patch_size)
        self.config, self.image_size, self.channels = config, image_size, channels
        self.patch_size = config.patch_size
        self.num_patches = side * side
        self.num_keep = num_kept(self.num_patches, config.mask_ratio)
        patch_values = config.patch_size**2 * channels
        self.encoder = Encoder(config, patch_values, side)
        self.decoder = Decoder(config, patch_values, side)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier-uniform matrices, zero biases, tokens with standard deviation 0.02 [MAE]."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - None without a bias
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.class_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """Return patches_BLP."""
        return patchify(images_BCHW, self.patch_size)

    def unpatchify(self, patches_BLP: Tensor) -> Tensor:
        """Return images_BCHW."""
        return unpatchify(patches_BLP, self.patch_size, self.channels)

    def encode(self, patches_BLP: Tensor, ids_keep_BK: Tensor) -> list[Tensor]:
        """Return the levels X_1 .. X_S of the visible patches, each (B, K + 1, D), class token first."""
        return self.encoder(gather_tokens(patches_BLP, ids_keep_BK), ids_keep_BK)

    def decode(self, levels: list[Tensor], ids_keep_BK: Tensor) -> Tensor:
        """Return what the decoder says of each patch (B, L, P): pixels, or those of a standardised patch."""
        return self.decoder(levels, ids_keep_BK)

    def forward(
        self, images_BCHW: Tensor, ids_keep_BK: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MAEOutput:
        """Mask, encode, decode, compare.

        Args:
            images_BCHW: standardised images.
            ids_keep_BK: visible patches per image, any number of them; drawn at the mask ratio when None.
            generator: source of the draw, on the images' device.
        """
        self._check(images_BCHW)
        patches_BLP = self.patchify(images_BCHW)
        if ids_keep_BK is None:
            ids_keep_BK = random_ids_keep(
                len(patches_BLP), self.num_patches, self.num_keep, generator, patches_BLP.device
            )
        decoded_BLP = self.decode(self.encode(patches_BLP, ids_keep_BK), ids_keep_BK)
        mask_BL = mask_from_ids_keep(ids_keep_BK, self.num_patches)
        loss = self.loss(patches_BLP, decoded_BLP, mask_BL)
        return MAEOutput(loss, self._in_pixels(decoded_BLP, patches_BLP), mask_BL, ids_keep_BK)

    def loss(self, patches_BLP: Tensor, decoded_BLP: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the mean squared error over removed patches of what `decode` returns.

        Targets are the pixels themselves; with `norm_pix_loss` each patch is standardised first [MAE]. Off by
        default [recalled]: the anomaly score needs real intensities.
        """
        if self.config.norm_pix_loss:
            mean_BL1, std_BL1 = _patch_statistics(patches_BLP)
            patches_BLP = (patches_BLP - mean_BL1) / std_BL1
        decoded_BLP = decoded_BLP.to(torch.promote_types(decoded_BLP.dtype, torch.float32))
        error_BL = (decoded_BLP - patches_BLP).square().mean(dim=-1)
        return (error_BL * mask_BL).sum() / mask_BL.sum()

    def _in_pixels(self, decoded: Tensor, patches: Tensor) -> Tensor:
        """Give standardised patches the mean and deviation of the patch they stand for, as [MAE] shows them.

        What is scored then is the pattern within a patch; how bright it is and how strong its contrast is taken from
        the image.
        """
        if not self.config.norm_pix_loss:
            return decoded
        mean, std = _patch_statistics(patches)
        return decoded * std + mean

    def predict(self, images_BCHW: Tensor, ids_keep_BGK: Tensor) -> Tensor:
        """Return pred_BGLP, in the unit of the images, for G masks of every image, all in one batch.

        The images are not repeated; only their visible patches are.
        """
        self._check(images_BCHW)
        batch, masks, kept = ids_keep_BGK.shape
        patches_BLP = self.patchify(images_BCHW)
        visible = gather_tokens(patches_BLP, ids_keep_BGK.reshape(batch, masks * kept))
        ids_keep_BK = ids_keep_BGK.reshape(batch * masks, kept)
        levels = self.encoder(visible.reshape(batch * masks, kept, -1), ids_keep_BK)
        return self._in_pixels(self.decode(levels, ids_keep_BK).unflatten(0, (batch, masks)), patches_BLP[:, None])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimiser groups: matrices with decay; memory, tokens, biases and norms without [M2, MAE]."""
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            leaf = name.rpartition(".")[2]
            is_matrix = leaf.endswith("weight") and "norm" not in name
            (decayed if is_matrix else free).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

    def _check(self, images_BCHW: Tensor) -> None:
        expected = (self.channels, self.image_size, self.image_size)
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
            raise ConfigError(f"images of shape {tuple(images_BCHW.shape)}; this model takes (batch, *{expected})")


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the values of each patch, (..., 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
