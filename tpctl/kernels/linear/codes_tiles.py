"""What kernels that read codes share: what they are compiled for, where scales lie, numbers made in float32."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tpctl.kernels.common.codes import Kind
from tpctl.kernels.common.codes_kernels import code_float, e4m3_float, scale_float


class Form(NamedTuple):
    """What a kernel is compiled for of the codes that it reads.

    Attributes:
        fast: operands are bfloat16 and numbers are made by bits; of packed kinds, x comes in words of two inputs.
        columns, unit, first: as `Codes` has them.
        scale_columns: C.
        scales: "floats", or bytes of "e8m0" or "e4m3".
        mode: where scales come in: "end", after all sums (one for a row); "tile", on a tile's sums (one for its part
            of a row); "inside", each for a power of two of a tile's inputs; "each", looked up for every input.
    """

    kind: Kind
    fast: bool
    mode: str
    columns: int
    unit: int
    first: int
    scale_columns: int
    scales: str
    has_zeros: bool
    zero: int
    has_groups: bool
    has_rows: bool
    has_factors: bool

    @property
    def packed(self) -> bool:
        return self.kind in ("uint4", "e2m1")

    @property
    def row_bytes(self) -> int:
        return -(-self.columns // 2) if self.packed else self.columns

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row that a scale is for."""
        return self.unit // 2 if self.packed else self.unit

    @property
    def first_bytes(self) -> int:
        return self.first // 2 if self.packed else self.first


@triton.jit
def as_zero(zero, KIND: tl.constexpr):
    if KIND == "e4m3":
        number = e4m3_float(zero)
    elif zero.dtype == tl.uint8 and KIND == "int8":
        number = zero.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        number = zero.to(tl.float32)
    return number


@triton.jit
def tile_scales(s_rows, z_rows, at, FORM: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr):
    """Scales and zeros, float32 [N, GROUPS], of a tile that begins at byte ``at``; s_rows, z_rows [N, 1]: where a
    row's own begin."""
    KIND: tl.constexpr = FORM.kind
    SCALES: tl.constexpr = FORM.scales
    column = tl.arange(0, GROUPS)
    if FORM.mode != "end":
        column = (column * (BYTES // GROUPS) + at + FORM.first_bytes) // FORM.scale_bytes
        column = tl.minimum(column, FORM.scale_columns - 1)
    scale = scale_float(tl.load(s_rows + column[None, :]), SCALES)
    if FORM.has_zeros:
        zero = as_zero(tl.load(z_rows + column[None, :]), KIND)
    else:
        zero = tl.full(scale.shape, FORM.zero, tl.float32)
    return scale, zero


@triton.jit
def along(value, BYTES: tl.constexpr):
    """[N, GROUPS] as [N, BYTES], each as often as it holds."""
    wide: tl.constexpr = BYTES // value.shape[1]
    spread = tl.broadcast_to(value[:, :, None], [value.shape[0], value.shape[1], wide])
    return tl.reshape(spread, [value.shape[0], BYTES])


@triton.jit
def number(code, s_rows, z_rows, groups_ptr, k, scale, zero, FORM: tl.constexpr):
    """Codes [N, BYTES] of inputs k as float32 numbers, scaled if mode is "inside" or "each"."""
    KIND: tl.constexpr = FORM.kind
    SCALES: tl.constexpr = FORM.scales
    value = code_float(code, KIND)
    if FORM.mode == "each":
        if FORM.has_groups:
            column = tl.load(groups_ptr + k, mask=k < FORM.columns, other=0)[None, :]
        else:
            column = tl.minimum((k + FORM.first) // FORM.unit, FORM.scale_columns - 1)[None, :]
        if FORM.has_zeros:
            value -= as_zero(tl.load(z_rows + column), KIND)
        else:
            value -= FORM.zero
        value *= scale_float(tl.load(s_rows + column), SCALES)
    else:
        if FORM.has_zeros or FORM.zero != 0:
            value -= along(zero, value.shape[1])
        if FORM.mode == "inside":
            value *= along(scale, value.shape[1])
    return value


@triton.jit
def code_rows(w_ptr, scales_ptr, zeros_ptr, rows_ptr, n, FORM: tl.constexpr):
    """Where the codes, scales and zeros of outputs n begin, each [N, 1]."""
    row = tl.load(rows_ptr + n) if FORM.has_rows else n
    offset = row.to(tl.int64)[:, None] * FORM.scale_columns
    return w_ptr + n.to(tl.int64)[:, None] * FORM.row_bytes, scales_ptr + offset, zeros_ptr + offset
