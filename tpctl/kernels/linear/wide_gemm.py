"""Linears of 33 to 512 rows whose weights have 4 bits, on a Hopper, in Gluon: products run while numbers are made.

The tensor cores take W from registers, where its numbers are made, and x from shared memory, so each weight becomes a
number once for all rows of a tile. Warps of their own fetch both. x is brought into the order of the codes by a launch
before, and parts of long inputs are summed by one behind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import launch_options, next_power_of_2, num_multiprocessors
from tpctl.kernels.linear.codes_linear import as_bytes
from tpctl.kernels.linear.codes_tiles import Form
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.packed_gemm import packed_form
from tpctl.kernels.linear.wide_cut import WideCut
from tpctl.kernels.linear.wide_parts_kernels import add_wide_parts_kernel, reorder_kernel

wide_gemm_kernel: Any
try:
    from tpctl.kernels.linear.wide_gemm_kernels import wide_gemm_kernel
except (ImportError, AttributeError):  # a Triton without Gluon, or with another one
    wide_gemm_kernel = None

_VERSIONS = ("3.6.", "3.7.")
"""Of Triton, whose Gluon the kernel is written in: in others there are other names."""
_BLOCK = 1024


class WideConfig(NamedTuple):
    """Rows of x in a tile, groups of four warps with 64 outputs each, groups of 128 inputs in the ring, into how many
    parts the inputs are cut; 0: all groups of all tiles are shared out evenly among the programs."""

    rows: int
    warpgroups: int
    stages: int
    split: int = 1


def has_gluon() -> bool:
    """Whether this Triton can compile the kernel."""
    return wide_gemm_kernel is not None and triton.__version__.startswith(_VERSIONS)


def wide_form(codes: Codes) -> Form | None:
    """What the kernel is compiled for, where it takes such codes: integers with one scale for whole groups of 128, or
    for a row."""
    found = packed_form(codes, 64)
    if found is None or found[1] != 64 or codes.columns % 128 or codes.scales.dtype == torch.uint8:
        return None
    return found[0]


class _Tile(NamedTuple):
    """Of a program: rows, groups of warps, stages, which fill the shared memory."""

    rows: int
    warpgroups: int
    stages: int


_TILES = {
    64: (_Tile(64, 2, 4), _Tile(64, 2, 4)),
    128: (_Tile(128, 2, 5), _Tile(128, 1, 6)),
    256: (_Tile(256, 2, 3), _Tile(256, 1, 3)),
    384: (_Tile(128, 2, 5), _Tile(128, 2, 5)),
    512: (_Tile(256, 2, 3), _Tile(128, 2, 5)),
}
"""Of up to so many rows, where that makes tiles for the whole device, and else; by the four linears of Llama-8B on an
H200 (docs/log/2026-11-29-codes-on-gpu.md), but for 384, an estimate."""
_SMALLEST = 1 << 24
"""Numbers of W: smaller ones were not timed."""
_FEWEST = 33
"""Fewer rows are faster by `codes_linear`."""
_LEAST = 7
"""Groups of a part at least: fewer are a tile's beginning and end more than its products."""


def pick_wide(rows: int, codes: Codes, *, multiprocessors: int, hopper: bool) -> WideConfig | None:
    """How to cut a linear; None where another way is faster, or the kernel takes no such codes.

    Outputs that fill the device are shared out evenly among its programs; of fewer, the inputs are cut into as many
    parts as it has room for, where those leave less than a third of it idle.
    """
    if not hopper or not has_gluon() or rows < _FEWEST or wide_form(codes) is None:
        return None
    found = next((tiles for most, tiles in _TILES.items() if rows <= most), None)
    if found is None or codes.outputs * codes.columns < _SMALLEST:
        return None
    config = WideConfig(*found[0])
    if tiles_of(rows, codes, config, gated=False)[1] < multiprocessors:
        config = WideConfig(*found[1])
    tiles = tiles_of(rows, codes, config, gated=False)[1]
    split = max(1, min(multiprocessors // tiles, codes.columns // 128 // _LEAST))
    even = tiles < multiprocessors and 3 * split * tiles > 2 * multiprocessors
    return config._replace(split=split if even else 0)


def reorder(
    x_TK: Tensor, *, norm: tuple[Tensor, float] | None = None, unit_offset: bool = False, pdl: bool = False
) -> Tensor:
    """norm(x) [T, K] bfloat16 with each group of 128 inputs in the order of `wide_gemm`'s codes.

    x_TK: K a multiple of 128, rows at multiples of 4 bytes. norm: (weight [K] bfloat16, eps) of an RMSNorm, which
    rounds as `rms_norm` does (`unit_offset`: Gemma's 1 + weight).
    """
    rows, columns = x_TK.shape
    ordered = torch.empty((rows, columns), dtype=x_TK.dtype, device=x_TK.device)
    block = _BLOCK if norm is None else next_power_of_2(columns // 4)
    reorder_kernel[(rows, triton.cdiv(columns // 4, block))](
        x_TK.view(torch.int32),
        (x_TK if norm is None else norm[0]).view(torch.int32),
        ordered.view(torch.int32),
        x_TK.stride(0) // 2,
        columns,
        0.0 if norm is None else norm[1],
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(4, block // 128)),
        **launch_options(pdl),
    )
    return ordered


def wide_gemm(
    x_TK: Tensor,
    codes: Codes,
    scratch: GemvScratch,
    config: WideConfig,
    *,
    bias_N: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TN: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual + act_and_mul(norm(x) @ decode(codes).T + bias), each part optional; rounded to bfloat16 after each.

    x_TK: [T, K] bfloat16, rows at multiples of 4 bytes. codes: of W [N, K], those that have a `wide_form`. norm: as
    `reorder` takes it. activation: W is the merged [gate; up] and the result act(gate) * up has N / 2 columns.
    residual_TN: added last; it may be `out`. Returns `out`, or a new [T, N] (or [T, N / 2]).

    Raises ValueError for codes of another form.
    """
    rows, columns = x_TK.shape
    form = wide_form(codes)
    if form is None or columns != codes.columns:
        raise ValueError(f"x has {columns} columns, the {codes.kind} codes {codes.columns}: use decoded_linear")
    outputs = codes.outputs // (2 if activation else 1)
    if out is None:
        out = x_TK.new_empty((rows, outputs))
    cut = WideCut(
        form=form,
        rows=config.rows,
        warpgroups=config.warpgroups,
        stages=config.stages,
        split=config.split,
        activation=activation or "",
        has_bias=bias_N is not None,
        has_residual=residual_TN is not None,
        pdl=pdl,
    )
    row_tiles, tiles = tiles_of(rows, codes, config, gated=cut.gated)
    programs = min(num_multiprocessors(out.device), tiles * (config.split or cut.groups))
    parts = scratch.partial
    if config.split == 0:
        parts = parts.new_empty((programs, config.warpgroups, 64 * config.rows))
    elif config.split > 1:
        parts = parts.new_empty((config.split, codes.outputs, row_tiles * config.rows))
    residual = out if residual_TN is None else residual_TN
    scales, factors = as_bytes(codes.scales, out), as_bytes(codes.factors, scratch.partial)
    table, bias = as_bytes(codes.rows, scratch.counters), out if bias_N is None else bias_N
    ordered = reorder(x_TK, norm=norm, unit_offset=unit_offset, pdl=pdl)
    wide_gemm_kernel[(programs,)](
        *descriptors(ordered, codes, config),
        scales,
        as_bytes(codes.zeros, codes.values),
        table,
        factors,
        bias,
        residual,
        out,
        parts,
        scratch.counters,
        rows,
        outputs,
        out.stride(0),
        residual.stride(0),
        row_tiles,
        tiles,
        CUT=cut,
        num_warps=4,
        **launch_options(pdl),
    )
    if config.split > 1:
        add_wide_parts_kernel[(triton.cdiv(rows, 32), triton.cdiv(outputs, 64))](
            parts,
            scales,
            table,
            factors,
            bias,
            residual,
            out,
            rows,
            outputs,
            row_tiles * config.rows,
            out.stride(0),
            residual.stride(0),
            CUT=cut,
            BLOCK_N=64,
            BLOCK_T=32,
            num_warps=4,
            **launch_options(pdl),
        )
    return out


def tiles_of(rows: int, codes: Codes, config: WideConfig, *, gated: bool) -> tuple[int, int]:
    """Tiles of rows, and all tiles."""
    row_tiles, width = triton.cdiv(rows, config.rows), 64 * config.warpgroups
    outputs, width = (codes.outputs // 2, width // 2) if gated else (codes.outputs, width)
    return row_tiles, row_tiles * triton.cdiv(outputs, width)


def descriptors(ordered_TK: Tensor, codes: Codes, config: WideConfig) -> tuple[Any, Any]:
    """Of x and of the codes' bytes, in the blocks that the kernel copies."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x_layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_layout = NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)
    (rows, columns), width = ordered_TK.shape, codes.columns // 2
    return (
        TensorDescriptor(ordered_TK, [rows, columns], [columns, 1], [config.rows, 64], x_layout),
        TensorDescriptor(codes.values, [codes.outputs, width], [width, 1], [32 * config.warpgroups, 64], w_layout),
    )
