"""The decoder: mask tokens ask every level of the encoder what stands behind them.

Shape legend: B images, S levels, N tokens of a level (K + 1), L tokens of the decoder
(patches + class token), K visible patches, D encoder width, E decoder width, h heads, d width of a
head (E / h), G gates of a level (E, h or 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from memmc.config import ModelConfig
from memmc.model.attention import MLP, MemoryAttention, head_dim, run_block
from memmc.model.gated_attention import gated_level_attention, level_contexts
from memmc.model.levels import level_indices
from memmc.model.masking import mask_from_ids_keep
from memmc.model.patches import sincos_positions


class LevelAdapters(nn.Module):
    """``X~_l = Linear_l(LayerNorm_l(X_l))``, D -> E, all levels in one batched matmul.

    The norm's scale and shift are folded into the matrix, which is smaller than the tokens.

    Source: [choice] one adapter per level, since the outputs of pre-norm blocks are not normalised.
    """

    def __init__(self, levels: int, encoder_dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.encoder_dim = encoder_dim
        self.norm_weight = nn.Parameter(torch.ones(levels, 1, encoder_dim))
        self.norm_bias = nn.Parameter(torch.zeros(levels, 1, encoder_dim))
        bound = math.sqrt(6.0 / (encoder_dim + decoder_dim))
        self.weight = nn.Parameter(torch.empty(levels, encoder_dim, decoder_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(levels, 1, decoder_dim))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Return the adapted levels, shape (S, B, N, E), from S tensors of shape (B, N, D)."""
        batch, length, _ = levels[0].shape
        normed = layer_norm(torch.stack(levels), (self.encoder_dim,)).flatten(1, 2)
        weight = self.norm_weight.view(-1, self.encoder_dim, 1) * self.weight
        adapted = torch.baddbmm(torch.baddbmm(self.bias, self.norm_bias, self.weight), normed, weight)
        return adapted.view(len(levels), batch, length, -1)


class LevelCrossAttention(nn.Module):
    """One cross-attention shared by all levels, one learned gate per level.

    Head j attends to level l alone, ``c_lj = softmax(Q_j K_lj^T / sqrt(d)) V_lj``, and
    ``C_l = O [c_l1; ..; c_lh]``, O without a bias. The result is ``(1/sqrt(S)) sum_l a_l * C_l`` with

    - ``channel``: ``a_l = sigmoid(W_l [Q; C_l] + b_l)``, W_l: 2E -> E, the [M2] form;
    - ``head``: ``a_lj = sigmoid(w_lj Q + u_lj c_lj + b_lj)``, one number per head [choice];
    - ``scalar``: ``a_l = sigmoid(w_l Q + sum_j u_lj c_lj + b_l)``, one number per level [choice].

    The last two read C_l through its parts c_lj, a head gate that of its own head alone. As O is linear and has
    no bias, ``sum_l sum_j a_lj O_j c_lj = O [sum_l a_l1 c_l1; ..; sum_l a_lh c_lh]``: the projection is
    applied once, behind the sum over levels, where channel gates cost 3 S E^2 L. And ``sum_l a_lj P_lj V_lj`` is one
    matmul over the tokens of all levels with the attention weights P scaled by their gates, so on a CPU no c_lj is ever
    written out: ``u_lj c_lj = P_lj (V_lj u_lj)``. The cost of S levels is that of one longer context. On a GPU, and
    where it is traced, the attention to each level is torch's fused one, which writes every c_lj.

    A single level has no gate: plain cross-attention [choice].

    Source: [abstract] multi-level cross-attention; [M2] the gates, 1/sqrt(S) and Q as the gate's first input.
    """

    def __init__(self, dim: int, heads: int, levels: int, gate: str) -> None:
        super().__init__()
        self.dim, self.heads, self.levels, self.gate = dim, heads, levels, gate
        self.head_dim = head_dim(dim, heads)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim, bias=False)
        if levels > 1:
            num_gates = {"channel": dim, "head": heads, "scalar": 1}[gate]
            self.gate_query = nn.Linear(dim, levels * num_gates)
            shape = (levels, dim, dim) if gate == "channel" else (levels, heads, self.head_dim)
            bound = math.sqrt(6.0 / (dim + num_gates))
            self.gate_context_weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def forward(self, query_BLE: Tensor, levels_BSNE: Tensor) -> Tensor:
        """Return the update of the queries, shape (B, L, E).

        One projection of the queries, one of all levels' keys and values, one attention to all levels.
        """
        batch, levels, slots, _ = levels_BSNE.shape
        length = query_BLE.shape[1]
        query_BLhd = self.query(query_BLE).view(batch, length, self.heads, self.head_dim)
        kv_BT2hd = self.key_value(levels_BSNE).view(batch, levels * slots, 2, self.heads, self.head_dim)
        if self.levels > 1 and self.gate == "channel":
            return self._sum_by_channel(query_BLE, query_BLhd, kv_BT2hd)
        if self.levels == 1:
            key_BhTd, value_BhTd = kv_BT2hd.permute(2, 0, 3, 1, 4).unbind(0)
            attended = scaled_dot_product_attention(query_BLhd.transpose(1, 2), key_BhTd, value_BhTd).transpose(1, 2)
        else:
            gate_BLSG = self.gate_query(query_BLE).view(batch, length, levels, -1)
            attended = gated_level_attention(query_BLhd, kv_BT2hd, gate_BLSG, self.gate_context_weight)
        return self.projection(attended.flatten(2)) * self.levels**-0.5

    def _sum_by_channel(self, query_BLE: Tensor, query_BLhd: Tensor, kv_BT2hd: Tensor) -> Tensor:
        """Return (1/sqrt(S)) sum_l a_l * C_l with one gate per channel."""
        batch, length, _, _ = query_BLhd.shape
        contexts = level_contexts(query_BLhd, kv_BT2hd, self.levels).transpose(0, 1)
        contexts = contexts.reshape(self.levels, -1, self.dim) @ self.projection.weight.t()
        query_half = self.gate_query(query_BLE).view(batch * length, self.levels, self.dim).transpose(0, 1)
        gates = torch.baddbmm(query_half, contexts, self.gate_context_weight.transpose(1, 2)).sigmoid()
        return (gates * contexts).sum(0).view(batch, length, self.dim) * self.levels**-0.5


class DecoderBlock(nn.Module):
    """Self-attention, multi-level cross-attention, MLP, each a pre-norm residual.

    Source: [abstract, M2]; [choice] pre-norm. Without cross-attention a block of [MAE]; without self-attention [choice]
    patches do not hear of each other.
    """

    def __init__(self, config: ModelConfig, levels: int) -> None:
        super().__init__()
        dim, heads = config.decoder_dim, config.decoder_heads
        self.attention: MemoryAttention | None = None
        if config.decoder_self_attention:
            self.norm_attention = nn.LayerNorm(dim)
            self.attention = MemoryAttention(dim, heads)
        self.cross_attention: LevelCrossAttention | None = None
        if config.cross_attention:
            self.norm_cross_attention = nn.LayerNorm(dim)
            self.cross_attention = LevelCrossAttention(dim, heads, levels, config.gate)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, config.mlp_ratio)

    def forward(self, tokens_BLE: Tensor, levels_BSNE: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        if self.attention is not None:
            tokens_BLE = tokens_BLE + self.attention(self.norm_attention(tokens_BLE))
        if self.cross_attention is not None:
            query_BLE = self.norm_cross_attention(tokens_BLE)
            tokens_BLE = tokens_BLE + self.cross_attention(query_BLE, levels_BSNE)
        return tokens_BLE + self.mlp(self.norm_mlp(tokens_BLE))


class Decoder(nn.Module):
    """Encoder levels in, the pixels of all patches out.

    Source: [MAE] mask token, positions, LayerNorm and Linear at the end; [abstract] the levels.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, patch_values: int, side: int) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.level_indices, self.self_attention = level_indices(config), config.decoder_self_attention
        self.recompute = config.recompute
        levels = len(self.level_indices)
        self.adapters = LevelAdapters(levels, config.encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", sincos_positions(dim, side), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(config, levels) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_values)

    def place(self, last_BNE: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Return the input (B, 1 + L, E): the last level where visible, mask tokens elsewhere, positions added.

        In the precision of the parameters, as the encoder's tokens: blocks add to it, whatever autocast computes in.
        """
        batch, _, dim = last_BNE.shape
        last_BNE = last_BNE.to(torch.promote_types(last_BNE.dtype, self.mask_token.dtype))
        hidden_BLE = (self.mask_token + self.positions).to(last_BNE.dtype).expand(batch, -1, -1)
        visible_BKE = last_BNE[:, 1:] + self.positions[ids_keep_BK].to(last_BNE.dtype)
        tokens_BLE = hidden_BLE.scatter(1, ids_keep_BK[:, :, None].expand(-1, -1, dim), visible_BKE)
        return torch.cat([last_BNE[:, :1], tokens_BLE], dim=1)

    def forward(self, levels: list[Tensor], ids_keep_BK: Tensor) -> Tensor:
        """Return pred_BLP without the class token; trained at removed patches only.

        Without self-attention no token hears another one of the decoder: then only removed patches are decoded, and
        visible ones are 0.
        """
        adapted_SBNE = self.adapters([levels[index] for index in self.level_indices])
        levels_BSNE = adapted_SBNE.transpose(0, 1).contiguous()
        if self.self_attention:
            tokens_BLE = self.place(adapted_SBNE[-1], ids_keep_BK)
            return self._blocks(tokens_BLE, levels_BSNE)[:, 1:]
        mask_BL = mask_from_ids_keep(ids_keep_BK, len(self.positions))
        ids_removed_BR = mask_BL.topk(mask_BL.shape[1] - ids_keep_BK.shape[1]).indices
        pred_BRP = self._blocks(self.mask_token + self.positions[ids_removed_BR], levels_BSNE)
        pred_BLP = pred_BRP.new_zeros(*mask_BL.shape, pred_BRP.shape[2])
        return pred_BLP.scatter(1, ids_removed_BR[:, :, None].expand_as(pred_BRP), pred_BRP)

    def _blocks(self, tokens_BLE: Tensor, levels_BSNE: Tensor) -> Tensor:
        for block in self.blocks:
            tokens_BLE = run_block(block, tokens_BLE, levels_BSNE, recompute=self.recompute)
        return self.head(self.norm(tokens_BLE))
