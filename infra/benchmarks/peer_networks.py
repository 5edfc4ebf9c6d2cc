"""Networks that detect by reconstruction, written from their papers; for the comparison of `peers.py`.

All take and return images in [0, 1] of shape (B, 1, H, W), H = W a power of two from 64 on. Widths and the bottleneck
are ours: what the papers state for images of other sizes does not carry over. Each has a loss over a batch of training
images and a reconstruction.

Shape legend: B images, H and W pixels, N tokens of the bottleneck, D its width, M memory slots.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from memmc.model.bottleneck import MemoryBottleneck

WIDTHS = (32, 64, 128, 256)
COARSEST = 4
"""Side of the feature map that is encoded, px."""


class Peer(nn.Module):
    """What `peers.py` trains and scores."""

    own_score: str | None = None
    """Name of the score the paper defines, where no scorer of the project is it."""

    def loss(self, images_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, images_BCHW: Tensor) -> Tensor:
        """Return the paper's own score of each image, (B,)."""
        raise NotImplementedError


def encoder(side: int) -> nn.Sequential:
    """Return convolutions of stride 2 down to a map of `COARSEST` px."""
    layers: list[nn.Module] = []
    below = 1
    for stage in range(round(math.log2(side // COARSEST))):
        width = WIDTHS[min(stage, len(WIDTHS) - 1)]
        layers += [nn.Conv2d(below, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        below = width
    return nn.Sequential(*layers)


def decoder(side: int, channels: int) -> nn.Sequential:
    """Return the encoder's mirror, with so many output channels and no activation at the end."""
    stages = round(math.log2(side // COARSEST))
    widths = [WIDTHS[min(stage, len(WIDTHS) - 1)] for stage in range(stages)]
    layers: list[nn.Module] = []
    for stage in reversed(range(1, stages)):
        layers += [
            nn.ConvTranspose2d(widths[stage], widths[stage - 1], 4, 2, 1, bias=False),
            nn.BatchNorm2d(widths[stage - 1]),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[0], channels, 4, 2, 1))


class Dense(nn.Module):
    """A map to a vector of `latent` numbers and back: what a reconstruction may know of its image."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        size = width * COARSEST**2
        self.narrow, self.widen, self.width = nn.Linear(size, latent), nn.Linear(latent, size), width

    def forward(self, map_BDhw: Tensor) -> Tensor:
        return leaky_relu(self.widen(self.narrow(map_BDhw.flatten(1))), 0.2).view_as(map_BDhw)


class ConvAE(Peer):
    """A convolutional autoencoder under the squared error."""

    def __init__(self, side: int, latent: int = 64, channels: int = 1) -> None:
        super().__init__()
        self.encode, self.decode = encoder(side), decoder(side, channels)
        self.between: nn.Module = Dense(WIDTHS[-1], latent)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.decode(self.between(self.encode(images_BCHW)))

    def loss(self, images_BCHW: Tensor) -> Tensor:
        return (self(images_BCHW) - images_BCHW).square().mean()

    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        return self(images_BCHW)


class MemAE(ConvAE):
    """The latent is read back from a memory: every place of the map is a query.

    Source: Gong et al., "Memorizing Normality to Detect Anomaly", ICCV 2019: cosine addressing, hard shrinkage, entropy
    of the addresses with weight 2e-4. [choice] as many slots as the paper gives to images of faces and digits, or so.
    """

    SLOTS, ENTROPY = 500, 2e-4

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.between = nn.Identity()
        self.memory = MemoryBottleneck(WIDTHS[-1], self.SLOTS)

    def _read(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        map_BDhw = self.encode(images_BCHW)
        weights_BNM = self.memory.address(map_BDhw.flatten(2).transpose(1, 2))
        read_BND = weights_BNM @ self.memory.memory_slots
        return self.decode(read_BND.transpose(1, 2).view_as(map_BDhw)), weights_BNM

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._read(images_BCHW)[0]

    def loss(self, images_BCHW: Tensor) -> Tensor:
        expected_BCHW, weights_BNM = self._read(images_BCHW)
        entropy = -(weights_BNM * (weights_BNM + 1e-12).log()).sum(-1).mean()
        return (expected_BCHW - images_BCHW).square().mean() + self.ENTROPY * entropy


class UncertainAE(ConvAE):
    """The decoder gives a mean and a variance of every pixel; what it expects to miss counts less.

    Source: Mao et al., "Abnormality Detection in Chest X-ray Images Using Uncertainty Prediction Autoencoders",
    MICCAI 2020: ``(x - m)^2 / s^2 + log s^2`` is minimised, the score is the mean of the first term.
    """

    own_score = "error over variance"

    def __init__(self, side: int) -> None:
        super().__init__(side, channels=2)

    def _parts(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        mean_B1HW, log_variance_B1HW = self(images_BCHW).chunk(2, dim=1)
        return mean_B1HW, log_variance_B1HW.clamp(-10.0, 4.0)

    def loss(self, images_BCHW: Tensor) -> Tensor:
        mean_B1HW, log_variance_B1HW = self._parts(images_BCHW)
        return ((mean_B1HW - images_BCHW).square() * (-log_variance_B1HW).exp() + log_variance_B1HW).mean()

    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        return self._parts(images_BCHW)[0]

    def score(self, images_BCHW: Tensor) -> Tensor:
        mean_B1HW, log_variance_B1HW = self._parts(images_BCHW)
        return ((mean_B1HW - images_BCHW).square() * (-log_variance_B1HW).exp()).mean((1, 2, 3))


class DenoisingAE(Peer):
    """A U-Net that takes coarse noise off its input, and takes an anomaly for noise.

    Source: Kascenas et al., "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI", MIDL 2022: normal
    noise of standard deviation 0.2 at an eighth of the resolution, enlarged bilinearly and rolled by a random shift;
    the squared error is minimised, the image is scored without noise. [choice] three halvings; images here have no
    background to leave free of noise.
    """

    SIGMA, COARSER = 0.2, 8

    def __init__(self, side: int, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.side = side
        self.down = nn.ModuleList(_convolved(a, b) for a, b in zip((1, *widths[:-1]), widths, strict=True))
        pairs = list(itertools.pairwise(widths))
        self.up = nn.ModuleList(_convolved(below + above, below) for below, above in reversed(pairs))
        self.halve, self.head = nn.MaxPool2d(2), nn.Conv2d(widths[0], 1, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        found: list[Tensor] = []
        map_BDhw = images_BCHW
        for level, block in enumerate(self.down):
            map_BDhw = block(self.halve(map_BDhw) if level else map_BDhw)
            found.append(map_BDhw)
        for beside, block in zip(reversed(found[:-1]), self.up, strict=True):
            larger = interpolate(map_BDhw, scale_factor=2, mode="bilinear", align_corners=False)
            map_BDhw = block(torch.cat([beside, larger], dim=1))
        return self.head(map_BDhw)

    def loss(self, images_BCHW: Tensor) -> Tensor:
        coarse = torch.randn(len(images_BCHW), 1, self.side // self.COARSER, self.side // self.COARSER)
        noise = interpolate(self.SIGMA * coarse, size=(self.side, self.side), mode="bilinear", align_corners=False)
        shift = [int(value) for value in torch.randint(self.side, (2,))]
        noisy_BCHW = images_BCHW + noise.roll(shift, (2, 3)).to(images_BCHW.device)
        return (self(noisy_BCHW) - images_BCHW).square().mean()

    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        return self(images_BCHW)


def _convolved(below: int, above: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (below, above):
        layers += [nn.Conv2d(channels, above, 3, padding=1, bias=False), nn.GroupNorm(8, above), nn.SiLU()]
    return nn.Sequential(*layers)


PEERS: dict[str, type[Peer]] = {
    "convolutional AE": ConvAE,
    "MemAE": MemAE,
    "AE with uncertainty": UncertainAE,
    "denoising AE": DenoisingAE,
}
