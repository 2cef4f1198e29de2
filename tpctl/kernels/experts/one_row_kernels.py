"""The device code of `one_row`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.experts.finish import finish
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.routing_kernels import choose_of, leave_logits
from tpctl.kernels.experts.tiles import load_tile, row_factors, scale_rows


@triton.jit
def _of_slots(ptr, PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr):
    """What there is for each slot. Loaded in the loop over tiles, it would keep their copies from being far ahead."""
    slot = tl.arange(0, SLOTS)
    return tl.load(ptr + slot, mask=slot < PER_TOKEN, other=0)


@triton.jit
def _of_slot(values, slot):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == slot, values, 0), 0)


@triton.jit
def _gate_up(
    x_ptr,  # [inputs]
    ids_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    f_ptr,
    r_ptr,
    bias_ptr,
    out_ptr,  # [PER_TOKEN, WIDTH]
    first,
    count,
    FORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,  # PER_TOKEN, or the next power of two; 0: of one MLP, with no ids
    HAS_BIAS: tl.constexpr,
    GATING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program's tiles of BLOCK_N features of all chosen experts, in one loop over their parts of BLOCK_K inputs;
    experts of other ranks are not read."""
    WIDTH: tl.constexpr = FORM.outputs // 2
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS * PER_TOKEN
    PARTS: tl.constexpr = (FORM.inputs + BLOCK_K - 1) // BLOCK_K
    WHOLE: tl.constexpr = SLOTS == 0 and WIDTH % BLOCK_N == 0 and FORM.inputs % BLOCK_K == 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    mine = (TILES - program + programs - 1) // programs
    k = tl.arange(0, BLOCK_K)
    if PARTS == 1:
        x = tl.load(x_ptr + k, mask=k < FORM.inputs, other=0.0)
    if SLOTS > 0:
        ids = _of_slots(ids_ptr, PER_TOKEN, SLOTS)
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in tl.range(0, mine * PARTS, num_stages=STAGES):
        tile, k0 = program + step // PARTS * programs, step % PARTS * BLOCK_K
        n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = n < WIDTH
        wide = tl.full([], 0, tl.int64)
        if SLOTS > 0:
            expert = _of_slot(ids, tile // BLOCKS) - first
            here = (expert >= 0) & (expert < count)
            ok = ok & here
            wide = tl.where(here, expert, 0).to(tl.int64)
        n_safe = tl.minimum(n, WIDTH - 1)
        if INTERLEAVED:
            gate_n, up_n = 2 * n_safe, 2 * n_safe + 1
        else:
            gate_n, up_n = n_safe, n_safe + WIDTH
        gate_row, up_row = wide * FORM.outputs + gate_n, wide * FORM.outputs + up_n
        gate_scales = scale_rows(r_ptr, wide, gate_n, ok, FORM)
        up_scales = scale_rows(r_ptr, wide, up_n, ok, FORM)
        gate_w = load_tile(w_ptr, s_ptr, z_ptr, gate_row, gate_scales, ok, k0, FORM, BLOCK_K, WHOLE)
        up_w = load_tile(w_ptr, s_ptr, z_ptr, up_row, up_scales, ok, k0, FORM, BLOCK_K, WHOLE)
        if PARTS > 1:
            x = tl.load(x_ptr + k0 + k, mask=k0 + k < FORM.inputs, other=0.0)
        wide_x = x.to(tl.float32)[None, :]
        gate = tl.where(k0 == 0, 0.0, gate) + gate_w.to(tl.float32) * wide_x
        up = tl.where(k0 == 0, 0.0, up) + up_w.to(tl.float32) * wide_x
        if k0 + BLOCK_K >= FORM.inputs:
            gate_sum = tl.sum(gate, 1) * row_factors(s_ptr, f_ptr, gate_row, gate_scales, ok, FORM)
            up_sum = tl.sum(up, 1) * row_factors(s_ptr, f_ptr, up_row, up_scales, ok, FORM)
            if HAS_BIAS:
                gate_sum += tl.load(bias_ptr + gate_row, mask=ok, other=0.0).to(tl.float32)
                up_sum += tl.load(bias_ptr + up_row, mask=ok, other=0.0).to(tl.float32)
            value = gated(gate_sum, up_sum, GATING)
            tl.store(out_ptr + tile // BLOCKS * WIDTH + n, value.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _add_products(total, w, h_ptr, here, factor, k0, INPUTS: tl.constexpr):
    """`total` [N, BLOCK_K] plus a tile of weights times h, which another program may just have written."""
    k = k0 + tl.arange(0, total.shape[1])
    h = tl.load(h_ptr + k, mask=(k < INPUTS) & here, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total + w.to(tl.float32) * (h[None, :] * factor[:, None])


@triton.jit
def _down(
    block,
    h_ptr,  # [PER_TOKEN, inputs]
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
    first,
    count,
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N outputs: the shared expert, then all chosen ones in the order of their slots, in one loop over their
    parts of BLOCK_K inputs; experts of other ranks are not read."""
    PARTS: tl.constexpr = (FORM.inputs + BLOCK_K - 1) // BLOCK_K
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < FORM.outputs
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    row = tl.minimum(n, FORM.outputs - 1).to(tl.int64)
    if SHARED_FORM is not None:
        factor = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr)
        for k0 in tl.range(0, SHARED_FORM.inputs, BLOCK_K, num_stages=STAGES):
            w = load_tile(shared_ptr, shared_ptr, shared_ptr, row, row, ok, k0, SHARED_FORM, BLOCK_K, False)
            total = _add_products(total, w, shared_h_ptr, True, factor, k0, SHARED_FORM.inputs)
    ids, weights = _of_slots(ids_ptr, PER_TOKEN, SLOTS), _of_slots(weights_ptr, PER_TOKEN, SLOTS)
    scale_row = scale_rows(r_ptr, 0, row, ok, FORM)
    for step in tl.range(0, PER_TOKEN * PARTS, num_stages=STAGES):
        slot, k0 = step // PARTS, step % PARTS * BLOCK_K
        expert = _of_slot(ids, slot) - first
        here = (expert >= 0) & (expert < count)
        wide = tl.where(here, expert, 0).to(tl.int64)
        expert_row = wide * FORM.outputs + row
        s_row = wide * FORM.scale_rows + scale_row
        w = load_tile(w_ptr, s_ptr, z_ptr, expert_row, s_row, ok & here, k0, FORM, BLOCK_K, False)
        weight = tl.where(here, _of_slot(weights, slot), 0.0)
        factor = weight * row_factors(s_ptr, f_ptr, expert_row, s_row, ok & here, FORM)
        total = _add_products(total, w, h_ptr + slot * FORM.inputs, here, factor, k0, FORM.inputs)
        if HAS_BIAS:
            now = ok & here & (k0 == 0)
            bias += weight * tl.load(bias_ptr + expert_row, mask=now, other=0.0).to(tl.float32)
    return tl.sum(total, 1) + bias


@triton.jit
def one_row_kernel(
    x_ptr,
    gate_ptr,
    gate_bias_ptr,
    shared_gate_ptr,
    norm_ptr,
    correction_ptr,
    up_w_ptr,
    up_s_ptr,
    up_z_ptr,
    up_f_ptr,
    up_r_ptr,
    up_bias_ptr,
    down_w_ptr,
    down_s_ptr,
    down_z_ptr,
    down_f_ptr,
    down_r_ptr,
    down_bias_ptr,
    shared_up_ptr,
    shared_down_ptr,
    logits_ptr,  # [COUNT + 1]
    normed_ptr,  # [programs, IN_FEATURES]
    ids_ptr,  # [programs, PER_TOKEN]
    weights_ptr,
    factors_ptr,  # [programs]
    h_ptr,  # [PER_TOKEN, width]
    shared_h_ptr,
    out_ptr,
    residual_ptr,
    peers_ptr,
    epochs_ptr,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    eps,
    first,
    count,
    IN_FEATURES: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_SHARED_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    SCORES: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    COUNT: tl.constexpr,  # of all ranks' experts
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COPIES: tl.constexpr,
    UP_FORM: tl.constexpr,
    DOWN_FORM: tl.constexpr,
    SHARED_UP_FORM: tl.constexpr,  # None: there is no shared expert
    SHARED_DOWN_FORM: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    GATING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATE_N: tl.constexpr,  # experts whose logits a program computes
    GATE_K: tl.constexpr,
    UP_N: tl.constexpr,
    UP_K: tl.constexpr,
    UP_STAGES: tl.constexpr,
    DOWN_N: tl.constexpr,
    DOWN_K: tl.constexpr,
    DOWN_STAGES: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
    STAGE: tl.constexpr,  # 1: logits, and gate_up of the shared expert; 2: choice and gate_up; 3: down
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    if HAS_NORM:
        normed_ptr += program * IN_FEATURES
        own_x_ptr = normed_ptr
    else:
        own_x_ptr = x_ptr
    ids_ptr += program * PER_TOKEN
    weights_ptr += program * PER_TOKEN
    if PDL and STAGE > 1:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if STAGE == 1:
        leave_logits(x_ptr, gate_ptr, gate_bias_ptr, shared_gate_ptr, norm_ptr, logits_ptr, normed_ptr, program, True,
                     eps, IN_FEATURES, HAS_GATE_BIAS, HAS_SHARED_GATE, HAS_NORM, UNIT_OFFSET, COUNT, GATE_N, GATE_K,
                     PDL)  # fmt: skip
        if SHARED_UP_FORM is not None:
            tl.debug_barrier()
            _gate_up(own_x_ptr, ids_ptr, shared_up_ptr, shared_up_ptr, shared_up_ptr, shared_up_ptr, shared_up_ptr,
                     shared_up_ptr, shared_h_ptr, 0, 0, SHARED_UP_FORM, 1, 0, False, "silu", False, UP_N, UP_K,
                     UP_STAGES)  # fmt: skip
    if STAGE == 2:
        choose_of(logits_ptr, correction_ptr, ids_ptr, weights_ptr, factors_ptr + program, HAS_SHARED_GATE, SCORES,
                  RENORMALISE, HAS_CORRECTION, GROUPS, TOP_GROUPS, SCALE, EPSILON, COUNT, PER_TOKEN, ROWS,
                  SIZE, COPIES)  # fmt: skip
        tl.debug_barrier()
        _gate_up(own_x_ptr, ids_ptr, up_w_ptr, up_s_ptr, up_z_ptr, up_f_ptr, up_r_ptr, up_bias_ptr, h_ptr, first,
                 count, UP_FORM, PER_TOKEN, SLOTS, HAS_UP_BIAS, GATING, INTERLEAVED, UP_N, UP_K, UP_STAGES)  # fmt: skip
    if STAGE == 3:
        for block in range(program, (DOWN_FORM.outputs + DOWN_N - 1) // DOWN_N, tl.num_programs(0)):
            value = _down(block, h_ptr, shared_h_ptr, ids_ptr, weights_ptr, factors_ptr + program, down_w_ptr,
                          down_s_ptr, down_z_ptr, down_f_ptr, down_r_ptr, down_bias_ptr, shared_down_ptr, first, count,
                          DOWN_FORM, SHARED_DOWN_FORM, HAS_DOWN_BIAS, HAS_SHARED_GATE, PER_TOKEN, SLOTS, DOWN_N, DOWN_K,
                          DOWN_STAGES)  # fmt: skip
            finish(value[None, :], tl.arange(0, 1), block, 1, out_ptr, residual_ptr, peers_ptr, epochs_ptr, out_stride,
                   residual_stride, row_words, plane_words, DOWN_FORM.outputs, HAS_RESIDUAL, RANK, WORLD,
                   PEERS)  # fmt: skip
