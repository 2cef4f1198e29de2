"""What `wide_gemm` launches before and behind its products: x in the order of the codes, and the sums of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.activation import act
from tpctl.kernels.common.codes_kernels import planes


@triton.jit
def _normed(words, weights, scale, UNIT_OFFSET: tl.constexpr):
    """Words of two inputs times their row's scale and the norm's weights, rounded as `rms_norm` does."""
    even, odd = planes(words)
    even_weight, odd_weight = planes(weights)
    even, odd = even.to(tl.float32) * scale, odd.to(tl.float32) * scale
    if UNIT_OFFSET:
        even *= 1.0 + even_weight.to(tl.float32)
        odd *= 1.0 + odd_weight.to(tl.float32)
    else:
        even = even.to(tl.bfloat16).to(tl.float32) * even_weight.to(tl.float32)
        odd = odd.to(tl.bfloat16).to(tl.float32) * odd_weight.to(tl.float32)
    low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _squares(words):
    even, odd = planes(words)
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    return even * even + odd * odd


@triton.jit
def reorder_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    x_stride,
    columns,
    eps,
    HAS_NORM: tl.constexpr,  # BLOCK is then all of a row
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Groups of 128 inputs, in words of two, in the order in which threads of `wide_gemm_kernels` have their codes.

    An input's place in its group, by bits: q q w w e p h before, p w w h q q e after."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < columns // 4
    plane, word, q = at // 16 % 2, at // 4 % 4, at % 4
    group = at // 32 * 64
    source = group + q * 16 + word * 4 + plane
    if HAS_NORM:
        first_weight = tl.load(norm_ptr + source, mask=ok, other=0)
        second_weight = tl.load(norm_ptr + source + 2, mask=ok, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first = tl.load(x_ptr + row * x_stride + source, mask=ok, other=0)
    second = tl.load(x_ptr + row * x_stride + source + 2, mask=ok, other=0)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(_squares(first) + _squares(second), 0) / columns + eps)
        first = _normed(first, first_weight, scale, UNIT_OFFSET)
        second = _normed(second, second_weight, scale, UNIT_OFFSET)
    to = out_ptr + row * (columns // 2) + group + plane * 32 + word * 8 + q
    tl.store(to, (first & 0xFFFF) | (second << 16), mask=ok)
    tl.store(to + 4, (first >> 16 & 0xFFFF) | (second & -65536), mask=ok)


@triton.jit
def _total(parts_ptr, n, t, outputs, held, ok, SPLIT: tl.constexpr):
    at = n.to(tl.int64)[:, None] * held + t[None, :]
    total = tl.load(parts_ptr + at, mask=ok, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + part * (outputs.to(tl.int64) * held) + at, mask=ok, other=0.0)
    return total


@triton.jit
def _one_number(total, n, scales_ptr, rows_ptr, factors_ptr, bias_ptr, CUT: tl.constexpr):
    """With what is one number of an output."""
    if not CUT.scaled:
        row = tl.load(rows_ptr + n) if CUT.form.has_rows else n
        total *= tl.load(scales_ptr + row).to(tl.float32)[:, None]
    if CUT.form.has_factors:
        total *= tl.load(factors_ptr + n)[:, None]
    if CUT.has_bias:
        total += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["rows"])
def add_wide_parts_kernel(
    parts_ptr,  # float32 [SPLIT, N, held]
    scales_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    outputs,  # N, or half of it
    held,
    out_stride,
    residual_stride,
    CUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (n < outputs)[:, None] & (t < held)[None, :]
    n_safe = tl.minimum(n, outputs - 1)
    if CUT.pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ACTIVATION: tl.constexpr = CUT.activation
    dtype = out_ptr.dtype.element_ty
    if not CUT.gated:
        total = _total(parts_ptr, n, t, outputs, held, ok, CUT.split)
        total = _one_number(total, n_safe, scales_ptr, rows_ptr, factors_ptr, bias_ptr, CUT)
    else:
        gate = _total(parts_ptr, n, t, 2 * outputs, held, ok, CUT.split)
        gate = _one_number(gate, n_safe, scales_ptr, rows_ptr, factors_ptr, bias_ptr, CUT)
        up = _total(parts_ptr, n + outputs, t, 2 * outputs, held, ok, CUT.split)
        up = _one_number(up, n_safe + outputs, scales_ptr, rows_ptr, factors_ptr, bias_ptr, CUT)
        gate = act(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
        total = gate * up.to(dtype).to(tl.float32)
    result = tl.trans(total.to(dtype))
    row, some = t.to(tl.int64)[:, None], (t < rows)[:, None] & (n < outputs)[None, :]
    if CUT.has_residual:
        residual = tl.load(residual_ptr + row * residual_stride + n[None, :], mask=some, other=0.0)
        result = (result.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row * out_stride + n[None, :], result, mask=some)
