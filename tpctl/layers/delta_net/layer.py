"""The layer: projections, convolution, the gated delta rule over each sequence's state, a gated norm and the output.

    x ─┬─ q k v ── conv · silu ─┬─ q, k of length 1 ─┐
       ├─ b, a ── beta, g ──────┼────────────────────┼─ delta rule ── norm · silu(z) ── out_proj ── partial sum
       └─ z ────────────────────┴────────────────────┴─────────────────────┘

A rank has key heads with value heads of theirs, and all that belongs to them, so nothing is exchanged in between.
Shapes as in ``rule``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.arch import delta_net
from tpctl.arch.held import Hold
from tpctl.arch.linear import Vector
from tpctl.distributed import TPGroup
from tpctl.layers.attention.base import AttentionPlan
from tpctl.layers.batch import ForwardBatch, SequenceState
from tpctl.layers.delta_net import conv, rule
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from tpctl.layers.module import Layer, attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import Rows

_MOST_GATHERED = 1 << 18
"""Bytes of one sequence's matrices above which each is changed where it is: of 1 MiB (16 heads of 128 x 128) that is
twice as fast as gathering 16 of them and writing them back, of 2 MiB six times; of 64 KiB it is three times slower."""


class Net(Protocol):
    """What computes a layer in place of plain torch."""

    def __call__(self, rows: Rows, state: LayerState, batch: ForwardBatch) -> Tensor:
        """As ``DeltaNet.forward``."""
        ...


class NetMaker(Protocol):
    """What gives a layer the ``Net`` of its device."""

    def delta_net(self, net: DeltaNet) -> Net | None:
        """``None``: plain torch is."""
        ...


class DeltaNet(Layer):
    """One rank's heads of one gated delta net. ``o_proj`` is left to the residual stream that its sum is added to."""

    def __init__(
        self, made_of: delta_net.DeltaNet, hold: Hold, group: TPGroup, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.sizes = made_of.sizes_of(group.rank, group.size)
        self.by_key_head = made_of.by_key_head
        self._where = made_of.out.name.rpartition(".")[0] + "."
        self.projections = []
        for one in made_of.projections:
            linear = MergedColumnParallelLinear(hold(one), dtype)
            attach(self, self._own(one.name), linear)
            self.projections.append(linear)
        channels, heads = self.sizes.channels, self.sizes.value_heads
        self._conv = self._vector(made_of.conv, (channels, *made_of.conv.tail), dtype)
        # Some checkpoints have these in float32, and so they stay, whatever the model runs in.
        self._decay = tuple(self._vector(one, (heads,), torch.float32) for one in made_of.decay)
        norm, out = RMSNorm.of(made_of.norm, dtype), RowParallelLinear(hold(made_of.out), group, dtype)
        attach(self, self._own(made_of.norm.name), norm)
        attach(self, self._own(made_of.out.name), out)
        self.norms, self._out = (norm,), (out,)  # modules under the names that a shard has alone
        self._fused: Net | None = None

    @property
    def o_proj(self) -> RowParallelLinear:
        """What makes this rank's partial sum of what ``forward`` gives."""
        return self._out[0]

    def use(self, device: NetMaker) -> None:
        """Once, after loading, and before the linears: compute as the device does best, if not as below."""
        self._fused = device.delta_net(self)

    def forward(self, rows: Rows, state: LayerState, plan: AttentionPlan) -> Tensor:
        """Normed [T, H] -> [T, N * E], what ``o_proj`` takes."""
        batch, sizes = plan.batch, self.sizes
        if self._fused is not None:
            return self._fused(rows, state, batch)
        assert batch.states is not None, "sequences of a recurrent model have states"
        qkv_TX, z_TNE, b_TN, a_TN = self._read(rows)
        g_TN, beta_TN = rule.gates(a_TN, b_TN, *self.decay)
        state.begin(batch.states)
        out_TNE = torch.empty(batch.num_tokens, sizes.value_heads, sizes.value_dim, device=qkv_TX.device)
        decodes = batch.num_decodes
        if decodes:
            some = slice(0, decodes)
            out_TNE[some] = self._decode(qkv_TX[some], g_TN[some], beta_TN[some], state, batch)
        start = decodes
        for own, count in zip(batch.states[decodes:], batch.query_lens[decodes:], strict=True):
            some = slice(start, start + count)
            out_TNE[some] = self._prefill(qkv_TX[some], g_TN[some], beta_TN[some], state, own)
            start += count
        normed: Tensor = self.norms[0](out_TNE.to(qkv_TX.dtype))
        return (normed.float() * F.silu(z_TNE.float())).to(qkv_TX.dtype).flatten(1)

    def _decode(self, qkv_SX: Tensor, g_SN: Tensor, beta_SN: Tensor, state: LayerState, batch: ForwardBatch) -> Tensor:
        """[S, N, E]: one token of each of the batch's decodes."""
        assert batch.states is not None
        owns = batch.states[: len(qkv_SX)]
        slots_S = torch.tensor([own.slot for own in owns], device=qkv_SX.device)
        before = self.sizes.taps - 1
        inputs_SPX = state.inputs[slots_S, :before]
        tokens = self._tokens(conv.step(qkv_SX, inputs_SPX, self.taps), g_SN, beta_SN)
        state.inputs[slots_S, :before] = inputs_SPX
        if len(owns) == 1 or state.matrices[0].nbytes > _MOST_GATHERED:
            places = (state.matrices[own.slot].unsqueeze(0) for own in owns)
            out_SNE = torch.cat([rule.step(tokens.part(at, at + 1), place) for at, place in enumerate(places)])
        else:
            matrices_SNDE = state.matrices[slots_S]
            out_SNE = rule.step(tokens, matrices_SNDE)
            state.matrices[slots_S] = matrices_SNDE
        for own in owns:
            for _, copy in own.keeps:
                state.keep(own.slot, copy)
        return out_SNE

    def _prefill(self, qkv_TX: Tensor, g_TN: Tensor, beta_TN: Tensor, state: LayerState, own: SequenceState) -> Tensor:
        """[T, N, E]: new tokens of one sequence, whose state is kept on the way where the engine wants it."""
        before, matrices_NDE = self.sizes.taps - 1, state.matrices[own.slot]
        seen_LX = torch.cat((state.inputs[own.slot, :before], qkv_TX))
        tokens = self._tokens(conv.run(seen_LX, self.taps), g_TN, beta_TN)
        found, start = [], 0
        for stop, copy in (*own.keeps, (len(qkv_TX), None)):
            if stop > start:
                found.append(rule.chunks(tokens.part(start, stop), matrices_NDE))
            if copy is not None:
                state.matrices[copy] = matrices_NDE
                state.inputs[copy, :before] = seen_LX[stop : stop + before]
            start = stop
        state.inputs[own.slot, :before] = seen_LX[len(qkv_TX) :]
        return torch.cat(found)

    def _tokens(self, mixed_TX: Tensor, g_TN: Tensor, beta_TN: Tensor) -> rule.Tokens:
        sizes = self.sizes
        keys = sizes.key_heads * sizes.key_dim
        q, k, v = torch.split(mixed_TX, [keys, keys, sizes.value_heads * sizes.value_dim], dim=-1)
        q_TKD, k_TKD = (rule.unit(one.view(len(one), -1, sizes.key_dim)) for one in (q, k))
        v_TNE = v.float().view(len(v), -1, sizes.value_dim)
        return rule.Tokens(q_TKD * sizes.key_dim**-0.5, k_TKD, v_TNE, g_TN, beta_TN)

    def _read(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is projected: q, k and v [T, X], z [T, N, E], b and a [T, N]."""
        sizes = self.sizes
        if self.by_key_head:
            group = sizes.value_heads // sizes.key_heads
            values = group * sizes.value_dim
            qkvz, ba = (linear(*rows).unflatten(-1, (sizes.key_heads, -1)) for linear in self.projections)
            q, k, v, z = (one.flatten(1) for one in qkvz.split([sizes.key_dim, sizes.key_dim, values, values], dim=-1))
            b, a = (one.flatten(1) for one in ba.split(group, dim=-1))
        else:
            named: dict[str, Tensor] = {}
            for linear in self.projections:
                parts, widths = linear.held.linear.parts, list(map(len, linear.held.outputs))
                for part, one in zip(parts, linear(*rows).split(widths, dim=-1), strict=True):
                    named[part.label or part.source.rpartition("_")[2]] = one
            q, k, v, z, b, a = (named[label] for label in ("q", "k", "v", "z", "b", "a"))
        return torch.cat((q, k, v), dim=-1), z.unflatten(-1, (-1, sizes.value_dim)), b, a

    @property
    def decay(self) -> tuple[Tensor, Tensor]:
        """Of each value head, float32: ``dt_bias``, and ``A_log``."""
        dt_bias, a_log = (getattr(*one) for one in self._decay)
        return dt_bias, a_log

    @cached_property
    def taps(self) -> Tensor:
        """The convolution's weights, once they are loaded."""
        return conv.taps_of(getattr(*self._conv))

    def _vector(self, made_of: Vector, shape: tuple[int, ...], dtype: torch.dtype | None) -> tuple[nn.Module, str]:
        """An empty parameter: whose attribute it is, and its name there."""
        empty = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        return attach(self, self._own(made_of.name), empty)

    def _own(self, name: str) -> str:
        """A weight's name in this module."""
        return name.removeprefix(self._where)
