"""The device code of `one_row`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.finish import finish
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.tiles import ask_for, load_tile, row_factors, scale_rows


@triton.jit
def _gate_up_tile(
    gate_sum,
    up_sum,
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    gate_row,
    gate_scales,
    up_row,
    up_scales,
    ok,
    k0,
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    gate = load_tile(w_ptr, s_ptr, z_ptr, gate_row, gate_scales, ok, k0, FORM, BLOCK_K, False)
    up = load_tile(w_ptr, s_ptr, z_ptr, up_row, up_scales, ok, k0, FORM, BLOCK_K, False)
    k = k0 + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k, mask=k < FORM.inputs, other=0.0).to(tl.float32)
    return gate_sum + gate.to(tl.float32) * x[None, :], up_sum + up.to(tl.float32) * x[None, :]


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    gate_row,  # [N] int64, rows of all experts, and of their scales; the same of the up half
    gate_scales,
    up_row,
    up_scales,
    ok,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of x with BLOCK_N rows of a gate and of its up half."""
    TILES: tl.constexpr = (FORM.inputs + BLOCK_K - 1) // BLOCK_K
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if TILES == 1:
        gate, up = _gate_up_tile(gate, up, x_ptr, w_ptr, s_ptr, z_ptr, gate_row, gate_scales, up_row, up_scales, ok, 0,
                                 FORM, BLOCK_K)  # fmt: skip
    else:
        for i in tl.range(0, TILES, num_stages=STAGES):
            gate, up = _gate_up_tile(gate, up, x_ptr, w_ptr, s_ptr, z_ptr, gate_row, gate_scales, up_row, up_scales,
                                     ok, i * BLOCK_K, FORM, BLOCK_K)  # fmt: skip
    return tl.sum(gate, 1), tl.sum(up, 1)


@triton.jit
def one_row_gate_up_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    f_ptr,
    r_ptr,
    bias_ptr,
    shared_ptr,
    out_ptr,  # [K, WIDTH]
    shared_out_ptr,
    first,
    count,
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,  # None: there is no shared expert
    HAS_BIAS: tl.constexpr,
    GATING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of a chosen expert, or of the shared one, whose programs come first: they need no router."""
    WIDTH: tl.constexpr = FORM.outputs // 2
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    SHARED: tl.constexpr = 0 if SHARED_FORM is None else (SHARED_FORM.outputs // 2 + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if program < SHARED:
        if SHARED_FORM is not None:
            n = program * BLOCK_N + tl.arange(0, BLOCK_N)
            ok = n < SHARED_FORM.outputs // 2
            row = tl.minimum(n, SHARED_FORM.outputs // 2 - 1).to(tl.int64)
            up_row = row + SHARED_FORM.outputs // 2
            if PDL:
                ask_for(shared_ptr, row, 0, SHARED_FORM, BLOCK_K)
                ask_for(shared_ptr, up_row, 0, SHARED_FORM, BLOCK_K)
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            gate, up = _gate_up(x_ptr, shared_ptr, shared_ptr, shared_ptr, row, row, up_row, row, ok, SHARED_FORM,
                                BLOCK_N, BLOCK_K, STAGES)  # fmt: skip
            tl.store(shared_out_ptr + n, gated(gate, up, "silu").to(shared_out_ptr.dtype.element_ty), mask=ok)
    else:
        slot = (program - SHARED) // BLOCKS
        n = (program - SHARED) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        if PDL:
            tl.extra.cuda.gdc_wait()
        expert = tl.load(ids_ptr + slot) - first
        if PDL:  # only now: the kernel that follows reads the ids before its own wait
            tl.extra.cuda.gdc_launch_dependents()
        if (expert >= 0) & (expert < count):
            ok = n < WIDTH
            if INTERLEAVED:
                gate_n, up_n = 2 * n, 2 * n + 1
            else:
                gate_n, up_n = n, n + WIDTH
            wide = expert.to(tl.int64)
            gate_row, up_row = wide * FORM.outputs + gate_n, wide * FORM.outputs + up_n
            gate_scales = scale_rows(r_ptr, wide, gate_n, ok, FORM)
            up_scales = scale_rows(r_ptr, wide, up_n, ok, FORM)
            gate, up = _gate_up(x_ptr, w_ptr, s_ptr, z_ptr, gate_row, gate_scales, up_row, up_scales, ok, FORM,
                                BLOCK_N, BLOCK_K, STAGES)  # fmt: skip
            gate *= row_factors(s_ptr, f_ptr, gate_row, gate_scales, ok, FORM)
            up *= row_factors(s_ptr, f_ptr, up_row, up_scales, ok, FORM)
            if HAS_BIAS:
                gate += tl.load(bias_ptr + gate_row, mask=ok, other=0.0).to(tl.float32)
                up += tl.load(bias_ptr + up_row, mask=ok, other=0.0).to(tl.float32)
            value = gated(gate, up, GATING)
            tl.store(out_ptr + slot * WIDTH + n, value.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _add_products(total, w, h_ptr, here, factor, k0, FORM: tl.constexpr):
    """`total` [N, BLOCK_K] plus a tile of weights times h, which every row of lanes reads for itself."""
    k = k0 + tl.arange(0, total.shape[1])[None, :] + tl.zeros([total.shape[0], 1], tl.int32)
    h = tl.load(h_ptr + k, mask=(k < FORM.inputs) & here, other=0.0).to(tl.float32)
    return total + w.to(tl.float32) * (h * factor[:, None])


@triton.jit
def one_row_down_kernel(
    h_ptr,  # [K, WIDTH]
    shared_h_ptr,
    ids_ptr,
    weights_ptr,
    factor_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    f_ptr,
    r_ptr,
    bias_ptr,
    shared_ptr,
    out_ptr,
    residual_ptr,
    peers_ptr,
    epochs_ptr,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    first,
    count,
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs: the shared expert, then all chosen ones in the order of their slots, in one loop over their
    tiles; experts of other ranks are not read. While it waits for h it asks the L2 cache for PREFETCH tiles."""
    TILES: tl.constexpr = (FORM.inputs + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < FORM.outputs
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    row = tl.minimum(n, FORM.outputs - 1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if SHARED_FORM is not None:
            ask_for(shared_ptr, row, 0, SHARED_FORM, BLOCK_K)
        for step in tl.static_range(PREFETCH):
            expert = tl.load(ids_ptr + step // TILES) - first
            if (expert >= 0) & (expert < count):
                expert_row = expert.to(tl.int64) * FORM.outputs + row
                ask_for(w_ptr, expert_row, step % TILES * BLOCK_K, FORM, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    if SHARED_FORM is not None:
        factor = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr)
        for k0 in tl.range(0, SHARED_FORM.inputs, BLOCK_K, num_stages=STAGES):
            w = load_tile(shared_ptr, shared_ptr, shared_ptr, row, row, ok, k0, SHARED_FORM, BLOCK_K, False)
            total = _add_products(total, w, shared_h_ptr, True, factor, k0, SHARED_FORM)
    for step in tl.range(0, PER_TOKEN * TILES, num_stages=STAGES):
        slot, k0 = step // TILES, step % TILES * BLOCK_K
        expert = tl.load(ids_ptr + slot) - first
        here = (expert >= 0) & (expert < count)
        wide = tl.where(here, expert, 0).to(tl.int64)
        expert_row = wide * FORM.outputs + row
        s_row = scale_rows(r_ptr, wide, row, ok & here, FORM)
        w = load_tile(w_ptr, s_ptr, z_ptr, expert_row, s_row, ok & here, k0, FORM, BLOCK_K, False)
        weight = tl.where(here, tl.load(weights_ptr + slot), 0.0)
        factor = weight * row_factors(s_ptr, f_ptr, expert_row, s_row, ok & here, FORM)
        total = _add_products(total, w, h_ptr + slot * FORM.inputs, here, factor, k0, FORM)
        if HAS_BIAS:
            now = ok & here & (k0 == 0)
            bias += weight * tl.load(bias_ptr + expert_row, mask=now, other=0.0).to(tl.float32)
    value = (tl.sum(total, 1) + bias)[None, :]
    finish(value, tl.arange(0, 1), block, 1, out_ptr, residual_ptr, peers_ptr, epochs_ptr, out_stride, residual_stride,
           row_words, plane_words, FORM.outputs, HAS_RESIDUAL, RANK, WORLD, PEERS)  # fmt: skip
