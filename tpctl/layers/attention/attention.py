"""The attention layer: fused QKV projection, optional QK-norm, RoPE, the paged cache, output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.distributed import TPGroup
from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.linear import QKVParallelLinear, RowParallelLinear
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable, apply_rotary


class Attention(nn.Module):
    """One rank's heads of one attention layer.

    Between the column-parallel ``qkv_proj`` and the row-parallel ``o_proj`` every rank works on its own heads alone.
    """

    def __init__(
        self,
        hidden_size: int,
        backend: AttentionBackend,
        rotary: RotaryTable,
        group: TPGroup,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = backend.heads
        self.heads = heads
        self.backend = backend
        self.rotary = rotary
        self.window = window
        self.qkv_proj = QKVParallelLinear(
            hidden_size, heads.num_heads, heads.num_kv_heads, heads.head_dim, qkv_bias, dtype
        )
        self.o_proj = RowParallelLinear(heads.num_heads * heads.head_dim, hidden_size, group, o_bias, dtype)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(heads.head_dim, qk_norm_eps, group, dtype)
            self.k_norm = RMSNorm(heads.head_dim, qk_norm_eps, group, dtype)

    def forward(self, x: Tensor, kv: LayerKV, batch: ForwardBatch, rows: Tensor | None = None) -> Tensor:
        """[T, H] -> this rank's partial sum: [T, H], or [R, H] of the wanted ``rows`` of T."""
        q_TND, k_TKD, v_TKD = self._project(x, batch)
        self.backend.store(k_TKD, v_TKD, kv, batch)
        attended = self.backend.attend(q_TND, k_TKD, v_TKD, kv, self.window, batch)
        return self.o_proj.partial(attended if rows is None else attended[rows])

    def _project(self, x: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, N, D] and keys [T, K, D], normed and rotated, and values [T, K, D]."""
        heads = self.heads
        qkv = self.qkv_proj(x).view(x.shape[0], -1, heads.head_dim)
        rotated_heads = heads.num_heads + heads.num_kv_heads
        qk, v = qkv[:, :rotated_heads], qkv[:, rotated_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, : heads.num_heads]), self.k_norm(qk[:, heads.num_heads :])], dim=1)
        cos, sin = self._angles(batch, qk.dtype)
        qk = apply_rotary(qk, cos, sin)
        return qk[:, : heads.num_heads], qk[:, heads.num_heads :], v

    def _angles(self, batch: ForwardBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rotary factors of the step's positions: looked up by the first layer, used by all."""
        found: tuple[Tensor, Tensor] | None = batch.scratch.get("rotary")
        if found is None:
            found = batch.scratch["rotary"] = self.rotary.angles(batch.rope_positions, dtype)
        return found
