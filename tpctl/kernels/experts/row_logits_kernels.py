"""The first launch of `row_ring`: norm and logits of one row."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.routing_kernels import leave_logits


@triton.jit
def row_logits_kernel(
    x_ptr,
    gate_ptr,  # [COUNT, IN_FEATURES]
    bias_ptr,
    norm_ptr,
    logits_ptr,  # [COUNT] float32
    normed_ptr,  # [IN_FEATURES], in pieces of 8, as chunks of SIZE inputs are read (`row_ring_cut`)
    eps,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of BLOCK_N experts; the first program leaves the normed row, which may not be x itself."""
    block = tl.program_id(0)
    x = leave_logits(x_ptr, gate_ptr, bias_ptr, gate_ptr, norm_ptr, logits_ptr, normed_ptr, block, False, eps,
                     IN_FEATURES, HAS_BIAS, False, HAS_NORM, UNIT_OFFSET, COUNT, BLOCK_N, BLOCK_K, PDL)  # fmt: skip
    if block == 0:
        k = tl.arange(0, BLOCK_K)
        place = (k % SIZE // 8 * (IN_FEATURES // SIZE) + k // SIZE) * 8 + k % 8
        tl.store(normed_ptr + place, x, mask=k < IN_FEATURES)
