"""The device code of `one_row`."""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.prefetch import prefetch
from tpctl.kernels.experts.finish import finish
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.routing_kernels import leave_factor, leave_logits, left_logits, ranked, weighed
from tpctl.kernels.experts.tiles import load_parts, load_tile


@triton.constexpr_function
def _lanes(block_k, itemsize):
    """Columns that a warp reads at once, of 16 bytes a thread."""
    return min(block_k, 512 // itemsize)


@triton.jit
def _of_slots(ptr, PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr):
    """What there is for each slot. Loaded in the loop over tiles, it would keep their copies from being far ahead."""
    slot = tl.arange(0, SLOTS)
    return tl.load(ptr + slot, mask=slot < PER_TOKEN, other=0)


@triton.jit
def _of_slot(values, slot):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == slot, values, 0), 0)


@triton.jit
def _all_inputs(x_ptr, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr, ITEMSIZE: tl.constexpr):
    """x as `_gate_up` multiplies it, if it has it all at once; else nothing."""
    x = tl.zeros([1, 1], x_ptr.dtype.element_ty)
    if BLOCK_K >= INPUTS:
        LANES: tl.constexpr = _lanes(BLOCK_K, ITEMSIZE)
        k = tl.arange(0, BLOCK_K // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        x = tl.load(x_ptr + k, mask=k < INPUTS, other=0.0)
    return x


@triton.jit
def _gate_up(
    x,  # what `_all_inputs` gives
    x_ptr,  # [inputs]
    ids_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,  # [PER_TOKEN, WIDTH]
    first,
    count,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
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
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS * PER_TOKEN
    PARTS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    WHOLE: tl.constexpr = SLOTS == 0 and WIDTH % BLOCK_N == 0 and INPUTS % BLOCK_K == 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    mine = (TILES - program + programs - 1) // programs
    LANES: tl.constexpr = _lanes(BLOCK_K, w_ptr.dtype.element_ty.itemsize)
    k = tl.arange(0, BLOCK_K // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if SLOTS > 0:
        ids = _of_slots(ids_ptr, PER_TOKEN, SLOTS)
    gate = tl.zeros([BLOCK_N, LANES], tl.float32)
    up = tl.zeros([BLOCK_N, LANES], tl.float32)
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
        gate_row, up_row = wide * (2 * WIDTH) + gate_n, wide * (2 * WIDTH) + up_n
        gate_w = load_parts(w_ptr, gate_row, ok, k0, INPUTS, BLOCK_K // LANES, LANES, WHOLE)
        up_w = load_parts(w_ptr, up_row, ok, k0, INPUTS, BLOCK_K // LANES, LANES, WHOLE)
        if PARTS > 1:
            wide_x = tl.load(x_ptr + k0 + k, mask=k0 + k < INPUTS, other=0.0).to(tl.float32)[None, :, :]
        else:
            wide_x = x.to(tl.float32)[None, :, :]
        gate = tl.where(k0 == 0, 0.0, gate) + tl.sum(gate_w.to(tl.float32) * wide_x, 1)
        up = tl.where(k0 == 0, 0.0, up) + tl.sum(up_w.to(tl.float32) * wide_x, 1)
        if k0 + BLOCK_K >= INPUTS:
            gate_sum, up_sum = tl.sum(gate, 1), tl.sum(up, 1)
            if HAS_BIAS:
                gate_sum += tl.load(bias_ptr + gate_row, mask=ok, other=0.0).to(tl.float32)
                up_sum += tl.load(bias_ptr + up_row, mask=ok, other=0.0).to(tl.float32)
            value = gated(gate_sum, up_sum, GATING)
            tl.store(out_ptr + tile // BLOCKS * WIDTH + n, value.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _ask_for_down(
    block,
    ids_ptr,
    w_ptr,
    first,
    count,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ask the L2 cache for what `_down` of a block will read first, before the wait.

    When a program of the launch before makes room for this one, all of them have left their ids long ago; but nothing
    promises that these can be seen, so whatever is found is but a guess, of rows that there are.
    """
    LINE: tl.constexpr = 128 // w_ptr.dtype.element_ty.itemsize
    LINES: tl.constexpr = (BLOCK_K + LINE - 1) // LINE
    slot = tl.arange(0, SLOTS)
    expert = tl.load(ids_ptr + slot, mask=slot < PER_TOKEN, other=-1, cache_modifier=".cg") - first
    here = (expert >= 0) & (expert < count) & (slot < PER_TOKEN)
    n = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), OUTPUTS - 1)
    row = tl.where(here, expert, 0).to(tl.int64)[:, None] * OUTPUTS + n[None, :]
    column = tl.minimum(tl.arange(0, LINES) * LINE, INPUTS - 1)
    lines = row[:, :, None] * INPUTS + column[None, None, :]
    prefetch(w_ptr + tl.where(here[:, None, None], lines, 0))


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
    ids,  # [SLOTS], and the experts' weights
    weights,
    shared_factor,
    w_ptr,
    bias_ptr,
    shared_ptr,
    shared_products,  # [BLOCK_N, BLOCK_K], before they are weighed
    first,
    count,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SHARED_INPUTS: tl.constexpr,  # 0: there is no shared expert
    SHARED_READ: tl.constexpr,  # whether `shared_products` are its own already
    HAS_BIAS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N outputs: the shared expert, then all chosen ones in the order of their slots, in one loop over their
    parts of BLOCK_K inputs; experts of other ranks are not read."""
    PARTS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < OUTPUTS
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    row = tl.minimum(n, OUTPUTS - 1).to(tl.int64)
    if SHARED_INPUTS > 0:
        factor = tl.full([BLOCK_N], 1.0, tl.float32) * shared_factor
        if SHARED_READ:
            total = shared_products * factor[:, None]
        else:
            for k0 in tl.range(0, SHARED_INPUTS, BLOCK_K, num_stages=STAGES):
                w = load_tile(shared_ptr, row, ok, k0, SHARED_INPUTS, BLOCK_K, False)
                total = _add_products(total, w, shared_h_ptr, True, factor, k0, SHARED_INPUTS)
    for step in tl.range(0, PER_TOKEN * PARTS, num_stages=STAGES):
        slot, k0 = step // PARTS, step % PARTS * BLOCK_K
        expert = _of_slot(ids, slot) - first
        here = (expert >= 0) & (expert < count)
        wide = tl.where(here, expert, 0).to(tl.int64)
        expert_row = wide * OUTPUTS + row
        w = load_tile(w_ptr, expert_row, ok & here, k0, INPUTS, BLOCK_K, False)
        weight = tl.where(here, _of_slot(weights, slot), 0.0)
        factor = tl.full([BLOCK_N], 1.0, tl.float32) * weight
        total = _add_products(total, w, h_ptr + slot * INPUTS, here, factor, k0, INPUTS)
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
    up_bias_ptr,
    down_w_ptr,
    down_bias_ptr,
    shared_up_ptr,
    shared_down_ptr,
    logits_ptr,  # [COUNT + 1]
    normed_ptr,  # [programs, IN_FEATURES]
    ids_ptr,  # [programs, PER_TOKEN]
    weights_ptr,  # [PER_TOKEN]
    factors_ptr,  # [1]
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
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,  # 0: there is no shared expert
    SHARED_N: tl.constexpr,  # of its features, those that a program has, if it holds all they weigh
    SHARED_READ: tl.constexpr,  # whether a program reads its part of the shared down at once, for its one block
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
    # Weights that no choice decides about are on their way before the wait, in registers.
    first_w = tl.zeros([1, 1], tl.float32)
    up_w = first_w
    if STAGE == 1 and SHARED_N > 0:
        n = program * SHARED_N + tl.arange(0, SHARED_N)
        row = tl.minimum(n, SHARED_WIDTH - 1).to(tl.int64)
        first_w = load_tile(shared_up_ptr, row, n < SHARED_WIDTH, 0, IN_FEATURES, GATE_K, False)
        up_w = load_tile(shared_up_ptr, row + SHARED_WIDTH, n < SHARED_WIDTH, 0, IN_FEATURES, GATE_K, False)
    if PDL and STAGE == 3:
        _ask_for_down(program, ids_ptr, down_w_ptr, first, count, WIDTH, IN_FEATURES, PER_TOKEN, SLOTS, DOWN_N, DOWN_K)
    if STAGE == 3 and SHARED_READ:
        n = program * DOWN_N + tl.arange(0, DOWN_N)
        row = tl.minimum(n, IN_FEATURES - 1).to(tl.int64)
        first_w = load_tile(shared_down_ptr, row, n < IN_FEATURES, 0, SHARED_WIDTH, DOWN_K, False)
        # What they are multiplied by is the first launch's, which the second waited for before it let this one start.
        ones = tl.full([DOWN_N], 1.0, tl.float32)
        first_w = _add_products(
            tl.zeros([DOWN_N, DOWN_K], tl.float32), first_w, shared_h_ptr, True, ones, 0, SHARED_WIDTH
        )
    if PDL and STAGE > 1:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if STAGE == 1:
        x = leave_logits(x_ptr, gate_ptr, gate_bias_ptr, shared_gate_ptr, norm_ptr, logits_ptr, normed_ptr, program,
                         True, eps, IN_FEATURES, HAS_GATE_BIAS, HAS_SHARED_GATE, HAS_NORM, UNIT_OFFSET, COUNT, GATE_N,
                         GATE_K, PDL)  # fmt: skip
        if SHARED_N > 0:
            wide = x.to(tl.float32)[None, :]
            value = gated(tl.sum(first_w.to(tl.float32) * wide, 1), tl.sum(up_w.to(tl.float32) * wide, 1), "silu")
            n = program * SHARED_N + tl.arange(0, SHARED_N)
            tl.store(shared_h_ptr + n, value, mask=n < SHARED_WIDTH)
        elif SHARED_WIDTH > 0:
            tl.debug_barrier()
            inputs = _all_inputs(own_x_ptr, IN_FEATURES, UP_K, shared_up_ptr.dtype.element_ty.itemsize)
            _gate_up(inputs, own_x_ptr, ids_ptr, shared_up_ptr, shared_up_ptr, shared_h_ptr, 0, 0, IN_FEATURES,
                     SHARED_WIDTH, 1, 0, False, "silu", False, UP_N, UP_K, UP_STAGES)  # fmt: skip
    if STAGE == 2:
        inputs = _all_inputs(own_x_ptr, IN_FEATURES, UP_K, up_w_ptr.dtype.element_ty.itemsize)
        logits, expert, real = left_logits(logits_ptr, COUNT, GROUPS, ROWS, SIZE, COPIES)
        rank = ranked(logits, expert, real, correction_ptr, SCORES, HAS_CORRECTION, GROUPS, TOP_GROUPS, ROWS, SIZE)
        tl.store(ids_ptr + rank, tl.reshape(expert, [ROWS * SIZE]), mask=rank < PER_TOKEN)
        tl.debug_barrier()
        _gate_up(inputs, own_x_ptr, ids_ptr, up_w_ptr, up_bias_ptr, h_ptr, first, count, IN_FEATURES, WIDTH, PER_TOKEN,
                 SLOTS, HAS_UP_BIAS, GATING, INTERLEAVED, UP_N, UP_K, UP_STAGES)  # fmt: skip
        if program == tl.num_programs(0) - 1:  # the last has the fewest tiles
            if HAS_SHARED_GATE:
                leave_factor(logits_ptr, factors_ptr, COUNT)
            weights = weighed(logits, real, rank, SCORES, RENORMALISE, SCALE, EPSILON, PER_TOKEN)
            tl.store(weights_ptr + rank, weights, mask=rank < PER_TOKEN)
    if STAGE == 3:
        ids, weights = _of_slots(ids_ptr, PER_TOKEN, SLOTS), _of_slots(weights_ptr, PER_TOKEN, SLOTS)
        shared_factor = 1.0
        if HAS_SHARED_GATE:
            shared_factor = tl.load(factors_ptr)
        for block in range(program, (IN_FEATURES + DOWN_N - 1) // DOWN_N, tl.num_programs(0)):
            n = block * DOWN_N + tl.arange(0, DOWN_N)
            residual = tl.zeros([DOWN_N], tl.float32)
            if HAS_RESIDUAL:  # behind the sums nothing would hide the time until it comes
                residual = tl.load(residual_ptr + n, mask=n < IN_FEATURES, other=0.0).to(tl.float32)
            value = _down(block, h_ptr, shared_h_ptr, ids, weights, shared_factor, down_w_ptr, down_bias_ptr,
                          shared_down_ptr, first_w, first, count, WIDTH, IN_FEATURES, SHARED_WIDTH, SHARED_READ,
                          HAS_DOWN_BIAS, PER_TOKEN, DOWN_N, DOWN_K, DOWN_STAGES)  # fmt: skip
            finish((value + residual)[None, :], tl.arange(0, 1), block, 1, out_ptr, residual_ptr, peers_ptr, epochs_ptr,
                   out_stride, residual_stride, row_words, plane_words, IN_FEATURES, False, RANK, WORLD,
                   PEERS)  # fmt: skip
