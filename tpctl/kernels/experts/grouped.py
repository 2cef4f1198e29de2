"""The experts of any number of tokens: grouped GEMMs, each tile of pairs (token, slot) of one expert.

    x [T, H] ── gate·up of each tile's expert ── h [T·K, I] ── down, weighed ── y [T·K, H] ── sum over K ── [T, H]

Many pairs of experts whose format rounds inputs are multiplied in 8-bit numbers (`grouped_scaled`).

Few tokens need no list of tiles: the program of a pair takes all tokens that chose its expert, and ends at once if it
is not the first of its pairs. Above, `placing` makes the list. In float32 a result does not depend on the batch: every
batch has tiles of one shape, and a token's sum runs over its slots in their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from tpctl.arch.block import Activation, Clamped
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.common.launch import capability, launch_options, next_power_of_2, shared_memory
from tpctl.kernels.experts.finish import finish_options
from tpctl.kernels.experts.grouped_codes_kernels import grouped_codes_kernel
from tpctl.kernels.experts.grouped_kernels import gather_sum_kernel, grouped_linear_kernel
from tpctl.kernels.experts.grouped_scaled import ScaledConfig, pick_scaled, scaled_pairs
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.placing import Placed, place
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.linear.codes_linear import as_bytes, form_of, may_be_fast

UNLISTED_ROWS = 16
"""Most tokens whose tiles need no list: they are one tile."""

WIDE_ROWS = 256
"""Most tokens whose pairs are kept in float32 until they are summed; beyond, in x's dtype."""


class TileConfig(NamedTuple):
    """Pairs, output features and inputs of a tile, launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


def pick_block_m(pairs: int, experts: int) -> int:
    """Pairs in a tile: half as many again as an expert has on average, so that most experts' are one tile; 16 to 128.

    experts: all of the model, on whichever rank. Measured on an H200: for 16 on average tiles of 32 pairs took 7% less.
    """
    return min(128, max(16, next_power_of_2(-(-3 * pairs // (2 * experts)))))


def pick_tile(block_m: int, *, gated: bool, itemsize: int, limit: int, codes: bool = False) -> TileConfig:
    """A tile of so many pairs; ``itemsize`` bytes a number of x, ``limit`` bytes of shared memory.

    Few pairs only stream weights: many bytes under way. Many multiply: large tiles, as far as registers hold them,
    which those of numbers made of ``codes`` take too. With two warps the tensor cores take those from registers in any
    order, and the copies of codes are 16 bytes wide.
    """
    if itemsize == 4:
        config = TileConfig(block_m, 32, 32, 4, 2)
    elif block_m <= 32:
        config = TileConfig(block_m, 64, 128, 2 if codes else 4, 3)
        if block_m == 32 and gated and not codes:
            config = TileConfig(32, 64, 64, 4, 4)
    elif codes:
        config = TileConfig(block_m, 64, 128, 4 if block_m == 64 else 8, 3)
    elif block_m == 64:
        config = TileConfig(64, 64 if gated else 128, 64, 4, 4)
    else:
        config = TileConfig(128, 128, 64, 8, 3 if gated else 4)
    while _bytes(config, gated, itemsize) > limit and config.num_stages > 2:
        config = config._replace(num_stages=config.num_stages - 1)
    while _bytes(config, gated, itemsize) > limit and config.block_k > 32:
        config = config._replace(block_k=config.block_k // 2)
    return config


def _bytes(config: TileConfig, gated: bool, itemsize: int) -> int:
    """Shared memory of a tile's operands while they are under way."""
    rows = config.block_m + config.block_n * (2 if gated else 1)
    return config.num_stages * rows * config.block_k * itemsize


def grouped(
    routed: Routed,
    experts: ExpertMatrices,
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
    rows, pairs = len(x), ids.numel()
    out = x.new_empty(x.shape) if out is None else out
    if rows == 0:
        return out
    total = total_experts or experts.count
    scaled = None if configs is not None else _scaled(x, pairs, experts, total)
    if scaled is not None:
        placed = place(ids, experts.count, scaled[0].block_m, first=experts.first, pdl=pdl)
        y = scaled_pairs(routed, experts, placed, scaled, pdl=pdl)
    else:
        y = _plain_pairs(routed, experts, configs or _configs(x, pairs, experts, total), pdl=pdl)
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


def _scaled(
    x: torch.Tensor, pairs: int, experts: ExpertMatrices, total: int
) -> tuple[ScaledConfig, ScaledConfig] | None:
    """Tiles of 8-bit numbers, if that is how so many pairs are multiplied."""
    if x.dtype == torch.float32 or len(x) <= UNLISTED_ROWS:
        return None
    return pick_scaled(pairs, experts, total, pick_block_m(pairs, total), capability(x.device), shared_memory(x.device))


def _plain_pairs(
    routed: Routed, experts: ExpertMatrices, configs: tuple[TileConfig, TileConfig], *, pdl: bool
) -> torch.Tensor:
    """What every pair adds to its token's sum, by numbers of x's dtype."""
    placed = None
    if len(routed.x) > UNLISTED_ROWS:
        placed = place(routed.ids, experts.count, configs[0].block_m, first=experts.first, pdl=pdl)
    h = grouped_gate_up(routed, experts, placed, configs[0], pdl=pdl)
    return grouped_down(h, routed, experts, placed, configs[1], pdl=pdl)


def grouped_gate_up(
    routed: Routed, experts: ExpertMatrices, placed: Placed | None, config: TileConfig, *, pdl: bool = False
) -> torch.Tensor:
    """What every pair's expert has between its linears, [T * K, I] in x's dtype. placed: None up to `UNLISTED_ROWS`."""
    h = routed.x.new_empty(routed.ids.numel(), experts.width)
    bias = experts.gate_up_bias
    _linear(routed.x, routed, experts, experts.gate_up, bias, placed, h, config, experts.activation, pdl)
    return h


def grouped_down(
    h: torch.Tensor,
    routed: Routed,
    experts: ExpertMatrices,
    placed: Placed | None,
    config: TileConfig,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """What every pair adds to its token's sum, [T * K, H]; pairs of other ranks' experts are not written.

    pdl: it must follow `grouped_gate_up` at once, before whose end it reads ids and tiles.
    """
    rows = len(routed.ids)
    y = h.new_empty(len(h), experts.hidden, dtype=torch.float32 if rows <= WIDE_ROWS else h.dtype)
    _linear(h, routed, experts, experts.down, experts.down_bias, placed, y, config, None, pdl)
    return y


def most_bytes(codes: Codes, block_k: int) -> int:
    """Of a row in a tile of so many inputs. Tensor cores multiply by 16 at least, and of packed codes the even and the
    odd inputs are two products."""
    return max(16, block_k // 2) if codes.kind in PACKED else block_k


def _configs(x: torch.Tensor, pairs: int, experts: ExpertMatrices, total: int) -> tuple[TileConfig, TileConfig]:
    few = x.shape[0] <= UNLISTED_ROWS or x.dtype == torch.float32
    block_m = UNLISTED_ROWS if few else pick_block_m(pairs, total)
    size, limit = x.element_size(), shared_memory(x.device)
    gate_up, down = (
        pick_tile(block_m, gated=gated, itemsize=size, limit=limit, codes=isinstance(matrix, Codes))
        for matrix, gated in ((experts.gate_up, True), (experts.down, False))
    )
    return gate_up, down


def _linear(
    x: torch.Tensor,
    routed: Routed,
    experts: ExpertMatrices,
    matrix: torch.Tensor | Codes,
    bias: torch.Tensor | None,
    placed: Placed | None,
    out: torch.Tensor,
    config: TileConfig,
    activation: Activation | Clamped | None,
    pdl: bool,
) -> None:
    """One of the two linears of every expert, into `out` [T * K, width]."""
    rows, per_token = routed.ids.shape
    tiles = rows * per_token if placed is None else len(placed.tiles)
    grid = (triton.cdiv(out.shape[1], config.block_n), tiles)
    where = (routed.ids, *((routed.ids, routed.ids) if placed is None else placed), routed.weights)
    flags: dict[str, Any] = {
        "PER_TOKEN": per_token,
        "SLOTS": next_power_of_2(per_token),
        "LISTED": placed is not None,
        "GATING": activation,
        "INTERLEAVED": experts.interleaved,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **launch_options(pdl),
    }
    held = x if bias is None else bias
    here = (experts.first, experts.count)
    if isinstance(matrix, Codes):
        form, tile, groups = form_of(matrix, most_bytes(matrix, config.block_k), fast=may_be_fast(x, x))
        pairs = form.packed and form.fast
        grouped_codes_kernel[grid](
            x.view(torch.int32) if pairs else x,
            *where,
            as_bytes(matrix.values, x),
            as_bytes(matrix.scales, x),
            as_bytes(matrix.zeros, matrix.values.view(torch.uint8)),
            *(as_bytes(one, x) for one in (matrix.rows, matrix.groups, matrix.factors)),
            held,
            out,
            rows,
            x.stride(0) // 2 if pairs else x.stride(0),
            *here,
            FORM=form,
            OUTPUTS=matrix.outputs,
            SCALE_ROWS=matrix.scales.shape[1],
            BYTES=tile,
            GROUPS=groups,
            **flags,
        )
        return
    grouped_linear_kernel[grid](
        x,
        *where,
        matrix,
        held,
        out,
        rows,
        x.stride(0),
        *here,
        INPUTS=matrix.shape[2],
        OUTPUTS=matrix.shape[1],
        BLOCK_K=config.block_k,
        **flags,
    )
