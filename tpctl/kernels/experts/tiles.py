"""Tiles of experts' matrices [E, N, K], as they are stored: numbers, or codes (`common.codes`) made numbers here.

A kernel takes a matrix as five pointers and a `Form`, which says how they are to be read. Rows of all experts count
through: row n of expert e is e * N + n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.prefetch import prefetch


@dataclass(frozen=True)
class Form:
    """How a matrix is stored; a constant of the kernels that read it.

    Attributes:
        kind: of its codes; "" for numbers.
        outputs, inputs: N and K.
        scale_rows, scale_columns, unit, first, zero: as in `Codes`.
        exponents: scales are powers of two.
        native: whether the GPU converts e4m3 itself.
    """

    kind: str
    outputs: int
    inputs: int
    scale_rows: int = 1
    scale_columns: int = 1
    unit: int = 1
    first: int = 0
    zero: int = 0
    exponents: bool = False
    has_rows: bool = False
    has_zeros: bool = False
    has_factors: bool = False
    native: bool = False


Pointers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Values, scales, zeros, factors, rows of scales; any tensor stands for one that there is not."""


def as_stored(matrix: Tensor | Codes) -> tuple[Pointers, Form]:
    """What a kernel takes of a matrix [E, N, K]. Raises ValueError for codes that no kernel here reads."""
    if isinstance(matrix, Tensor):
        return (matrix,) * 5, Form("", *matrix.shape[1:])
    if matrix.groups is not None:
        raise ValueError("experts whose inputs are of groups in no order are read by no kernel")
    if matrix.zeros is not None and matrix.zeros.dtype not in (torch.uint8, torch.int8, torch.int16):
        raise ValueError(f"zeros of experts in {matrix.zeros.dtype} are read by no kernel")
    values = matrix.values.view(torch.uint8) if matrix.kind == "e4m3" else matrix.values
    rows, columns = matrix.scales.shape[1:]
    form = Form(
        matrix.kind,
        matrix.outputs,
        matrix.columns,
        rows,
        columns,
        matrix.unit,
        matrix.first,
        zero=matrix.zero if matrix.zeros is None else 0,
        exponents=matrix.scales.dtype == torch.uint8,
        has_rows=matrix.rows is not None,
        has_zeros=matrix.zeros is not None,
        has_factors=matrix.factors is not None,
        native=values.is_cuda and torch.cuda.get_device_capability(values.device) >= (8, 9),
    )
    optional = (matrix.zeros, matrix.factors, matrix.rows)
    zeros, factors, scale_row = (values if one is None else one for one in optional)
    return (values, matrix.scales, zeros, factors, scale_row), form


_UP_120, _UP_126 = tl.constexpr(2.0**120), tl.constexpr(2.0**126)


@triton.jit
def scale_rows(r_ptr, expert, n, ok, FORM: tl.constexpr):
    """Which rows of the scales are those of rows `n` of an expert."""
    row = n
    if FORM.has_rows:
        row = tl.load(r_ptr + n, mask=ok, other=0)
    return expert * FORM.scale_rows + row


@triton.jit
def row_factors(s_ptr, f_ptr, row, s_row, ok, FORM: tl.constexpr):
    """What the products of whole rows are still to be multiplied by, float32; called where `row_scaled`."""
    factor = tl.full(row.shape, 1.0, tl.float32)
    if FORM.kind != "" and FORM.scale_columns == 1:
        factor *= _floats(tl.load(s_ptr + s_row, mask=ok, other=0), FORM)
    if FORM.has_factors:
        factor *= tl.load(f_ptr + row, mask=ok, other=0.0)
    return factor


@triton.jit
def ask_for(w_ptr, row, k0, FORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask the L2 cache for a tile of rows [N] of a matrix."""
    SIZE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    HALF: tl.constexpr = 2 if FORM.kind == "uint4" or FORM.kind == "e2m1" else 1
    LINE: tl.constexpr = 128 // SIZE
    LINES: tl.constexpr = (BLOCK_K // HALF + LINE - 1) // LINE
    LAST: tl.constexpr = (FORM.inputs + HALF - 1) // HALF - 1
    column = tl.minimum(k0 // HALF + tl.arange(0, LINES) * LINE, LAST)
    prefetch(w_ptr + row[:, None] * (LAST + 1) + column[None, :])


@triton.jit
def load_tile(
    w_ptr,
    s_ptr,
    z_ptr,
    row,  # [N] int64
    s_row,  # [N]
    ok,  # [N], which rows are to be read
    k0,  # the first of its columns, a multiple of BLOCK_K
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond the last column, and every row is to be read
):
    """[N, BLOCK_K]: numbers as they are stored, or in float32 what codes stand for but for `row_factors`. Zeros where
    nothing is to be read."""
    if FORM.kind == "uint4" or FORM.kind == "e2m1":
        BYTES: tl.constexpr = (FORM.inputs + 1) // 2
        column = k0 // 2 + tl.arange(0, BLOCK_K // 2)
        pointers = w_ptr + row[:, None] * BYTES + column[None, :]
        mask = ok[:, None] & (column < BYTES)[None, :]
    else:
        column = k0 + tl.arange(0, BLOCK_K)
        pointers = w_ptr + row[:, None] * FORM.inputs + column[None, :]
        mask = ok[:, None] & (column < FORM.inputs)[None, :]
    if WHOLE:
        values = tl.load(pointers, eviction_policy="evict_first")
    else:
        values = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    if FORM.kind != "":
        values = _numbers(values, FORM)
        if FORM.has_zeros:
            zeros = _spread(z_ptr, s_row, ok, k0, row.shape[0], FORM, BLOCK_K, True)
            values -= zeros
        elif FORM.zero != 0:
            values -= FORM.zero
        if FORM.scale_columns > 1:
            values *= _spread(s_ptr, s_row, ok, k0, row.shape[0], FORM, BLOCK_K, False)
        if not WHOLE:  # beyond the last column a code may stand for something
            columns = k0 + tl.arange(0, BLOCK_K)
            values = tl.where(ok[:, None] & (columns < FORM.inputs)[None, :], values, 0.0)
    return values


@triton.jit
def _numbers(values, FORM: tl.constexpr):
    """What codes stand for before zeros and scales, in float32; two of a byte side by side."""
    if FORM.kind == "int8":
        found = values.to(tl.float32)
    elif FORM.kind == "e4m3":
        if FORM.native:
            found = values.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            bits = values.to(tl.int32)
            found = ((bits & 128) << 24 | (bits & 127) << 20).to(tl.float32, bitcast=True) * _UP_120
    else:
        codes = tl.interleave(values & 15, values >> 4)
        if FORM.kind == "uint4":
            found = codes.to(tl.float32)
        else:  # its exponent and mantissa at the low end of a float32's, whose bias is 126 more
            bits = codes.to(tl.int32)
            found = ((bits & 8) << 28 | (bits & 7) << 22).to(tl.float32, bitcast=True) * _UP_126
    return found


@triton.jit
def _floats(scales, FORM: tl.constexpr):
    """Scales in float32 (`codes.as_floats`)."""
    if FORM.exponents:
        bits = scales.to(tl.int32)
        found = tl.where(bits == 0, 0x400000, bits << 23)
        found = tl.where(bits == 255, 0x7FC00000, found).to(tl.float32, bitcast=True)
    else:
        found = scales.to(tl.float32)
    return found


@triton.jit
def _spread(ptr, s_row, ok, k0, N: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr, ZEROS: tl.constexpr):
    """Scales (or zeros) of a tile: [N, 1] where its columns share them, else [N, BLOCK_K]."""
    rows = ptr + s_row[:, None] * FORM.scale_columns
    if FORM.scale_columns == 1:
        found = tl.load(rows, mask=ok[:, None], other=0)
    elif FORM.first == 0 and FORM.unit % BLOCK_K == 0:
        found = tl.load(rows + k0 // FORM.unit, mask=ok[:, None], other=0)
    elif FORM.first == 0 and BLOCK_K % FORM.unit == 0:
        UNITS: tl.constexpr = BLOCK_K // FORM.unit
        column = k0 // FORM.unit + tl.arange(0, UNITS)
        found = tl.load(rows + column[None, :], mask=ok[:, None] & (column < FORM.scale_columns)[None, :], other=0)
        found = tl.broadcast_to(found[:, :, None], [N, UNITS, FORM.unit])
        found = tl.reshape(found, [N, BLOCK_K])
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        column = (k + FORM.first) // FORM.unit
        found = tl.load(rows + column[None, :], mask=ok[:, None] & (k < FORM.inputs)[None, :], other=0)
    if ZEROS:
        found = found.to(tl.float32)
    else:
        found = _floats(found, FORM)
    return found
