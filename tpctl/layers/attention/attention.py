"""The attention layer: fused QKV projection, then what the backend does with its heads, and the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpctl.arch import block, linear
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, AttentionSpec, LayerKV
from tpctl.layers.attention.heads import HeadPreparation, RanksSums
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
        sinks=attention.sinks is not None,
        shared=attention.shared,
    )


class Attention(Layer):
    """One rank's heads of one attention layer.

    Between the column-parallel ``qkv_proj`` and the row-parallel ``o_proj`` every rank works on its own heads alone.
    ``o_proj`` is left to the residual stream that its sum is added to. A layer that reads another's keys and values has
    queries alone, and is given that layer's cache.
    """

    def __init__(
        self,
        made_of: block.Attention,
        hold: Hold,
        backend: AttentionBackend[Any],
        rotary: RotaryTable | None,
        group: TPGroup,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        read = QKVParallelLinear(hold(made_of.qkv), dtype)
        self.add_module(made_of.qkv.name.rpartition(".")[2], read)
        self._read = (read,)  # under its own name alone
        self.o_proj = RowParallelLinear(hold(made_of.out), group, dtype)
        spec, over_all = attention_spec(made_of, group.rank, group.size), _sums(made_of, group)
        heads = (spec.num_heads, spec.num_kv_heads) if over_all is not None else (1, 1)
        self.q_norm = _norm(made_of.q_norm, heads[0] * spec.head_dim, dtype)
        self.k_norm = _norm(made_of.k_norm, heads[1] * spec.head_dim, dtype)
        self.prepare = HeadPreparation(
            rotary, self.q_norm, self.k_norm, over_all, made_of.value_eps, made_of.held, made_of.gate
        )
        self.sinks: nn.Parameter | None = None
        if spec.sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_heads, dtype=dtype), requires_grad=False)

    def forward(self, rows: Rows, kv: LayerKV, plan: AttentionPlan) -> Tensor:
        """Normed [T, H] -> [T, N * D], what ``o_proj`` takes."""
        qkv = self._read[0].runs(*rows)
        if self.prepare.held == "q":
            return self.backend.run_again(qkv, self.prepare, kv, plan)
        return self.backend.run(qkv, self.prepare, kv, plan, self.sinks)


def _norm(made_of: linear.Norm | None, size: int, dtype: torch.dtype | None) -> RMSNorm | None:
    """This rank's ``size`` weights of a norm."""
    return None if made_of is None else RMSNorm.of(made_of, dtype, size)


def _sums(made_of: block.Attention, group: TPGroup) -> RanksSums | None:
    """What the ranks tell each other where norms are over all heads at once."""
    q_norm, k_norm = made_of.q_norm, made_of.k_norm
    if q_norm is None or k_norm is None or q_norm.cut is None:
        return None
    shares = made_of.shares(group.size)
    first = all(share.kv != shares[group.rank].kv for share in shares[: group.rank])
    return RanksSums(group, q_norm.size, k_norm.size, first)
