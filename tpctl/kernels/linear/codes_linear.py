"""Linear layers whose weights are codes (`common.codes`), for up to a few hundred rows.

The stored bytes are read once and become bfloat16 numbers in registers, in front of the tensor cores, with W as the
wide operand; x is not rounded. What stands before and after a linear is fused in as in `gemv`: norm, bias, gated
activation, residual, and what is sent to peers. Scales come in where that is exact and cheap (`form_of`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.codes import PACKED, Codes, decode
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.linear.codes_linear_kernels import codes_linear_kernel
from tpctl.kernels.linear.codes_tiles import Form
from tpctl.kernels.linear.gemv import GemvScratch, small_linear_reference

MOST_ROWS = 512
"""Beyond, matrices are multiplied in FP8, int8 or bfloat16 (`codes_gemm`)."""

_LEAST_TILE = 32
"""Bytes of a row in a tile below which scales are better multiplied into the numbers."""


class CodesConfig(NamedTuple):
    """Rows of x, outputs and bytes of a row of codes in a tile, splits of the input, launch parameters.

    prefetch: bytes of each row that a program asks the L2 cache for while it waits for x.
    """

    block_m: int
    block_n: int
    bytes: int
    split_k: int = 1
    num_warps: int = 2
    num_stages: int = 4
    prefetch: int = 0


def pick_codes(
    rows: int, out_features: int, in_features: int, *, packed: bool, gated: bool, multiprocessors: int, large: bool
) -> CodesConfig | None:
    """How to cut a linear of [out_features, in_features] codes, or None for more rows than are read so.

    With `gated`, out_features counts one half of the merged [gate; up] weight. large: a Hopper, whose warps multiply
    four together, with shared memory for wide tiles. Gated ones of 17 to 64 rows were measured on an H200; the others
    are estimates: two warps keep to the smaller instructions, which take numbers from registers in any order, so many
    small programs are to be on a multiprocessor at once, and short outputs are split.
    """
    if rows > MOST_ROWS:
        return None
    tile = 64 if packed else 128
    block_m = max(8, min(64, next_power_of_2(rows)))
    block_n, num_warps = 64, 2 if rows <= 16 or (rows <= 32 and not gated) else 4
    if large and (rows > 64 or (gated and rows > 16)):
        block_m, block_n, num_warps = min(block_m, 64) if gated else 128, 128, 8
    row_bytes = -(-in_features // 2) if packed else in_features
    blocks = -(-out_features // block_n) * -(-rows // block_m)
    wanted = (8 // num_warps) * multiprocessors
    partial = (rows + 1) * out_features * (2 if gated else 1)
    split = 1
    while split < 8 and blocks * split * 2 <= wanted and row_bytes >= 4 * tile * split and partial * split <= 1 << 20:
        split *= 2
    few = rows <= 16
    return CodesConfig(block_m, block_n, tile, split, num_warps, 4 if few else 3, 512 if few else 0)


def form_of(codes: Codes, most_bytes: int, *, fast: bool) -> tuple[Form, int, int]:
    """What the kernel is compiled for, the bytes of a row in a tile (at most most_bytes) and into how many parts for
    scales those go.

    One scale a row is applied to the sums at the end. Scales for so many inputs that a tile lies within one are applied
    to the tile's sums. Others are multiplied into the numbers, where the inputs of one are a power of two that tiles
    hold whole; else one is looked up for every input.
    """
    packed = codes.kind in PACKED
    unit, first, columns = codes.unit, codes.first, codes.scales.shape[-1]
    each = 2 if packed else 1
    mode, tile, groups = "each", most_bytes, 1
    if codes.groups is None and columns == 1:
        mode = "end"
    elif codes.groups is None and unit % each == 0 and first % each == 0:
        common = math.gcd(unit // each, first // each)
        within = common & -common
        if within >= _LEAST_TILE:
            mode, tile = "tile", min(most_bytes, within)
        elif first == 0 and within == unit // each:
            # Parts of 16 bytes are what a thread loads of the codes. Scales for just those keep Triton from moving the
            # loaded tile, rather than what becomes of it, to where the tensor cores take it from.
            mode, groups = "inside", most_bytes // (8 if within == 16 else within)
        elif within >= 16:
            mode, tile = "tile", within
    shifts = codes.zeros is not None or codes.zero != 0
    fast = fast and mode != "each" and not (shifts and codes.kind in ("e4m3", "e2m1"))
    fast = fast and not (packed and codes.columns % 2)
    form = Form(
        kind=codes.kind,
        fast=fast,
        mode=mode,
        columns=codes.columns,
        unit=unit,
        first=first,
        scale_columns=columns,
        scales=_SCALES.get(codes.scales.dtype, "floats"),
        has_zeros=codes.zeros is not None,
        zero=codes.zero,
        has_groups=codes.groups is not None,
        has_rows=codes.rows is not None,
        has_factors=codes.factors is not None,
    )
    return form, tile, groups


_SCALES = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}


def as_bytes(held: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel gets a pointer to: 8-bit types as uint8, `other` in place of None."""
    if held is None:
        return other
    return held.view(torch.uint8) if held.element_size() == 1 else held


def codes_linear(
    x_TK: Tensor,
    codes: Codes,
    scratch: GemvScratch,
    *,
    bias_O: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: Tensor | None = None,
    out: Tensor | None = None,
    config: CodesConfig,
    outlet: PeerBuffer | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual + act_and_mul(norm(x) @ decode(codes).T + bias), each part optional, in one launch.

    x_TK: [T, K] bfloat16, float16 or float32, columns contiguous. codes: of W [O, K], contiguous. bias_O: [O]. norm:
    (weight [K], eps) of an RMSNorm over x (`unit_offset`: Gemma's 1 + weight). activation: W is the merged [gate; up]
    and the result act(gate) * up has O / 2 columns. residual_TO: added last; it may be `out`. outlet: sends the result
    through it as well; the all-reduce that follows must be told so (`sent`). Returns `out`, or a new [T, O] (or
    [T, O / 2]) in x's dtype.

    Raises ValueError for what an outlet does not take, or a split that `scratch` is too small for.
    """
    rows, in_features = x_TK.shape
    if in_features != codes.columns:
        raise ValueError(f"x has {in_features} columns, the codes {codes.columns}")
    width = 2 if activation else 1
    out_features = codes.outputs // width
    if out is None:
        out = x_TK.new_empty((rows, out_features))
    if outlet is not None:
        outlet.check(out, sent=True)
    if config.split_k > 1:
        needed = config.split_k * rows * (codes.outputs + 1)
        if needed > scratch.partial.numel():
            raise ValueError(f"{needed} partial sums exceed the scratch of {scratch.partial.numel()}")
    norm_K = x_TK if norm is None else norm[0]
    form, tile, groups = form_of(codes, config.bytes, fast=may_be_fast(x_TK, norm_K))
    pairs = form.packed and form.fast
    args = (
        x_TK.view(torch.int32) if pairs else x_TK,
        as_bytes(codes.values, x_TK),
        as_bytes(codes.scales, x_TK),
        as_bytes(codes.zeros, codes.values.view(torch.uint8)),
        as_bytes(codes.rows, x_TK),
        as_bytes(codes.groups, x_TK),
        as_bytes(codes.factors, x_TK),
        out,
        bias_O if bias_O is not None else x_TK,
        residual_TO if residual_TO is not None else x_TK,
        norm_K.view(torch.int32) if pairs else norm_K,
        scratch.partial,
        scratch.counters,
        outlet.pointers if outlet is not None else scratch.counters,
        outlet.epochs if outlet is not None else scratch.counters,
        rows,
        out_features,
        x_TK.stride(0) // 2 if pairs else x_TK.stride(0),
        out.stride(0),
        residual_TO.stride(0) if residual_TO is not None else 0,
        outlet.layout.row_words if outlet is not None else 0,
        outlet.layout.plane_words if outlet is not None else 0,
        norm[1] if norm is not None else 0.0,
    )
    flags = {
        "FORM": form,
        "HAS_BIAS": bias_O is not None,
        "HAS_RESIDUAL": residual_TO is not None,
        "HAS_NORM": norm is not None,
        "UNIT_OFFSET": unit_offset,
        "ACTIVATION": activation or "",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BYTES": tile,
        "GROUPS": groups,
        "SPLIT_K": config.split_k,
        "STAGES": config.num_stages,
        "PREFETCH": config.prefetch,
        "RANK": outlet.rank if outlet is not None else 0,
        "WORLD": outlet.world if outlet is not None else 1,
        "PEERS": next_power_of_2(outlet.world) if outlet is not None else 1,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **launch_options(pdl),
    }
    grid = (triton.cdiv(out_features, config.block_n), config.split_k, triton.cdiv(rows, config.block_m))
    codes_linear_kernel[grid](*args, **flags)
    return out


def may_be_fast(x_TK: Tensor, norm_K: Tensor) -> bool:
    """Whether x and the norm's weight are of the dtype that numbers are made in by bits, and can be read in pairs."""
    aligned = all(one.data_ptr() % 4 == 0 for one in (x_TK, norm_K)) and x_TK.stride(0) % 2 == 0
    return x_TK.dtype == norm_K.dtype == torch.bfloat16 and aligned


def codes_linear_reference(x_TK: Tensor, codes: Codes, **options: object) -> Tensor:
    """`codes_linear` in plain torch, by the numbers that the codes stand for in x's dtype; options as there."""
    return small_linear_reference(x_TK, decode(codes, dtype=x_TK.dtype), **options)  # type: ignore[arg-type]
