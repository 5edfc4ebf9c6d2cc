"""Self-attention with learnable memory slots, and the pre-norm block around it.

Shape legend: B images, N tokens, D width, h heads, d width of a head (D / h), M memory slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from memmc.errors import ConfigError


def head_dim(dim: int, heads: int) -> int:
    """Return D / h.

    Raises:
        ConfigError: the width is no multiple of the number of heads.
    """
    if dim % heads:
        raise ConfigError(f"width {dim} is not a multiple of {heads} heads")
    return dim // heads


class MemoryAttention(nn.Module):
    """Multi-head self-attention whose keys and values are extended by M learnable slots.

    ``Attn(X) = softmax(Q [K; M_K]^T / sqrt(d)) [V; M_V]``

    The slots are joined after the projections, so they depend on no input and
    hold what is common to the training images. With M = 0 this is plain
    self-attention. As in [M2] a parameter is stored small and scaled when it is
    used: M_K = sqrt(d) memory_key with memory_key ~ N(0, 1/d^2), and
    M_V = sqrt(M) memory_value with memory_value ~ N(0, 1/M^2), so that the
    slots' effective standard deviations are 1/sqrt(d) and 1/sqrt(M) and an
    Adam step moves them as far as it moves a projected token.

    Source: [abstract] memory-augmented self-attention; [M2] form and initialisation.
    """

    def __init__(self, dim: int, heads: int, memory_slots: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim(dim, heads)
        self.memory_slots = memory_slots
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.memory_key: nn.Parameter | None = None
        self.memory_value: nn.Parameter | None = None
        if memory_slots:
            self.memory_key = nn.Parameter(torch.randn(heads, memory_slots, self.head_dim) / self.head_dim)
            self.memory_value = nn.Parameter(torch.randn(heads, memory_slots, self.head_dim) / memory_slots)

    def project(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, h, N, d), keys and values (B, h, N + M, d); the slots come last."""
        batch, length, _ = tokens_BND.shape
        qkv = self.query_key_value(tokens_BND).view(batch, length, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.memory_key is not None and self.memory_value is not None:
            memory_key = (self.memory_key * self.head_dim**0.5).to(key.dtype)
            memory_value = (self.memory_value * self.memory_slots**0.5).to(value.dtype)
            key = torch.cat([key, memory_key.expand(batch, -1, -1, -1)], dim=2)
            value = torch.cat([value, memory_value.expand(batch, -1, -1, -1)], dim=2)
        return query, key, value

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return the attended tokens, shape (B, N, D)."""
        query, key, value = self.project(tokens_BND)
        attended = scaled_dot_product_attention(query, key, value)
        return self.projection(attended.transpose(1, 2).flatten(2))


def run_block(block: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """Return the block's output; with `recompute` nothing but its inputs is kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)  # pyright: ignore[reportReturnType]
    return block(*inputs)


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = round(dim * ratio)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        return self.contract(gelu(self.expand(tokens_BND)))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: ``X <- X + Attn(LN(X))``, ``X <- X + MLP(LN(X))``.

    Source: [MAE] the block; [abstract] its attention.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, memory_slots: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = MemoryAttention(dim, heads, memory_slots)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        tokens_BND = tokens_BND + self.attention(self.norm_attention(tokens_BND))
        return tokens_BND + self.mlp(self.norm_mlp(tokens_BND))
