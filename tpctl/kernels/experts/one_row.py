"""The experts of one token, in two launches that read the weights of the chosen ones alone.

    x ─┬─ gate·up of the shared expert (its programs come first) ─┐
       └─ gate·up of K chosen experts ────────────────────────────┴─ down: all K and the shared one in one sum,
                                                                     plus the residual, or sent to the peers

One row only streams its weights, so everything runs on the CUDA cores. The second kernel starts before the first has
ended and reads its first weights: the ids are there by then. The sum runs over the slots in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.experts.finish import finish_options
from tpctl.kernels.experts.matrices import ExpertMatrices, SharedMatrices
from tpctl.kernels.experts.one_row_kernels import one_row_down_kernel, one_row_gate_up_kernel
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tiles import as_stored


class RowConfig(NamedTuple):
    """Output features of a program, inputs in a tile, launch parameters; prefetch: tiles of down that a program asks
    the L2 cache for while it waits."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    prefetch: int = 0


def pick_row(inputs: int) -> RowConfig:
    """For a down matrix of so many inputs of every expert: a row of a tile for each warp."""
    return RowConfig(4, min(1024, next_power_of_2(inputs)), num_stages=3, prefetch=2)


def pick_gated_row(inputs: int) -> RowConfig:
    """For a gate and its up half of so many inputs: at once, where 16 KiB of bfloat16 hold two rows of both."""
    block_k = next_power_of_2(inputs)
    return RowConfig(4096 // block_k, block_k) if block_k <= 2048 else RowConfig(2, 1024, num_stages=4)


def one_row(
    routed: Routed,
    experts: ExpertMatrices,
    *,
    shared: SharedMatrices | None = None,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    outlet: PeerBuffer | None = None,
    configs: tuple[RowConfig, RowConfig] | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[1, H]: residual + the weighed experts of one token + the shared one, in x's dtype (`out`, if given).

    routed: of one row, in the dtype of weights that are no codes. residual_TH: may be `out`. outlet: sends the result
    as well; the all-reduce that follows must be told so. configs: of gate_up and down. Raises ValueError for more rows,
    for codes that no kernel reads and for what an outlet does not take.
    """
    first, second = configs or (pick_gated_row(experts.hidden), pick_row(experts.width))
    h, shared_h = row_gate_up(routed, experts, shared, first, pdl=pdl)
    return row_down(
        h, shared_h, routed, experts, shared, second, residual_TH=residual_TH, out=out, outlet=outlet, pdl=pdl
    )


def row_gate_up(
    routed: Routed, experts: ExpertMatrices, shared: SharedMatrices | None, config: RowConfig, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the chosen experts [K, I] and the shared one [1, S] have between their linears; the former twice, where
    there is no shared one."""
    x, ids = routed.x, routed.ids
    if len(x) != 1:
        raise ValueError(f"{len(x)} rows are more than one; use `grouped`")
    pointers, form = as_stored(experts.gate_up)
    h = x.new_empty(ids.shape[1], experts.width)
    shared_h = h if shared is None else x.new_empty(1, shared.gate_up.shape[0] // 2)
    blocks = ids.shape[1] * triton.cdiv(experts.width, config.block_n)
    if shared is not None:
        blocks += triton.cdiv(shared_h.shape[1], config.block_n)
    one_row_gate_up_kernel[(blocks,)](
        x,
        ids,
        *pointers,
        x if experts.gate_up_bias is None else experts.gate_up_bias,
        x if shared is None else shared.gate_up,
        h,
        shared_h,
        experts.first,
        experts.count,
        FORM=form,
        SHARED_FORM=None if shared is None else as_stored(shared.gate_up[None])[1],
        HAS_BIAS=experts.gate_up_bias is not None,
        GATING=experts.activation,
        INTERLEAVED=experts.interleaved,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return h, shared_h


def row_down(
    h: torch.Tensor,
    shared_h: torch.Tensor,
    routed: Routed,
    experts: ExpertMatrices,
    shared: SharedMatrices | None,
    config: RowConfig,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    outlet: PeerBuffer | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """The rest of `one_row`. pdl: it must follow `row_gate_up` at once, whose ids it reads before that has ended."""
    x, ids, weights, factors = routed
    pointers, form = as_stored(experts.down)
    out = x.new_empty(x.shape) if out is None else out
    one_row_down_kernel[(triton.cdiv(experts.hidden, config.block_n),)](
        h,
        shared_h,
        ids,
        weights,
        weights if factors is None else factors,
        *pointers,
        x if experts.down_bias is None else experts.down_bias,
        x if shared is None else shared.down,
        first=experts.first,
        count=experts.count,
        **finish_options(out, residual_TH, outlet, config.block_n),
        FORM=form,
        SHARED_FORM=None if shared is None else as_stored(shared.down[None])[1],
        HAS_BIAS=experts.down_bias is not None,
        HAS_FACTOR=factors is not None,
        PER_TOKEN=ids.shape[1],
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PREFETCH=min(config.prefetch, ids.shape[1] * triton.cdiv(experts.width, config.block_k)),
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return out
