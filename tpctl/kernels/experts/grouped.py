"""The experts of any number of tokens: grouped GEMMs, each tile of pairs (token, slot) of one expert.

    x [T, H] ── gate·up of each tile's expert ── h [T·K, I] ── down, weighed ── y [T·K, H] ── sum over K ── [T, H]

Many pairs of experts whose format rounds inputs are multiplied in 8-bit numbers (`grouped_scaled`).

Few tokens need no list of tiles: the program of a pair takes all tokens that chose its expert, and ends at once if it
is not the first of its pairs. Above, `placing` makes the list. In float32 a result does not depend on the batch: every
batch has tiles of one shape, and a token's sum runs over its slots in their order.
"""

from __future__ import annotations

import torch
import triton

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.experts.finish import finish_options
from tpctl.kernels.experts.grouped_kernels import gather_sum_kernel
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.matrix import ExpertMatrix
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tile_config import TileConfig


def grouped(
    routed: Routed,
    experts: ExpertMatrices[ExpertMatrix],
    *,
    total_experts: int | None = None,
    shared_TH: torch.Tensor | None = None,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    outlet: PeerBuffer | None = None,
    configs: tuple[TileConfig, TileConfig] | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[T, H]: residual + the weighed experts of every token + factors * shared, in x's dtype (`out`, if given).

    routed: x [T, H], columns contiguous, in the dtype of weights that are no codes. total_experts: of all ranks.
    shared_TH: what the shared expert made of x. residual_TH: may be `out`. outlet: sends the result as well; the
    all-reduce that follows must be told so. configs: of gate_up and down, with one block_m. Raises ValueError for what
    an outlet does not take.
    """
    x, ids, weights, factors = routed
    rows = len(x)
    out = x.new_empty(x.shape) if out is None else out
    if rows == 0:
        return out
    if configs is None:
        y = experts.grouped_pairs(routed, total_experts or experts.count, pdl=pdl)
    else:
        y = experts.pairs_in_tiles(routed, configs, pdl=pdl)
    block = min(1024, next_power_of_2(experts.hidden))
    gather_sum_kernel[(triton.cdiv(experts.hidden, block), rows)](
        y,
        ids,
        y if shared_TH is None else shared_TH,
        weights if factors is None else factors,
        rows=rows,
        shared_stride=0 if shared_TH is None else shared_TH.stride(0),
        first=experts.first,
        count=experts.count,
        **finish_options(out, residual_TH, outlet, block),
        COLUMNS=experts.hidden,
        PER_TOKEN=ids.shape[1],
        HAS_SHARED=shared_TH is not None,
        HAS_FACTORS=factors is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
