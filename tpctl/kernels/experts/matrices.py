"""The matrices of a mixture's experts on one rank, as the kernels take them, and the experts in plain torch.

Shape suffixes: T tokens, K experts of a token, E experts here, H hidden size, I (this rank's share of) an expert's
width, F = 2I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor

from tpctl.arch.block import Activation, Clamped
from tpctl.kernels.common.launch import launch_options, next_power_of_2, shared_memory
from tpctl.kernels.experts.gating import gated_reference
from tpctl.kernels.experts.matrix import ExpertMatrix, PairsLaunch
from tpctl.kernels.experts.placing import Placed, place
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tile_config import TileConfig

UNLISTED_ROWS = 16
"""Most tokens whose tiles need no list: they are one tile."""

WIDE_ROWS = 256
"""Most tokens whose pairs are kept in float32 until they are summed; beyond, in x's dtype."""

M = TypeVar("M", bound=ExpertMatrix, covariant=True)


@dataclass(frozen=True)
class ExpertMatrices(Generic[M]):
    """down(activation(gate) * up) of every expert here; each of the two in a form of its own.

    Attributes:
        gate_up: [E, F, H]; rows gate, then up, or ``interleaved``: alternating.
        down: [E, H, I].
        gate_up_bias: [E, F].
        down_bias: [E, H]; ``None`` too where another rank adds it.
        first: the number of the first expert here; ids of others add nothing on this rank.
    """

    gate_up: M
    down: M
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation | Clamped = "silu"
    interleaved: bool = False
    first: int = 0

    @property
    def count(self) -> int:
        """E."""
        return self.gate_up.count

    @property
    def width(self) -> int:
        """I."""
        return self.gate_up.outputs // 2

    @property
    def hidden(self) -> int:
        return self.down.outputs

    def grouped_pairs(self, routed: Routed, total: int, *, pdl: bool = False) -> Tensor:
        """What every pair adds to its token's sum, [T * K, H]; pairs of other ranks' experts are not written.

        total: experts of all ranks.
        """
        return self.pairs_in_tiles(routed, self.tiles(routed, total), pdl=pdl)

    def tiles(self, routed: Routed, total: int) -> tuple[TileConfig, TileConfig]:
        """Of gate_up and down, with one block_m."""
        x = routed.x
        few = len(x) <= UNLISTED_ROWS or x.dtype == torch.float32
        block_m = UNLISTED_ROWS
        if not few:
            pairs = routed.ids.numel()
            block_m = min(one.pairs_of_tile(pairs, total) for one in (self.gate_up, self.down))
        size, limit = x.element_size(), shared_memory(x.device)
        return (
            self.gate_up.tile(block_m, gated=True, itemsize=size, limit=limit),
            self.down.tile(block_m, gated=False, itemsize=size, limit=limit),
        )

    def pairs_in_tiles(self, routed: Routed, configs: tuple[TileConfig, TileConfig], *, pdl: bool = False) -> Tensor:
        """`grouped_pairs` by numbers of x's dtype."""
        placed = None
        if len(routed.x) > UNLISTED_ROWS:
            placed = place(routed.ids, self.count, configs[0].block_m, first=self.first, pdl=pdl)
        h = self.gate_up_pairs(routed, placed, configs[0], pdl=pdl)
        return self.down_pairs(h, routed, placed, configs[1], pdl=pdl)

    def gate_up_pairs(self, routed: Routed, placed: Placed | None, config: TileConfig, *, pdl: bool = False) -> Tensor:
        """What every pair's expert has between its linears, [T * K, I] in x's dtype. placed: None up to
        `UNLISTED_ROWS`."""
        h = routed.x.new_empty(routed.ids.numel(), self.width)
        launch = self._launch(routed, placed, self.gate_up_bias, self.width, config, self.activation, pdl)
        self.gate_up.grouped_pairs(routed.x, h, launch)
        return h

    def down_pairs(
        self, h: Tensor, routed: Routed, placed: Placed | None, config: TileConfig, *, pdl: bool = False
    ) -> Tensor:
        """What every pair adds to its token's sum, [T * K, H]; pairs of other ranks' experts are not written.

        pdl: it must follow `gate_up_pairs` at once, before whose end it reads ids and tiles.
        """
        dtype = torch.float32 if len(routed.ids) <= WIDE_ROWS else h.dtype
        y = h.new_empty(len(h), self.hidden, dtype=dtype)
        self.down.grouped_pairs(h, y, self._launch(routed, placed, self.down_bias, self.hidden, config, None, pdl))
        return y

    def _launch(
        self,
        routed: Routed,
        placed: Placed | None,
        bias: Tensor | None,
        width: int,
        config: TileConfig,
        activation: Activation | Clamped | None,
        pdl: bool,
    ) -> PairsLaunch:
        rows, per_token = routed.ids.shape
        tiles = rows * per_token if placed is None else len(placed.tiles)
        flags: dict[str, Any] = {
            "PER_TOKEN": per_token,
            "SLOTS": next_power_of_2(per_token),
            "LISTED": placed is not None,
            "GATING": activation,
            "INTERLEAVED": self.interleaved,
            "HAS_BIAS": bias is not None,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "PDL": pdl,
            "num_warps": config.num_warps,
            **launch_options(pdl),
        }
        return PairsLaunch(
            grid=(triton.cdiv(width, config.block_n), tiles),
            where=(routed.ids, *((routed.ids, routed.ids) if placed is None else placed), routed.weights),
            bias=bias,
            rows=rows,
            first=self.first,
            count=self.count,
            block_k=config.block_k,
            flags=flags,
        )


@dataclass(frozen=True)
class SharedMatrices:
    """An MLP that every token takes beside its experts: ``gate_up`` [2S, H] (gate, then up) and ``down`` [H, S]."""

    gate_up: Tensor
    down: Tensor


def experts_reference(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertMatrices[ExpertMatrix],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[T, H]: the sum of each token's experts, weighed, in ``dtype`` (x's, if it is not given)."""
    dtype = x_TH.dtype if dtype is None else dtype
    x, total = x_TH.to(dtype), x_TH.new_zeros(x_TH.shape, dtype=dtype)
    for expert in range(experts.count):
        tokens, slots = torch.where(ids_TK == experts.first + expert)
        if not len(tokens):
            continue
        gate_up = x[tokens] @ experts.gate_up.numbers(expert, dtype).T
        if experts.gate_up_bias is not None:
            gate_up += experts.gate_up_bias[expert].to(dtype)
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if experts.interleaved else gate_up.chunk(2, -1)
        y = gated_reference(gate, up, experts.activation) @ experts.down.numbers(expert, dtype).T
        if experts.down_bias is not None:
            y += experts.down_bias[expert].to(dtype)
        total.index_add_(0, tokens, y * weights_TK[tokens, slots, None].to(dtype))
    return total


def shared_reference(x_TH: Tensor, shared: SharedMatrices, factors_T: Tensor | None = None) -> Tensor:
    """[T, H] of the shared MLP, in x's dtype."""
    gate, up = (x_TH @ shared.gate_up.T.to(x_TH.dtype)).chunk(2, -1)
    y = gated_reference(gate, up, "silu") @ shared.down.T.to(x_TH.dtype)
    return y if factors_T is None else y * factors_T[:, None].to(y.dtype)
