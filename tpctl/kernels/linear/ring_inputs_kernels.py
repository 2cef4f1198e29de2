"""How `codes_ring` prepares x: what its products take of it, in shared memory, in the order in which they do."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import (
    high_float,
    high_halves,
    lane_sum,
    load_global_4,
    low_float,
    low_halves,
    other_lane,
    store_4,
    store_float,
    times_plus,
)


@gluon.jit
def _chunk_of(thread, i, CUT: gl.constexpr):
    """The i-th eight inputs of a thread; where there are none, of the last group again, with its lanes."""
    chunk = thread + i * CUT.threads
    return gl.where(chunk <= CUT.last_chunk, chunk, CUT.last_chunk - 15 + thread % 16)


@gluon.jit
def norm_words(norm_ptr, thread, CUT: gl.constexpr):
    """The norm's weights of a thread's inputs, four words for each eight."""
    found = ()
    CHUNKS: gl.constexpr = CUT.chunks
    for i in gl.static_range(CHUNKS):
        found += (load_global_4(norm_ptr + _chunk_of(thread, i, CUT) * 4),)  # type: ignore[assignment]
    return found


@gluon.jit
def _load(x_ptr, chunk, rows, x_stride, CUT: gl.constexpr):
    """Of rows that are not there, the last one's."""
    row = gl.minimum(chunk // (CUT.columns // 8), rows - 1)
    return load_global_4(x_ptr + row.to(gl.int64) * x_stride + chunk % (CUT.columns // 8) * 4)


@gluon.jit
def _square_sum(words):
    a, b, c, d = words
    square = low_float(a) * low_float(a) + high_float(a) * high_float(a)
    square += low_float(b) * low_float(b) + high_float(b) * high_float(b)
    square += low_float(c) * low_float(c) + high_float(c) * high_float(c)
    return square + low_float(d) * low_float(d) + high_float(d) * high_float(d)


@gluon.jit
def _sum(words):
    a, b, c, d = words
    total = low_float(a) + high_float(a) + low_float(b) + high_float(b)
    return total + low_float(c) + high_float(c) + low_float(d) + high_float(d)


@gluon.jit
def _times(words, factors, PLUS_ONE: gl.constexpr):
    """words * factors, or words * (1 + factors), rounded once."""
    a, b, c, d = words
    if PLUS_ONE:
        e, f, g, h = words
    else:
        e = a * 0 - 2147450880  # -0, twice
        f, g, h = e, e, e
    a, b = times_plus(a, factors[0], e), times_plus(b, factors[1], f)
    return a, b, times_plus(c, factors[2], g), times_plus(d, factors[3], h)


@gluon.jit
def _added(totals, DISTANCE: gl.constexpr):
    """Each with what the lane has for it whose number differs in one bit."""
    sums = ()
    for i in gl.static_range(len(totals)):
        sums += (totals[i] + other_lane(totals[i], DISTANCE),)  # type: ignore[assignment]
    return sums


@gluon.jit
def _keep(words, at, chunk, CUT: gl.constexpr):
    """Leave eight inputs in the order of a word of codes, or of two."""
    a, b, c, d = words
    at += chunk // 16 * 256
    if CUT.kind == "uint4":
        at += chunk % 4 * 64 + chunk // 4 % 4 * 16
        store_4(at, low_halves(a, c), high_halves(a, c), low_halves(b, d), high_halves(b, d))
    else:
        at += chunk // 8 % 2 * 128 + chunk % 2 * 64 + chunk // 2 % 4 * 16
        store_4(at, low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d))


@gluon.jit
def prepare_inputs(x_ptr, factors, thread, base, rows, x_stride, UNIT_OFFSET: gl.constexpr, CUT: gl.constexpr):
    """x, times the norm's weight where there is one; of 4-bit integers with the sums of its groups, less than zero; of
    e4m3 times 2^64. With a norm, the sum of the squares of each warp's inputs is left as well."""
    HAS_NORM: gl.constexpr = len(factors) > 0
    squares = thread * 0.0
    CHUNKS: gl.constexpr = CUT.chunks
    for i in gl.static_range(0, CHUNKS, 8):
        inputs = ()
        for j in gl.static_range(8):
            if i + j < CUT.chunks:
                inputs += (_load(x_ptr, _chunk_of(thread, i + j, CUT), rows, x_stride, CUT),)  # type: ignore[assignment]
        totals = ()
        for j in gl.static_range(len(inputs)):
            words = inputs[j]  # type: ignore[var-annotated]
            if HAS_NORM:
                squares += gl.where(thread + (i + j) * CUT.threads <= CUT.last_chunk, _square_sum(words), 0.0)
                words = _times(words, factors[i + j], UNIT_OFFSET)
            if CUT.kind == "e4m3":
                lift = thread * 0 + 0x5F805F80  # 2^64, twice
                words = _times(words, (lift, lift, lift, lift), False)
            else:
                totals += (_sum(words),)  # type: ignore[assignment]
            _keep(words, base + CUT.x, _chunk_of(thread, i + j, CUT), CUT)
        # All at once: one after the other they would wait for each other.
        totals = _added(_added(_added(_added(totals, 1), 2), 4), 8)
        for j in gl.static_range(len(totals)):
            store_float(base + CUT.sums + _chunk_of(thread, i + j, CUT) // 16 * 4, -totals[j])
    if HAS_NORM:
        store_float(base + CUT.squares + thread // 32 * 4, lane_sum(squares, 32))
