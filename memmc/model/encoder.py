"""The encoder: visible patches in, the tokens of every block out.

Shape legend: B images, K visible patches, P values of a patch, D width, N = K + 1 tokens, L patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memmc.config import ModelConfig
from memmc.model.attention import EncoderBlock, run_block
from memmc.model.bottleneck import MemoryBottleneck
from memmc.model.patches import sincos_positions


class Encoder(nn.Module):
    """Memory-augmented ViT over the visible patches.

    Patches are embedded by one Linear on their flattened values (equal to a
    convolution with stride p, without computing it for removed patches), the
    position is added, a class token is put first.

    Source: [MAE] embedding, class token, positions; [abstract, M2] the blocks; [MemAE] the bottleneck, off by default.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, patch_values: int, side: int) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.embedding = nn.Linear(patch_values, dim)
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", sincos_positions(dim, side), persistent=False)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.encoder_heads, config.mlp_ratio, config.memory_slots)
            for _ in range(config.encoder_depth)
        )
        self.recompute = config.recompute
        self.bottleneck: MemoryBottleneck | None = None
        if config.bottleneck_slots:
            self.bottleneck = MemoryBottleneck(dim, config.bottleneck_slots)

    def embed(self, patches_BKP: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Return tokens_BND, class token first."""
        tokens_BKD = self.embedding(patches_BKP) + self.positions[ids_keep_BK]
        class_B1D = self.class_token.to(tokens_BKD.dtype).expand(tokens_BKD.shape[0], 1, -1)
        return torch.cat([class_B1D, tokens_BKD], dim=1)

    def forward(self, patches_BKP: Tensor, ids_keep_BK: Tensor) -> list[Tensor]:
        """Return X_1 .. X_S, the outputs of all blocks, each of shape (B, K + 1, D); X_S behind the bottleneck."""
        tokens_BND = self.embed(patches_BKP, ids_keep_BK)
        levels: list[Tensor] = []
        for block in self.blocks:
            tokens_BND = run_block(block, tokens_BND, recompute=self.recompute)
            levels.append(tokens_BND)
        if self.bottleneck is not None:
            levels[-1] = self.bottleneck(levels[-1])
        return levels
