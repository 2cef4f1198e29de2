"""The device code of `codes_ring`: codes come through a ring in shared memory, many copies ahead of the products.

What a thread does is said in assembly (`thread_kernels`), where Triton would move data between threads, or loads behind
products. A thread reads back from the ring only what it asked for itself, so no warp waits for another one but for x,
and at the end.

Thread (r, q) of a warp has rows r and r + 8 of a unit, and of a group 32 inputs: those of which it has 16 bytes. A
product has eight columns, and x up to eight rows: a row of x fills as many columns as a run has groups, each with the
inputs of one group and zeros for the others. So the sums of a run's groups are in one accumulator, each in the thread
that scales it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.activation import act
from tpctl.kernels.common.thread_kernels import (
    barrier,
    commit,
    copy,
    launch_dependents_and_wait,
    load_byte,
    load_float,
    load_half,
    other_lane,
    shared_base,
    store_float,
    wait_for_all_but,
)
from tpctl.kernels.linear.ring_inputs_kernels import norm_words, prepare_inputs
from tpctl.kernels.linear.ring_tiles_kernels import ask_for_tile, row_of, run_sums


@gluon.jit
def ask_for_scales(scales_ptr, zeros_ptr, thread, base, pid, units, outputs, CUT: gl.constexpr):
    """Those of all units, and their zeros, 8 of a row at once."""
    PARTS: gl.constexpr = CUT.groups // 8
    TURNS: gl.constexpr = (CUT.units * 16 * PARTS + CUT.threads - 1) // CUT.threads
    for i in gl.static_range(TURNS):
        piece = thread + i * CUT.threads
        row = piece // PARTS
        place = row_of(pid + row // 16 * CUT.programs, row % 16, outputs, CUT) * CUT.groups + piece % PARTS * 8
        go = (row // 16 < units).to(gl.int32)
        copy(base + CUT.scales + row * CUT.pitch + piece % PARTS * 16, scales_ptr + place, go, 16)
        if CUT.has_zeros:
            copy(base + CUT.zeros + piece * 8, zeros_ptr + place, go, 8)


@gluon.jit
def ask_for_first(w_ptr, slot, r, pid, units, outputs, CUT: gl.constexpr):
    """As many tiles as the ring holds."""
    TILES: gl.constexpr = CUT.tiles
    for i in gl.static_range(TILES):
        unit = i // CUT.share
        codes = w_ptr + i % CUT.share * (CUT.halves * 64)
        first = codes + row_of(pid + unit * CUT.programs, r, outputs, CUT) * CUT.row_bytes
        second = codes + row_of(pid + unit * CUT.programs, r + 8, outputs, CUT) * CUT.row_bytes
        go = (unit < units).to(gl.int32) + r * 0
        ask_for_tile(slot + i * (CUT.halves * 1024), first, second, go, CUT)


@gluon.jit
def _result(i, thread, pid, CUT: gl.constexpr):
    """Which of its units, which row of x and which output a thread's i-th result is of."""
    number = thread + i * CUT.threads
    unit = number // (CUT.outputs * CUT.rows)
    n = (pid + unit * CUT.programs) * CUT.outputs + number % CUT.outputs
    return unit, number // CUT.outputs % CUT.rows, n


@gluon.jit
def of_outputs(pointer, thread, pid, units, CUT: gl.constexpr):
    """A float32 number of the output of each of a thread's results."""
    found = ()
    RESULTS: gl.constexpr = CUT.results
    for i in gl.static_range(RESULTS):
        unit, _, n = _result(i, thread, pid, CUT)
        found += (gl.load(pointer + n, mask=unit < units, other=0.0).to(gl.float32),)  # type: ignore[assignment]
    return found


@gluon.jit
def load_residuals(residual_ptr, residual_stride, thread, pid, units, rows, CUT: gl.constexpr):
    found = ()
    RESULTS: gl.constexpr = CUT.results
    for i in gl.static_range(RESULTS):
        unit, m, n = _result(i, thread, pid, CUT)
        source = residual_ptr + m.to(gl.int64) * residual_stride + n
        found += (gl.load(source, mask=(unit < units) & (m < rows), other=0.0).to(gl.float32),)  # type: ignore[assignment]
    return found


@gluon.jit
def load_sums(at, slot, CUT: gl.constexpr):
    """The sum of x, less than zero, of the group that one of a thread's columns is of; without one, zero."""
    return gl.where(slot < CUT.run, load_float(at), 0.0)


@gluon.jit
def keep_sums(at, u0, u1, l0, l1, r, q, CUT: gl.constexpr):
    """Leave a unit's sums, [rows, 16]: of rows r (u) and r + 8 (l), each of two columns, which are added where they
    are of the same row of x. Of one row of x they are in u0 and l0."""
    odd = q % 2 == 1
    high = q >= 2
    if CUT.rows == 1:
        total = gl.where(odd, l0, u0) + other_lane(gl.where(odd, u0, l0), 1)
        store_float(at + (r + q % 2 * 8) * 4, total + other_lane(total, 2))
    elif CUT.rows == 2:
        first = gl.where(odd, l0, u0) + other_lane(gl.where(odd, u0, l0), 1)
        second = gl.where(odd, l1, u1) + other_lane(gl.where(odd, u1, l1), 1)
        total = gl.where(high, second, first) + other_lane(gl.where(high, first, second), 2)
        store_float(at + q // 2 * 64 + (r + q % 2 * 8) * 4, total)
    elif CUT.rows == 4:
        at += q % 2 * 128 + (r + q // 2 * 8) * 4
        store_float(at, gl.where(high, l0, u0) + other_lane(gl.where(high, u0, l0), 2))
        store_float(at + 64, gl.where(high, l1, u1) + other_lane(gl.where(high, u1, l1), 2))
    else:
        at += q * 128 + r * 4
        store_float(at, u0)
        store_float(at + 64, u1)
        store_float(at + 32, l0)
        store_float(at + 96, l1)


@gluon.jit
def row_scale(base, thread, eps, CUT: gl.constexpr):
    """1 / rms of x."""
    squares = thread * 0.0
    WARPS: gl.constexpr = CUT.warps
    for i in gl.static_range(WARPS):
        squares += load_float(base + CUT.squares + i * 4 + thread * 0)
    return gl.rsqrt(squares / CUT.columns + eps)


@gluon.jit(do_not_specialize=["rows", "outputs"])
def codes_ring_kernel(
    x_ptr,  # [rows, columns / 2], words of two bfloat16 numbers
    w_ptr,  # [O, bytes of a row]
    scales_ptr,  # of uint4 [O, groups] bfloat16 or float16, of e4m3 [O]
    zeros_ptr,  # as many bytes
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,  # as a row of x
    rows,
    outputs,  # O, or half of it
    x_stride,  # in words
    out_stride,
    residual_stride,
    eps,
    CUT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_NORM: gl.constexpr,  # of one row
    UNIT_OFFSET: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [CUT.warps], [0])
    UINT4: gl.constexpr = CUT.kind == "uint4"
    RUNS: gl.constexpr = CUT.runs
    WARPS: gl.constexpr = CUT.warps
    whole = gl.allocate_shared_memory(gl.int32, [CUT.bytes // 256, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    nothing = gl.zeros([64], gl.int32, ONE)
    whole.index(CUT.no_x // 256).store(nothing)
    whole.index(CUT.no_x // 256 + 1).store(nothing)
    pid = gl.program_id(0)
    thread = gl.arange(0, CUT.threads, layout=ONE)
    warp = thread // 32
    r = thread % 32 // 4
    q = thread % 4
    base = shared_base(thread * 0)
    units = (outputs // CUT.outputs - pid + CUT.programs - 1) // CUT.programs

    if UINT4:
        ask_for_scales(scales_ptr, zeros_ptr, thread, base, pid, units, outputs, CUT)
    commit(thread)
    slot = base + warp * (CUT.tiles * CUT.halves * 1024) + thread % 32 * 16
    w_ptr += warp * (CUT.share * CUT.halves * 64) + q * 16
    ask_for_first(w_ptr, slot, r, pid, units, outputs, CUT)
    factors, scales, up_scales, biases, up_biases = (), (), (), (), ()
    if HAS_NORM:
        factors = norm_words(norm_ptr, thread, CUT)
    if not UINT4:
        scales = of_outputs(scales_ptr, thread, pid, units, CUT)
        if CUT.gated:
            up_scales = of_outputs(scales_ptr + outputs, thread, pid, units, CUT)
    if HAS_BIAS:
        biases = of_outputs(bias_ptr, thread, pid, units, CUT)
        if CUT.gated:
            up_biases = of_outputs(bias_ptr + outputs, thread, pid, units, CUT)
    if PDL:
        launch_dependents_and_wait(thread)
    prepare_inputs(x_ptr, factors, thread, base, rows, x_stride, UNIT_OFFSET, CUT)
    residuals = ()
    if HAS_RESIDUAL:
        residuals = load_residuals(residual_ptr, residual_stride, thread, pid, units, rows, CUT)
    wait_for_all_but(thread, CUT.tiles)
    barrier()

    column_slot = r // CUT.rows  # which group of a run: of the column that the thread has x of, and of its two sums
    slot_0, slot_1 = 2 * q // CUT.rows, (2 * q + 1) // CUT.rows
    own_x = base + CUT.x + (r % CUT.rows * CUT.groups + warp * CUT.share + column_slot) * 256 + q * 16
    group_0 = warp * CUT.share + gl.minimum(slot_0, CUT.run - 1)
    group_1 = warp * CUT.share + gl.minimum(slot_1, CUT.run - 1)
    sums_0 = base + CUT.sums + (2 * q % CUT.rows * CUT.groups + group_0) * 4
    sums_1 = base + CUT.sums + ((2 * q + 1) % CUT.rows * CUT.groups + group_1) * 4
    m0, m1 = thread * 0.0, thread * 0.0
    if UINT4 and RUNS == 1:
        m0, m1 = load_sums(sums_0, slot_0, CUT), load_sums(sums_1, slot_1, CUT)
    u0, u1, l0, l1 = thread * 0.0, thread * 0.0, thread * 0.0, thread * 0.0
    ring = 0  # the oldest run in the ring
    for step in range(units * RUNS):
        unit, part = step // RUNS, step % RUNS
        if UINT4 and RUNS > 1:
            m0 = load_sums(sums_0 + part * (CUT.run * 4), slot_0, CUT)
            m1 = load_sums(sums_1 + part * (CUT.run * 4), slot_1, CUT)
        coming = (step + CUT.ahead) // RUNS  # the unit whose run is asked for
        next_codes = w_ptr + (step + CUT.ahead) % RUNS * (CUT.run * CUT.halves * 64)
        a0, a1, b0, b1 = run_sums(
            m0 * (128.0 + CUT.zero),
            m1 * (128.0 + CUT.zero),
            slot + ring * (CUT.run * CUT.halves * 1024),
            column_slot,
            own_x + part * (CUT.run * 256),
            base + CUT.no_x + 64 + q * 16,
            next_codes + row_of(pid + coming * CUT.programs, r, outputs, CUT) * CUT.row_bytes,
            next_codes + row_of(pid + coming * CUT.programs, r + 8, outputs, CUT) * CUT.row_bytes,
            (coming < units).to(gl.int32) + thread * 0,
            CUT,
        )
        row = unit * 16 + r
        if CUT.has_zeros:
            at = base + CUT.zeros + row * CUT.groups + part * CUT.run
            a0 += load_byte(at + group_0) * m0
            b0 += load_byte(at + group_0 + 8 * CUT.groups) * m0
            a1 += load_byte(at + group_1) * m1
            b1 += load_byte(at + group_1 + 8 * CUT.groups) * m1
        if UINT4:
            at = base + CUT.scales + row * CUT.pitch + part * (CUT.run * 2)
            upper = load_half(at + group_0 * 2, CUT.fp16)
            lower = load_half(at + group_0 * 2 + 8 * CUT.pitch, CUT.fp16)
            a0 *= upper
            b0 *= lower
            if CUT.rows == 1:
                upper = load_half(at + group_1 * 2, CUT.fp16)
                lower = load_half(at + group_1 * 2 + 8 * CUT.pitch, CUT.fp16)
            a1 *= upper
            b1 *= lower
        if CUT.rows == 1:
            a0 += a1
            b0 += b1
        if RUNS > 1:
            goes_on = thread * 0 + part > 0
            a0 += gl.where(goes_on, u0, 0.0)
            b0 += gl.where(goes_on, l0, 0.0)
            if CUT.rows > 1:
                a1 += gl.where(goes_on, u1, 0.0)
                b1 += gl.where(goes_on, l1, 0.0)
            u0, u1, l0, l1 = a0, a1, b0, b1
        # Until a unit's last run these are not all yet, and are written over.
        keep_sums(base + CUT.partial + (unit * CUT.warps + warp) * (CUT.rows * 64), a0, a1, b0, b1, r, q, CUT)
        ring = ring + 1
        ring = gl.where(ring == CUT.ahead, 0, ring) if CUT.ahead > 1 else 0
    barrier()

    scale = thread * 0.0 + 1.0
    if HAS_NORM:
        scale = row_scale(base, thread, eps, CUT)
    if not UINT4:
        scale *= 72057594037927936.0  # 2^(120 - 64), the lifts of codes and x
    RESULTS: gl.constexpr = CUT.results
    for i in gl.static_range(RESULTS):
        unit, m, n = _result(i, thread, pid, CUT)
        value, up = thread * 0.0, thread * 0.0
        place = gl.minimum(unit, CUT.units - 1) * (CUT.warps * CUT.rows) + m
        for j in gl.static_range(WARPS):
            source = base + CUT.partial + (place + j * CUT.rows) * 64 + thread % CUT.outputs * 4
            value += load_float(source)
            if CUT.gated:
                up += load_float(source + 32)
        value *= scale
        up *= scale
        if not UINT4:
            value *= scales[i]
            if CUT.gated:
                up *= up_scales[i]
        if HAS_BIAS:
            value += biases[i]
            if CUT.gated:
                up += up_biases[i]
        if CUT.gated:
            value = act(value, ACTIVATION) * up
        if HAS_RESIDUAL:
            value += residuals[i]
        target = out_ptr + m.to(gl.int64) * out_stride + n
        gl.store(target, value.to(out_ptr.dtype.element_ty), mask=(unit < units) & (m < rows))
    whole._keep_alive()
