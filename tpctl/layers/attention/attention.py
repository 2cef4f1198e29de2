"""The attention layer: fused QKV projection, then what the backend does with its heads, and the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpctl.arch import block
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, AttentionSpec, LayerKV
from tpctl.layers.attention.heads import HeadPreparation
from tpctl.layers.linear import QKVParallelLinear, RowParallelLinear
from tpctl.layers.module import Layer
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable
from tpctl.layers.stream import Rows


def attention_spec(attention: block.Attention, rank: int, tp_size: int) -> AttentionSpec:
    """What ``rank`` computes of a layer."""
    share = attention.shares(tp_size)[rank]
    return AttentionSpec(
        num_heads=len(share.query),
        num_kv_heads=len(share.kv),
        head_dim=attention.head_dim,
        scale=attention.scale,
        window=attention.window,
        softcap=attention.softcap,
    )


class Attention(Layer):
    """One rank's heads of one attention layer.

    Between the column-parallel ``qkv_proj`` and the row-parallel ``o_proj`` every rank works on its own heads alone.
    ``o_proj`` is left to the residual stream that its sum is added to.
    """

    def __init__(
        self,
        made_of: block.Attention,
        hold: Hold,
        backend: AttentionBackend[Any],
        rotary: RotaryTable,
        group: TPGroup,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.qkv_proj = QKVParallelLinear(hold(made_of.qkv), dtype)
        self.o_proj = RowParallelLinear(hold(made_of.out), group, dtype)
        self.q_norm = None if made_of.q_norm is None else RMSNorm.of(made_of.q_norm, dtype)
        self.k_norm = None if made_of.k_norm is None else RMSNorm.of(made_of.k_norm, dtype)
        self.prepare = HeadPreparation(rotary, self.q_norm, self.k_norm)

    def forward(self, rows: Rows, kv: LayerKV, plan: AttentionPlan) -> Tensor:
        """Normed [T, H] -> [T, N * D], what ``o_proj`` takes."""
        return self.backend.run(self.qkv_proj.runs(*rows), self.prepare, kv, plan)
