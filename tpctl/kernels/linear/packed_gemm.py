"""Linears of some hundred rows whose weights have 4 bits, on a Hopper's tensor cores, which multiply in bfloat16.

The tensor cores take W from registers, where its numbers are made, and x from shared memory, so each weight becomes a
number once for all rows of a tile. The even and the odd inputs of packed bytes stay apart all the way
(`codes_kernels`); a launch before takes x apart alike. Scales of a group are multiplied into the numbers, which are
rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import launch_options
from tpctl.kernels.linear.codes_linear import as_bytes, form_of
from tpctl.kernels.linear.codes_tiles import Form
from tpctl.kernels.linear.packed_gemm_kernels import add_parts_kernel, packed_gemm_kernel, take_apart_kernel

_BLOCK = 1024
_ROWS = ((32, 256), (448, 512))
"""More than so many rows, and at most so many: fewer are faster by `codes_linear`, and others decoded."""

_LONG = 3072
"""Inputs of a part at least."""


class PackedConfig(NamedTuple):
    """Rows of x, outputs and bytes of a row of codes in a tile, launch parameters; into how many parts the input is
    cut."""

    block_m: int
    block_n: int
    bytes: int
    num_warps: int
    num_stages: int
    split: int = 1


def pick_packed(rows: int, codes: Codes, capability: tuple[int, int], multiprocessors: int) -> PackedConfig | None:
    """None where another way is faster: measured on an H200 in groups of 128, tiles of all rows win where the outputs
    alone are enough programs, and two full ones of 256 rows; else decoded numbers do. Long inputs in parts, which fill
    the device where outputs do not, are an estimate by what such programs took.
    """
    if capability[0] != 9 or not any(least < rows <= most for least, most in _ROWS):
        return None
    if rows <= 64:
        config = PackedConfig(64, 128, 64, 8, 4)
    else:
        config = PackedConfig(128, 128, 32, 8, 4) if rows <= 128 else PackedConfig(256, 128, 64, 8, 3)
    columns = -(-codes.outputs // config.block_n)
    if columns < multiprocessors:
        tiles = columns * -(-rows // config.block_m)
        split = min(multiprocessors // tiles, codes.columns // _LONG)
        if split < 2 or 4 * split * tiles < 3 * multiprocessors:
            return None
        config = config._replace(split=split)
    return None if packed_form(codes, config.bytes) is None else config


def packed_form(codes: Codes, most_bytes: int) -> tuple[Form, int] | None:
    """How a tile is read, and the bytes of a row in it, where the kernel takes such codes: integers with one scale for
    a tile, which then fits the row and lies at multiples of 16 bytes."""
    if codes.kind != "uint4" or codes.groups is not None:
        return None
    form, tile, groups = form_of(codes, most_bytes, fast=True)
    if not form.fast or groups != 1 or tile < 32 or codes.columns % (2 * tile):
        return None
    return form, tile


def take_apart(x_TK: Tensor, *, pdl: bool = False) -> Tensor:
    """x [T, K] bfloat16 with each row's even inputs first, then its odd ones. K even, rows at multiples of 4 bytes."""
    rows, columns = x_TK.shape
    apart = torch.empty((rows, columns), dtype=x_TK.dtype, device=x_TK.device)
    take_apart_kernel[(rows, triton.cdiv(columns // 2, _BLOCK))](
        x_TK.view(torch.int32),
        apart.view(torch.int16),
        x_TK.stride(0) // 2,
        columns // 2,
        BLOCK=_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return apart


def packed_gemm(
    x_TK: Tensor, codes: Codes, config: PackedConfig, *, bias_N: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """x @ decode(codes).T + bias, [T, N] bfloat16. x_TK: [T, K] bfloat16. codes: those that have a `packed_form`."""
    rows, columns = x_TK.shape
    read_as = packed_form(codes, config.bytes)
    assert read_as is not None, "another way multiplies by such codes"
    form, tile = read_as
    apart, split = take_apart(x_TK, pdl=pdl), config.split
    out = x_TK.new_empty((rows, codes.outputs))
    sums = out if split == 1 else out.new_empty((split, rows, codes.outputs), dtype=torch.float32)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(codes.outputs, config.block_n), split)
    packed_gemm_kernel[grid](
        TensorDescriptor(apart, [rows, columns], [columns, 1], [config.block_m, tile]),
        TensorDescriptor(codes.values, [codes.outputs, columns // 2], [columns // 2, 1], [config.block_n, tile]),
        as_bytes(codes.scales, out),
        as_bytes(codes.zeros, codes.values),
        as_bytes(codes.rows, out),
        as_bytes(codes.factors, out),
        out if bias_N is None else bias_N,
        sums,
        rows,
        codes.outputs,
        codes.outputs,
        FORM=form,
        HAS_BIAS=bias_N is not None and split == 1,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BYTES=tile,
        SPLIT=split,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    if split > 1:
        add_parts_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            sums,
            out if bias_N is None else bias_N,
            out,
            out.numel(),
            codes.outputs,
            HAS_BIAS=bias_N is not None,
            SPLIT=split,
            BLOCK=_BLOCK,
            PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
    return out
