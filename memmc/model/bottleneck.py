"""The latent read back from a memory, and nothing else: what MemAE does between its encoder and its decoder.

Shape legend: B images, N tokens, D width, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class MemoryBottleneck(nn.Module):
    """``Z = W M``: every token is replaced by a sparse convex mixture of M learned slots.

    ``w_i = softmax_i(cos(x, m_i))``; weights up to 1/M become 0 (hard shrinkage), the rest is made to sum to 1 again.
    Without a residual, what no slot resembles cannot pass: set ``levels = "last"`` or the other levels go round it.

    Source: [MemAE] Gong et al., "Memorizing Normality to Detect Anomaly", ICCV 2019, its addressing and shrinkage
    threshold of 1/M. [choice] without its entropy loss.
    """

    def __init__(self, dim: int, slots: int) -> None:
        super().__init__()
        self.memory_slots = nn.Parameter(torch.randn(slots, dim))

    def address(self, tokens_BND: Tensor) -> Tensor:
        """Return the shrunk weights, shape (B, N, M), each row summing to 1."""
        similarity_BNM = normalize(tokens_BND, dim=-1) @ normalize(self.memory_slots, dim=-1).t()
        weights_BNM = similarity_BNM.softmax(-1, dtype=torch.promote_types(similarity_BNM.dtype, torch.float32))
        kept_BNM = weights_BNM.where(weights_BNM > 1.0 / len(self.memory_slots), 0.0)
        return kept_BNM / kept_BNM.sum(-1, keepdim=True).clamp_min(1e-12)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        return self.address(tokens_BND).to(tokens_BND.dtype) @ self.memory_slots.to(tokens_BND.dtype)
