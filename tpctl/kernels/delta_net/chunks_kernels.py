"""The device code of `chunks`. Names as in `layers.delta_net.rule`, whose formulas these are.

``conv_kernel``      a program a chunk and head: the convolution, and queries and keys of length 1.
``prepare_kernel``   a program a chunk and value head: gates, and all that needs no state. With the inverse of the
                     system, M = (1 + tril(beta k k^T exp(L_i - L_j), -1))^-1, a chunk's corrections are

                         U = M beta v - (M beta exp(L) k) S

                     so it leaves M beta v, M beta exp(L) k, exp(L) q, exp(L_C - L) k, tril(q k^T exp(L_i - L_j)), L_C.
``scan_kernel``      a program a sequence, value head and some of the value's dimensions: from chunk to chunk four
                     products with the state, which it holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpctl.kernels.common.launch import ANYWHERE
from tpctl.kernels.delta_net.inputs import head_gates, silu_rounded

_COUNTS = ["num_chunks", "num_sequences", "chunk0", "sequence0"]
"""Of which one is no case of its own."""


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=ANYWHERE)
def conv_kernel(
    q_ptr,
    taps_ptr,
    inputs_ptr,
    chunks_ptr,
    sequences_ptr,
    mixed_ptr,
    num_chunks,
    num_sequences,
    chunk0,
    qkv_stride,
    qk_step,
    qv_step,
    key_step,
    v_step,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = chunk0 + tl.program_id(1)
    count = tl.load(chunks_ptr + num_chunks + chunk)
    if count == 0:
        return
    head = tl.program_id(0)  # of queries, keys and values, in this order
    start = tl.load(chunks_ptr + chunk)
    position = tl.load(chunks_ptr + 2 * num_chunks + chunk)
    sequence = tl.load(chunks_ptr + 4 * num_chunks + chunk)
    before = start - tl.load(sequences_ptr + num_sequences + sequence)
    read = tl.load(sequences_ptr + 2 * num_sequences + sequence).to(tl.int64)
    CHANNELS: tl.constexpr = 2 * KEYS * KEY_DIM + KEYS * GROUP * VALUE_DIM
    BLOCK: tl.constexpr = max(BLOCK_D, BLOCK_E)
    is_key = head < 2 * KEYS
    of_value = head - 2 * KEYS
    dim = tl.where(is_key, KEY_DIM, VALUE_DIM)
    width = tl.where(is_key, BLOCK_D, BLOCK_E)
    first = tl.where(is_key, head // KEYS * qk_step + head % KEYS * key_step,
                     qv_step + of_value // GROUP * v_step + of_value % GROUP * VALUE_DIM)  # fmt: skip
    c = tl.arange(0, BLOCK)
    channel = tl.where(is_key, head * KEY_DIM, 2 * KEYS * KEY_DIM + of_value * VALUE_DIM) + c
    t = tl.arange(0, CHUNK)
    inside = c < dim
    live = (t < count)[:, None] & inside[None, :]
    rows_ptr = q_ptr + (start.to(tl.int64) + t)[:, None] * qkv_stride + (first + c)[None, :]
    x = tl.load(rows_ptr, mask=live, other=0.0)
    dtype = x.dtype
    tap = tl.load(taps_ptr + (TAPS - 1) * CHANNELS + channel, mask=inside, other=0.0)
    total = x.to(tl.float32) * tap[None, :]
    for back in tl.static_range(1, TAPS):
        tap = tl.load(taps_ptr + (TAPS - 1 - back) * CHANNELS + channel, mask=inside, other=0.0)
        x = tl.load(rows_ptr - back * qkv_stride, mask=live & (t + before >= back)[:, None], other=0.0)
        total += x.to(tl.float32) * tap[None, :]
    if (read >= 0) & (before < TAPS - 1):  # what was seen in earlier steps
        past_ptr = inputs_ptr + read * (TAPS * CHANNELS)
        for back in tl.static_range(1, TAPS):
            tap = tl.load(taps_ptr + (TAPS - 1 - back) * CHANNELS + channel, mask=inside, other=0.0)
            row = (position + t + (TAPS - back)) % TAPS * CHANNELS
            x = tl.load(past_ptr + row[:, None] + channel[None, :], mask=live & (t + before < back)[:, None], other=0.0)
            total += x.to(tl.float32) * tap[None, :]
    x = tl.where(live, silu_rounded(total, dtype), 0.0)
    if is_key:
        scale = tl.where(head < KEYS, 1.0 / tl.sqrt(KEY_DIM * 1.0), 1.0)
        x *= (tl.rsqrt(tl.sum(x * x, 1) + 1e-6) * scale)[:, None]
    SIZE: tl.constexpr = CHUNK * (2 * KEYS * BLOCK_D + KEYS * GROUP * BLOCK_E)
    place = tl.where(is_key, head * (CHUNK * BLOCK_D), CHUNK * (2 * KEYS * BLOCK_D + of_value * BLOCK_E))
    mixed_ptr += tl.program_id(1).to(tl.int64) * SIZE + place
    tl.store(mixed_ptr + t[:, None] * width + c[None, :], x.to(dtype), mask=(c < width)[None, :])


@triton.jit
def _inverse(system, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """(1 + system)^-1 of a strictly lower triangle, float32 [CHUNK, CHUNK].

    The blocks on the diagonal, D, are inverted row by row. What is left of the system under them, times that inverse,
    is N; four of it multiplied are zero, as there are four blocks, so (1 + N)^-1 = (1 - N) (1 + N^2).
    """
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    tl.static_assert(BLOCKS == 4)
    i = tl.arange(0, CHUNK)
    diagonal = (i // BLOCK)[:, None] == (i // BLOCK)[None, :]
    one = (i[:, None] == i[None, :]).to(tl.float32)
    of_block = tl.arange(0, BLOCKS)
    apart = of_block[:, None, None, None] == of_block[None, None, :, None]
    blocks = tl.sum(tl.where(apart, tl.reshape(system, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    block_inverses = -blocks  # [BLOCKS, BLOCK, BLOCK], of which each row needs those above it
    r = tl.arange(0, BLOCK)[None, :, None]
    for at in range(2, BLOCK):
        row = tl.sum(tl.where(r == at, block_inverses, 0.0), 1)
        row += tl.sum(row[:, :, None] * block_inverses, 1)
        block_inverses = tl.where(r == at, row[:, None, :], block_inverses)
    spread = tl.where(apart, block_inverses[:, :, None, :], 0.0)
    inverse = tl.reshape(spread, [CHUNK, CHUNK]) + one
    below = tl.where(diagonal, 0.0, system)
    n = tl.dot(inverse, below, input_precision=PRECISION)
    n2 = tl.dot(n, n, input_precision=PRECISION)
    both = one - n + n2 - tl.dot(n, n2, input_precision=PRECISION)
    return tl.dot(both, inverse, input_precision=PRECISION)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=ANYWHERE)
def prepare_kernel(
    mixed_ptr,
    b_ptr,
    a_ptr,
    dt_bias_ptr,
    a_log_ptr,
    chunks_ptr,
    value_ptr,
    weight_ptr,
    query_ptr,
    key_ptr,
    within_ptr,
    total_ptr,
    num_chunks,
    chunk0,
    gate_stride,
    gate_step,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunk0 + tl.program_id(1)
    count = tl.load(chunks_ptr + num_chunks + chunk)
    if count == 0:
        return
    head = tl.program_id(0)
    key = head // GROUP
    t = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    live = t < count
    dtype = value_ptr.dtype.element_ty
    at = (tl.program_id(1).to(tl.int64) * (KEYS * GROUP) + head) * CHUNK
    at_d = (at + t)[:, None] * BLOCK_D + d[None, :]
    at_e = (at + t)[:, None] * BLOCK_E + e[None, :]
    SIZE: tl.constexpr = CHUNK * (2 * KEYS * BLOCK_D + KEYS * GROUP * BLOCK_E)
    mixed_ptr += tl.program_id(1).to(tl.int64) * SIZE
    of_key = mixed_ptr + key * (CHUNK * BLOCK_D) + t[:, None] * BLOCK_D + d[None, :]
    k = tl.load(of_key + KEYS * (CHUNK * BLOCK_D))
    q = tl.load(of_key)
    v = tl.load(mixed_ptr + CHUNK * (2 * KEYS * BLOCK_D + head * BLOCK_E) + t[:, None] * BLOCK_E + e[None, :])

    gate_at = (tl.load(chunks_ptr + chunk).to(tl.int64) + t) * gate_stride + key * gate_step + head % GROUP
    a = tl.load(a_ptr + gate_at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + gate_at, mask=live, other=0.0)
    g, beta = head_gates(a, b, tl.load(dt_bias_ptr + head), tl.load(a_log_ptr + head))
    g = tl.where(live, g, 0.0)
    beta = tl.where(live, beta, 0.0)
    since = tl.cumsum(g, 0)
    total = tl.sum(g, 0)
    tl.store(total_ptr + at // CHUNK, total)
    between = tl.exp(tl.where(t[:, None] >= t[None, :], since[:, None] - since[None, :], float("-inf")))

    within = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between
    tl.store(within_ptr + (at + t)[:, None] * CHUNK + t[None, :], within.to(dtype))
    tl.store(query_ptr + at_d, (q.to(tl.float32) * tl.exp(since)[:, None]).to(dtype))
    tl.store(key_ptr + at_d, (k.to(tl.float32) * tl.exp(total - since)[:, None]).to(dtype))
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION) * between * beta[:, None]
    system = tl.where(t[:, None] > t[None, :], system, 0.0)
    inverse = _inverse(system, PRECISION, CHUNK, BLOCK)
    # What scales the rows of the other factor scales the columns of this one.
    by_beta = (inverse * beta[None, :]).to(dtype)
    tl.store(value_ptr + at_e, tl.dot(by_beta, v, input_precision=PRECISION).to(dtype))
    by_both = (inverse * (beta * tl.exp(since))[None, :]).to(dtype)
    tl.store(weight_ptr + at_d, tl.dot(by_both, k, input_precision=PRECISION).to(dtype))


@triton.jit
def _keep_inputs(
    x_ptr,  # [channels], of the step's first token
    stride,
    inputs_ptr,
    channel,
    inside,
    end,
    position,
    first,
    read,
    slot,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Leave in ``slot`` the last inputs of some channels in front of row ``end``, whose position this is, of a sequence
    whose first row is ``first``."""
    for back in tl.static_range(1, TAPS):
        at = end - back
        row = (position - back + TAPS) % TAPS * CHANNELS
        x = tl.load(x_ptr + at.to(tl.int64) * stride, mask=inside & (at >= first), other=0.0)
        old = tl.load(inputs_ptr + read * (TAPS * CHANNELS) + row + channel,
                      mask=inside & (at < first) & (read >= 0), other=0.0)  # fmt: skip
        tl.store(inputs_ptr + slot * (TAPS * CHANNELS) + row + channel, x + old, mask=inside)


@triton.jit
def _keep_head(
    q_ptr,
    k_ptr,
    v_ptr,
    inputs_ptr,
    head,
    end,
    position,
    first,
    read,
    slot,
    qkv_stride,
    key_step,
    v_step,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The same of a value head's channels; of those of a key head one of its value heads does it."""
    key = head // GROUP
    member = head % GROUP
    CHANNELS: tl.constexpr = 2 * KEYS * KEY_DIM + KEYS * GROUP * VALUE_DIM
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    in_d = (d < KEY_DIM) & (member == 0)
    _keep_inputs(q_ptr + key * key_step + d, qkv_stride, inputs_ptr, key * KEY_DIM + d, in_d, end, position, first,
                 read, slot, CHANNELS, TAPS)  # fmt: skip
    _keep_inputs(k_ptr + key * key_step + d, qkv_stride, inputs_ptr, (KEYS + key) * KEY_DIM + d, in_d, end, position,
                 first, read, slot, CHANNELS, TAPS)  # fmt: skip
    _keep_inputs(v_ptr + key * v_step + member * VALUE_DIM + e, qkv_stride, inputs_ptr,
                 2 * KEYS * KEY_DIM + head * VALUE_DIM + e, e < VALUE_DIM, end, position, first, read, slot, CHANNELS,
                 TAPS)  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=ANYWHERE)
def scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    matrices_ptr,
    inputs_ptr,
    out_ptr,
    chunks_ptr,
    sequences_ptr,
    value_ptr,
    weight_ptr,
    query_ptr,
    key_ptr,
    within_ptr,
    total_ptr,
    num_chunks,
    num_sequences,
    chunk0,
    sequence0,
    qkv_stride,
    key_step,
    v_step,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = sequence0 + tl.program_id(2)
    begin = tl.load(sequences_ptr + sequence)
    end = tl.load(sequences_ptr + sequence + 1)
    if begin == end:
        return
    first = tl.load(sequences_ptr + num_sequences + sequence)
    read = tl.load(sequences_ptr + 2 * num_sequences + sequence).to(tl.int64)
    write = tl.load(sequences_ptr + 3 * num_sequences + sequence).to(tl.int64)
    t = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK_D)
    e = tile * TILE + tl.arange(0, TILE)
    inside = (d < KEY_DIM)[:, None] & (e < VALUE_DIM)[None, :]
    place = head.to(tl.int64) * (KEY_DIM * VALUE_DIM) + d[:, None] * VALUE_DIM + e[None, :]
    SLOT: tl.constexpr = KEYS * GROUP * KEY_DIM * VALUE_DIM
    HEADS: tl.constexpr = KEYS * GROUP
    dtype = value_ptr.dtype.element_ty
    state = tl.load(matrices_ptr + read * SLOT + place, mask=inside & (read >= 0), other=0.0)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        of_head = (chunk - chunk0).to(tl.int64) * HEADS + head
        at = of_head * CHUNK + t
        weight = tl.load(weight_ptr + at[:, None] * BLOCK_D + d[None, :])
        new = tl.load(value_ptr + at[:, None] * BLOCK_E + e[None, :]).to(tl.float32)
        query = tl.load(query_ptr + at[:, None] * BLOCK_D + d[None, :])
        key = tl.load(key_ptr + at[:, None] * BLOCK_D + d[None, :])
        within = tl.load(within_ptr + at[:, None] * CHUNK + t[None, :])
        total = tl.load(total_ptr + of_head)
        narrow = state.to(dtype)
        new -= tl.dot(weight, narrow, input_precision=PRECISION)
        queried = tl.dot(query, narrow, input_precision=PRECISION)
        narrow_new = new.to(dtype)
        queried = tl.dot(within, narrow_new, queried, input_precision=PRECISION)
        state = tl.dot(tl.trans(key), narrow_new, state * tl.exp(total), input_precision=PRECISION)
        start = tl.load(chunks_ptr + chunk)
        count = tl.load(chunks_ptr + num_chunks + chunk)
        save = tl.load(chunks_ptr + 3 * num_chunks + chunk).to(tl.int64)
        row = start.to(tl.int64) + t
        tl.store(out_ptr + (row[:, None] * HEADS + head) * VALUE_DIM + e[None, :], queried.to(dtype),
                 mask=(t < count)[:, None] & (e < VALUE_DIM)[None, :])  # fmt: skip
        if save >= 0:
            tl.store(matrices_ptr + save * SLOT + place, state, mask=inside)
            if tile == 0:
                after = tl.load(chunks_ptr + 2 * num_chunks + chunk) + count
                _keep_head(q_ptr, k_ptr, v_ptr, inputs_ptr, head, start + count, after, first, read, save, qkv_stride,
                           key_step, v_step, KEYS, GROUP, KEY_DIM, VALUE_DIM, TAPS, BLOCK_D, BLOCK_E)  # fmt: skip
    tl.store(matrices_ptr + write * SLOT + place, state, mask=inside)
    if tile == 0:
        last = chunks_ptr + end - 1
        count = tl.load(last + num_chunks)
        start = tl.load(last)
        after = tl.load(last + 2 * num_chunks) + count
        # What is kept on the way may have been copied from where this goes.
        tl.debug_barrier()
        _keep_head(q_ptr, k_ptr, v_ptr, inputs_ptr, head, start + count, after, first, read, write, qkv_stride,
                   key_step, v_step, KEYS, GROUP, KEY_DIM, VALUE_DIM, TAPS, BLOCK_D, BLOCK_E)  # fmt: skip


@triton.jit
def gated_norm_kernel(
    out_ptr,
    z_ptr,
    norm_ptr,
    starts_ptr,
    z_stride,
    z_step,
    eps,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROMPTS: tl.constexpr,  # 0: all rows are of prompts
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    inside = (head < HEADS)[:, None] & (e < VALUE_DIM)[None, :]
    live = inside
    if PROMPTS > 0:
        if row < tl.load(starts_ptr):
            return
        live = inside & (row < tl.load(starts_ptr + PROMPTS))
    dtype = out_ptr.dtype.element_ty
    place = (row * HEADS + head)[:, None] * VALUE_DIM + e[None, :]
    x = tl.load(out_ptr + place, mask=live, other=0.0).to(tl.float32)
    z_at = row * z_stride + (head // GROUP * z_step + head % GROUP * VALUE_DIM)[:, None] + e[None, :]
    z = tl.load(z_ptr + z_at, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + e, mask=e < VALUE_DIM, other=0.0).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 1) / VALUE_DIM + eps)[:, None]).to(dtype).to(tl.float32)
    x = (x * weight[None, :]).to(dtype).to(tl.float32)
    tl.store(out_ptr + place, (x * (z / (1.0 + tl.exp(-z)))).to(dtype), mask=inside)
