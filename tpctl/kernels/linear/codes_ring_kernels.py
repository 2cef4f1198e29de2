"""The device code of `codes_ring`: 4-bit codes come through a ring in shared memory, many copies ahead of the products.

What a thread does is said in assembly (`thread_kernels`), where Triton would move data between threads, or loads behind
products. A thread reads back from the ring only what it asked for itself, so that its warp never waits for another one
before its sums are complete.

A warp takes a run of groups (128 inputs, 64 bytes of a row) of 16 rows, a unit. Thread (r, q) has rows r and r + 8,
and of a group the 32 inputs 32 q. A product has eight columns, of which x has ROWS: so each row of x fills as many as a
run has groups, and is zero in each but for one group's inputs. The sums of several groups are in one accumulator that
way, each where the thread is that scales it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import (
    barrier,
    commit,
    copy,
    high_float,
    high_halves,
    lane_sum,
    launch_dependents_and_wait,
    load_4,
    load_byte,
    load_float,
    load_global_4,
    load_half,
    low_float,
    low_halves,
    other_lane,
    shared_base,
    store_4,
    store_float,
    times_plus,
    wait_for_all_but,
)


def _tile_assembly(wide: int) -> str:
    """Sums of a tile. $0 to $7: two accumulators; $8 to $11, $12 to $15: words of codes of rows r and r + 8; $16 to
    $31: words of x; $32 to $39: the accumulators before; $40 to $42: 2^28, 2^24 and 2^20. A code c is the bfloat16
    number 128 + c."""
    names = [f"{name}{i}" for name in ("a", "b") for i in range(4)] + ["s", "t"]
    body = [f".reg .b32 {', '.join(names)};", ".reg .b64 d;", f".reg .f32 {', '.join(f'c{i}' for i in range(8))};"]
    body += [f"mov.f32 c{i}, ${32 + i};" for i in range(8)]
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${8 + 4 * row + word}"
            body.append(f"lop3.b32 {name}0, {source}, 0x000f000f, 0x43004300, 0xEA;")
            for i in range(1, 4):
                if i > 3 - wide:
                    body += [f"mul.wide.u32 d, {source}, ${39 + i};", "mov.b64 {t, s}, d;"]
                else:
                    body += [f"shr.u32 s, {source}, {4 * i};"]
                body += [f"lop3.b32 {name}{i}, s, 0x000f000f, 0x43004300, 0xEA;"]
        for half in range(2):
            sums = ", ".join(f"c{4 * half + i}" for i in range(4))
            one, two, x = 2 * half, 2 * half + 1, 16 + 4 * word + 2 * half
            body.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{sums}}}, "
                f"{{a{one}, b{one}, a{two}, b{two}}}, {{${x}, ${x + 1}}}, {{{sums}}};"
            )
    body += [f"mov.f32 ${i}, c{i};" for i in range(8)]
    return "\n".join(["{", *body, "}"])


def _e4m3_assembly() -> str:
    """Sums of half a tile of e4m3, operands as above but eight words of x, $16 to $23. Numbers are 2^-120 of what they
    stand for, and 0x7f, which is no number, is 480."""
    names = [f"{name}{i}" for name in ("a", "b") for i in range(2)] + ["s", "t"]
    body = [f".reg .b32 {', '.join(names)};", f".reg .f32 {', '.join(f'c{i}' for i in range(8))};"]
    body += [f"mov.f32 c{i}, ${24 + i};" for i in range(8)]
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${8 + 4 * row + word}"
            body += [f"shl.b32 t, {source}, 8;", f"shl.b32 s, {source}, 4;", "and.b32 s, s, 0x07f007f0;"]
            body += [f"lop3.b32 {name}0, t, 0x80008000, s, 0xEA;"]
            body += [f"shr.u32 s, {source}, 4;", "and.b32 s, s, 0x07f007f0;"]
            body += [f"lop3.b32 {name}1, {source}, 0x80008000, s, 0xEA;"]
        sums = ", ".join(f"c{4 * (word % 2) + i}" for i in range(4))
        body.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{sums}}}, {{a0, b0, a1, b1}}, "
            f"{{${16 + 2 * word}, ${17 + 2 * word}}}, {{{sums}}};"
        )
    body += [f"mov.f32 ${i}, c{i};" for i in range(8)]
    return "\n".join(["{", *body, "}"])


_TILES = [gl.constexpr(_tile_assembly(wide)) for wide in range(4)]
_TILE_0, _TILE_1, _TILE_2, _TILE_3 = _TILES
_TILE_OPERANDS = gl.constexpr(",".join(["=f"] * 8 + ["r"] * 24 + ["f"] * 8 + ["r"] * 3))
_E4M3 = gl.constexpr(_e4m3_assembly())
_E4M3_OPERANDS = gl.constexpr(",".join(["=f"] * 8 + ["r"] * 16 + ["f"] * 8))


@gluon.jit
def uint4_sums(acc, w, v, x0, x1, x2, x3, multipliers, WIDE: gl.constexpr):
    """Two accumulators and a tile's products: codes w and v of a thread's two rows, x in words."""
    floats: gl.constexpr = (
        gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32
    )  # fmt: skip
    ASSEMBLY: gl.constexpr = _TILE_0 if WIDE == 0 else _TILE_1 if WIDE == 1 else _TILE_2 if WIDE == 2 else _TILE_3
    return gl.inline_asm_elementwise(
        ASSEMBLY,
        _TILE_OPERANDS,
        [w[0], w[1], w[2], w[3], v[0], v[1], v[2], v[3],
         x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3],
         x2[0], x2[1], x2[2], x2[3], x3[0], x3[1], x3[2], x3[3],
         acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7],
         multipliers[0], multipliers[1], multipliers[2]],
        dtype=floats,
        is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def e4m3_sums(acc, w, v, x0, x1):
    """The same of half a tile of e4m3."""
    floats: gl.constexpr = (
        gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _E4M3,
        _E4M3_OPERANDS,
        [w[0], w[1], w[2], w[3], v[0], v[1], v[2], v[3],
         x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3],
         acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7]],
        dtype=floats,
        is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def row_of(unit, within, outputs, GATED: gl.constexpr):
    """The row of W of one of a unit's 16; of gated ones the last eight are the up halves of the first."""
    if GATED:
        row = unit * 8 + within % 8 + within // 8 * outputs
    else:
        row = unit * 16 + within
    return row.to(gl.int64)


@gluon.jit
def ask_for_tile(slot, first, second, go, HALVES: gl.constexpr):
    """Ask for a thread's part of a tile, 16 bytes of each 64 of two rows."""
    for i in gl.static_range(HALVES):
        copy(slot + i * 1024, first + i * 64, go, 16)
        copy(slot + i * 1024 + 512, second + i * 64, go, 16)
    commit(slot)


@gluon.jit
def run_sums(
    start_0,
    start_1,
    slot,
    column_slot,
    own_x,
    no_x,
    first,
    second,
    go,
    multipliers,
    RUN: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    HALVES: gl.constexpr,
):
    """The sums of a run that lies in the ring at ``slot``, in place of which the run at ``first`` and ``second`` is
    asked for: of rows r and r + 8, each of two columns, which begin with start_0 and start_1."""
    nothing = start_0 * 0.0
    acc = (start_0, start_1, start_0, start_1, nothing, nothing, nothing, nothing)
    for i in gl.static_range(RUN):
        wait_for_all_but(slot, TILES - 1)
        here = slot + i * (1024 * HALVES)
        w, v = load_4(here), load_4(here + 512)
        at = gl.where(column_slot == i, own_x, no_x)
        x0, x1, x2, x3 = load_4(at), load_4(at + 64), load_4(at + 128), load_4(at + 192)
        if HALVES == 1:
            acc = uint4_sums(acc, w, v, x0, x1, x2, x3, multipliers, WIDE)
        else:
            acc = e4m3_sums(acc, w, v, x0, x1)
            acc = e4m3_sums(acc, load_4(here + 1024), load_4(here + 1536), x2, x3)
        ask_for_tile(here, first + i * (64 * HALVES), second + i * (64 * HALVES), go, HALVES)
    return acc[0] + acc[4], acc[1] + acc[5], acc[2] + acc[6], acc[3] + acc[7]


@gluon.jit
def chunk_of(thread, i, THREADS: gl.constexpr, LAST: gl.constexpr):
    """The i-th eight inputs that a thread prepares; where there is none, of the last group again, with its lanes."""
    chunk = thread + i * THREADS
    return gl.where(chunk <= LAST, chunk, LAST - 15 + thread % 16)


@gluon.jit
def load_inputs(x_ptr, chunk, rows, x_stride, COLUMNS: gl.constexpr):
    """Eight inputs of a row of x, in words; of rows that are not there, the last one's."""
    row = gl.minimum(chunk // (COLUMNS // 8), rows - 1)
    return load_global_4(x_ptr + row.to(gl.int64) * x_stride + chunk % (COLUMNS // 8) * 4)


@gluon.jit
def square_sum(words):
    a, b, c, d = words
    square = low_float(a) * low_float(a) + high_float(a) * high_float(a)
    square += low_float(b) * low_float(b) + high_float(b) * high_float(b)
    square += low_float(c) * low_float(c) + high_float(c) * high_float(c)
    return square + low_float(d) * low_float(d) + high_float(d) * high_float(d)


@gluon.jit
def normed(words, factors, UNIT_OFFSET: gl.constexpr):
    a, b, c, d = words
    fa, fb, fc, fd = factors
    if UNIT_OFFSET:
        result = (
            times_plus(a, fa, a),
            times_plus(b, fb, b),
            times_plus(c, fc, c),
            times_plus(d, fd, d),
        )
    else:
        none = a * 0 - 2147450880  # -0, twice
        result = (
            times_plus(a, fa, none),
            times_plus(b, fb, none),
            times_plus(c, fc, none),
            times_plus(d, fd, none),
        )
    return result


@gluon.jit
def input_sum(words):
    a, b, c, d = words
    total = low_float(a) + high_float(a) + low_float(b) + high_float(b)
    return total + low_float(c) + high_float(c) + low_float(d) + high_float(d)


@gluon.jit
def added(totals, DISTANCE: gl.constexpr):
    """Each with what the lane has for it whose number differs in one bit."""
    sums = ()
    for i in gl.static_range(len(totals)):
        sums += (totals[i] + other_lane(totals[i], DISTANCE),)
    return sums


@gluon.jit
def lifted(words):
    """Inputs times 2^64."""
    a, b, c, d = words
    none = a * 0 - 2147450880  # -0, twice
    factor = a * 0 + 0x5F805F80
    return (
        times_plus(a, factor, none),
        times_plus(b, factor, none),
        times_plus(c, factor, none),
        times_plus(d, factor, none),
    )


@gluon.jit
def keep_inputs(words, at, chunk, HALVES: gl.constexpr):
    """Leave eight inputs where products take them from, in the order of a word of codes, or of two."""
    a, b, c, d = words
    at += chunk // 16 * 256
    if HALVES == 1:
        at += chunk % 4 * 64 + chunk // 4 % 4 * 16
        store_4(at, low_halves(a, c), high_halves(a, c), low_halves(b, d), high_halves(b, d))
    else:
        at += chunk // 8 % 2 * 128 + chunk % 2 * 64 + chunk // 2 % 4 * 16
        store_4(at, low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d))


@gluon.jit
def keep_sums(at, u0, u1, l0, l1, r, q, ROWS: gl.constexpr):
    """Leave a unit's sums, [ROWS, 16]: of rows r (u) and r + 8 (l), each of two columns, which are added where they
    are of the same row of x. ROWS 1: u0 and l0 alone."""
    odd = q % 2 == 1
    high = q >= 2
    if ROWS == 1:
        total = gl.where(odd, l0, u0) + other_lane(gl.where(odd, u0, l0), 1)
        total += other_lane(total, 2)
        store_float(at + (r + q % 2 * 8) * 4, total)
    elif ROWS == 2:
        first = gl.where(odd, l0, u0) + other_lane(gl.where(odd, u0, l0), 1)
        second = gl.where(odd, l1, u1) + other_lane(gl.where(odd, u1, l1), 1)
        total = gl.where(high, second, first) + other_lane(gl.where(high, first, second), 2)
        store_float(at + q // 2 * 64 + (r + q % 2 * 8) * 4, total)
    elif ROWS == 4:
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
def load_minus(at_0, at_1, slot_0, slot_1, part, RUN: gl.constexpr):
    """The sums of x of the groups that a thread's two columns are of, less than zero; of columns without one, zero."""
    one = load_float(at_0 + part * (RUN * 4))
    two = load_float(at_1 + part * (RUN * 4))
    return gl.where(slot_0 < RUN, one, 0.0), gl.where(slot_1 < RUN, two, 0.0)


@gluon.jit
def result_of(number, pid, PER_UNIT: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Which of its units, which row of x and which output one of a program's results is of."""
    unit = number // (PER_UNIT * ROWS)
    return (
        unit,
        number // PER_UNIT % ROWS,
        (pid + unit * PROGRAMS) * PER_UNIT + number % PER_UNIT,
    )


@gluon.jit
def act(x, ACTIVATION: gl.constexpr):
    if ACTIVATION == "silu":
        y = x / (1.0 + gl.exp(-x))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + gl.exp(-2.0 * inner))
    return y


@gluon.jit(do_not_specialize=["rows", "outputs"])
def codes_ring_kernel(
    x_ptr,  # [rows, COLUMNS / 2], words of two bfloat16 numbers
    w_ptr,  # [O, COLUMNS / 2] or [O, COLUMNS] bytes
    scales_ptr,  # of 4 bits [O, COLUMNS / 128] bfloat16 or float16, of e4m3 [O]
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
    KIND: gl.constexpr,  # "uint4" or "e4m3"
    COLUMNS: gl.constexpr,
    ZERO: gl.constexpr,
    FP16: gl.constexpr,  # of scales
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_NORM: gl.constexpr,  # of one row
    UNIT_OFFSET: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ROWS: gl.constexpr,  # 1, 2, 4 or 8
    WARPS: gl.constexpr,
    RUN: gl.constexpr,  # groups of a run, at most 8 / ROWS
    AHEAD: gl.constexpr,  # runs that the ring holds
    WIDE: gl.constexpr,  # of three shifts of a word those that are products, which the other pipe does
    PROGRAMS: gl.constexpr,
    UNITS: gl.constexpr,  # the most that a program has
    PDL: gl.constexpr,
):
    GATED: gl.constexpr = ACTIVATION != ""
    THREADS: gl.constexpr = 32 * WARPS
    GROUPS: gl.constexpr = COLUMNS // 128
    SHARE: gl.constexpr = GROUPS // WARPS  # groups of a warp
    RUNS: gl.constexpr = SHARE // RUN  # of a unit
    TILES: gl.constexpr = AHEAD * RUN
    PER_UNIT: gl.constexpr = 8 if GATED else 16
    PITCH: gl.constexpr = 2 * GROUPS + 16  # bytes between rows of scales: eight of them in different banks
    PARTS: gl.constexpr = GROUPS // 8  # 16 bytes each, of a row of scales
    HALVES: gl.constexpr = 2 if KIND == "e4m3" else 1  # of a tile, 64 bytes of a row each
    ROW: gl.constexpr = COLUMNS * HALVES // 2
    X: gl.constexpr = WARPS * TILES * HALVES * 1024
    NO_X: gl.constexpr = X + 2 * ROWS * COLUMNS
    SUMS: gl.constexpr = NO_X + 512
    SQUARES: gl.constexpr = SUMS + 4 * ROWS * GROUPS
    MULTIPLIERS: gl.constexpr = SQUARES + 64
    SCALES: gl.constexpr = MULTIPLIERS + 16
    ZEROS: gl.constexpr = SCALES + (UNITS * 16 * PITCH if HALVES == 1 else 0)
    PARTIAL: gl.constexpr = ZEROS + (UNITS * 16 * GROUPS if HAS_ZEROS else 0)
    BYTES: gl.constexpr = PARTIAL + UNITS * WARPS * ROWS * 64
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    whole = gl.allocate_shared_memory(gl.int32, [(BYTES + 255) // 256, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    nothing = gl.zeros([64], gl.int32, ONE)
    whole.index(NO_X // 256).store(nothing)
    whole.index(NO_X // 256 + 1).store(nothing)
    pid = gl.program_id(0)
    thread = gl.arange(0, THREADS, layout=ONE)
    warp = thread // 32
    r = thread % 32 // 4
    q = thread % 4
    base = shared_base(thread * 0)
    units = (outputs // PER_UNIT - pid + PROGRAMS - 1) // PROGRAMS

    if HALVES == 1:
        for i in gl.static_range((UNITS * 16 * PARTS + THREADS - 1) // THREADS):
            piece = thread + i * THREADS
            row = piece // PARTS
            place = row_of(pid + row // 16 * PROGRAMS, row % 16, outputs, GATED) * GROUPS + piece % PARTS * 8
            present = (row // 16 < units).to(gl.int32)
            copy(base + SCALES + row * PITCH + piece % PARTS * 16, scales_ptr + place, present, 16)
            if HAS_ZEROS:
                copy(base + ZEROS + piece * 8, zeros_ptr + place, present, 8)
    commit(thread)
    slot = base + warp * (TILES * HALVES * 1024) + thread % 32 * 16
    w_ptr += warp * (SHARE * HALVES * 64) + q * 16
    for i in gl.static_range(TILES):
        codes = w_ptr + i // RUN % RUNS * (RUN * HALVES * 64) + i % RUN * (HALVES * 64)
        first = codes + row_of(pid + i // (RUN * RUNS) * PROGRAMS, r, outputs, GATED) * ROW
        second = codes + row_of(pid + i // (RUN * RUNS) * PROGRAMS, r + 8, outputs, GATED) * ROW
        go = (i // (RUN * RUNS) < units).to(gl.int32) + thread * 0
        ask_for_tile(slot + i * (HALVES * 1024), first, second, go, HALVES)

    CHUNKS: gl.constexpr = (ROWS * COLUMNS // 8 + THREADS - 1) // THREADS  # of a thread
    LAST: gl.constexpr = ROWS * COLUMNS // 8 - 1
    factors = ()
    if HAS_NORM:
        for i in gl.static_range(CHUNKS):
            factors += (load_global_4(norm_ptr + chunk_of(thread, i, THREADS, LAST) * 4),)
    RESULTS: gl.constexpr = (UNITS * PER_UNIT * ROWS + THREADS - 1) // THREADS  # of a thread
    row_scales = ()  # less the lifts of codes and x
    if HALVES == 2:
        for i in gl.static_range(RESULTS):
            unit, m, n = result_of(thread + i * THREADS, pid, PER_UNIT, ROWS, PROGRAMS)
            row_scale = gl.load(scales_ptr + n, mask=unit < units, other=0.0).to(gl.float32) * 72057594037927936.0
            up_scale = row_scale
            if GATED:
                up_scale = gl.load(scales_ptr + outputs + n, mask=unit < units, other=0.0).to(gl.float32)
                up_scale *= 72057594037927936.0  # 2^(120 - 64)
            row_scales += ((row_scale, up_scale),)
    biases = ()
    if HAS_BIAS:
        for i in gl.static_range(RESULTS):
            unit, m, n = result_of(thread + i * THREADS, pid, PER_UNIT, ROWS, PROGRAMS)
            bias = gl.load(bias_ptr + n, mask=unit < units, other=0.0).to(gl.float32)
            up_bias = bias
            if GATED:
                up_bias = gl.load(bias_ptr + outputs + n, mask=unit < units, other=0.0).to(gl.float32)
            biases += ((bias, up_bias),)
    store_4(
        base + MULTIPLIERS + thread * 0, thread * 0 + (1 << 28), thread * 0 + (1 << 24), thread * 0 + (1 << 20), thread
    )
    if PDL:
        launch_dependents_and_wait(thread)

    squares = thread * 0.0
    for i in gl.static_range(0, CHUNKS, 8):
        inputs = ()
        for j in gl.static_range(8):
            if i + j < CHUNKS:
                inputs += (
                    load_inputs(
                        x_ptr,
                        chunk_of(thread, i + j, THREADS, LAST),
                        rows,
                        x_stride,
                        COLUMNS,
                    ),
                )
        totals = ()
        for j in gl.static_range(8):
            if i + j < CHUNKS:
                words = inputs[j]
                if HAS_NORM:
                    squares += gl.where(thread + (i + j) * THREADS <= LAST, square_sum(words), 0.0)
                    words = normed(words, factors[i + j], UNIT_OFFSET)
                if HALVES == 2:
                    words = lifted(words)
                else:
                    totals += (input_sum(words),)
                keep_inputs(words, base + X, chunk_of(thread, i + j, THREADS, LAST), HALVES)
        totals = added(added(added(added(totals, 1), 2), 4), 8)  # of a group's 16 lanes
        for j in gl.static_range(8):
            if i + j < CHUNKS and HALVES == 1:
                store_float(base + SUMS + chunk_of(thread, i + j, THREADS, LAST) // 16 * 4, -totals[j])
    residuals = ()
    if HAS_RESIDUAL:
        for i in gl.static_range(RESULTS):
            unit, m, n = result_of(thread + i * THREADS, pid, PER_UNIT, ROWS, PROGRAMS)
            source = residual_ptr + m.to(gl.int64) * residual_stride + n
            residuals += (gl.load(source, mask=(unit < units) & (m < rows), other=0.0).to(gl.float32),)
    if HAS_NORM:
        store_float(base + SQUARES + warp * 4, lane_sum(squares, 32))
    wait_for_all_but(thread, TILES)
    barrier()

    column_slot = r // ROWS  # of the column that the thread loads x for, and of the two that it has sums of
    own_x = base + X + (r % ROWS * GROUPS + warp * SHARE + column_slot) * 256 + q * 16
    slot_0 = 2 * q // ROWS
    slot_1 = (2 * q + 1) // ROWS
    group_0 = warp * SHARE + gl.minimum(slot_0, RUN - 1)
    group_1 = warp * SHARE + gl.minimum(slot_1, RUN - 1)
    minus_0 = base + SUMS + (2 * q % ROWS * GROUPS + group_0) * 4
    minus_1 = base + SUMS + ((2 * q + 1) % ROWS * GROUPS + group_1) * 4
    minus = ()  # the sums of x of a run's groups, less than zero
    if RUNS <= 2 and HALVES == 1:
        for part in gl.static_range(RUNS):
            minus += (load_minus(minus_0, minus_1, slot_0, slot_1, part, RUN),)
    no_x = base + NO_X + 64 + q * 16  # in other banks than x
    multipliers = load_4(base + MULTIPLIERS + thread * 0)
    ring = 0  # the oldest run in the ring
    for unit in range(units):
        total = (thread * 0.0, thread * 0.0, thread * 0.0, thread * 0.0)
        for part in gl.static_range(RUNS):
            coming = unit + (part + AHEAD) // RUNS  # the unit whose run is asked for
            next_at = w_ptr + (part + AHEAD) % RUNS * (RUN * HALVES * 64)
            if HALVES == 2:
                m0, m1 = thread * 0.0, thread * 0.0
            elif RUNS <= 2:
                m0, m1 = minus[part]
            else:
                m0, m1 = load_minus(minus_0, minus_1, slot_0, slot_1, part, RUN)
            u0, u1, l0, l1 = run_sums(
                m0 * (128.0 + ZERO),
                m1 * (128.0 + ZERO),
                slot + ring * (RUN * HALVES * 1024),
                column_slot,
                own_x + part * (RUN * 256),
                no_x,
                next_at + row_of(pid + coming * PROGRAMS, r, outputs, GATED) * ROW,
                next_at + row_of(pid + coming * PROGRAMS, r + 8, outputs, GATED) * ROW,
                (coming < units).to(gl.int32) + thread * 0,
                multipliers,
                RUN,
                TILES,
                WIDE,
                HALVES,
            )
            row = unit * 16 + r
            if HAS_ZEROS:
                at = base + ZEROS + row * GROUPS + part * RUN
                u0 += load_byte(at + group_0) * m0
                l0 += load_byte(at + group_0 + 8 * GROUPS) * m0
                u1 += load_byte(at + group_1) * m1
                l1 += load_byte(at + group_1 + 8 * GROUPS) * m1
            upper, lower = thread * 0.0 + 1.0, thread * 0.0 + 1.0
            if HALVES == 1:
                at = base + SCALES + row * PITCH + part * (RUN * 2)
                upper = load_half(at + group_0 * 2, FP16)
                lower = load_half(at + group_0 * 2 + 8 * PITCH, FP16)
            if ROWS == 1:
                upper_1, lower_1 = upper, lower
                if HALVES == 1:
                    at = base + SCALES + row * PITCH + part * (RUN * 2)
                    upper_1 = load_half(at + group_1 * 2, FP16)
                    lower_1 = load_half(at + group_1 * 2 + 8 * PITCH, FP16)
                total = (total[0] + (u0 * upper + u1 * upper_1), u1, total[2] + (l0 * lower + l1 * lower_1), l1)
            else:
                total = (total[0] + u0 * upper, total[1] + u1 * upper, total[2] + l0 * lower, total[3] + l1 * lower)
            ring = ring + 1
            ring = gl.where(ring == AHEAD, 0, ring) if AHEAD > 1 else 0
        at = base + PARTIAL + (unit * WARPS + warp) * (ROWS * 64)
        keep_sums(at, total[0], total[1], total[2], total[3], r, q, ROWS)
    barrier()

    scale = thread * 0.0 + 1.0
    if HAS_NORM:
        total_squares = thread * 0.0
        for i in gl.static_range(WARPS):
            total_squares += load_float(base + SQUARES + i * 4 + thread * 0)
        scale = gl.rsqrt(total_squares / COLUMNS + eps)
    for i in gl.static_range(RESULTS):
        unit, m, n = result_of(thread + i * THREADS, pid, PER_UNIT, ROWS, PROGRAMS)
        at = base + PARTIAL + (gl.minimum(unit, UNITS - 1) * WARPS * ROWS + m) * 64 + thread % PER_UNIT * 4
        value, up = thread * 0.0, thread * 0.0
        for j in gl.static_range(WARPS):
            value += load_float(at + j * (ROWS * 64))
            if GATED:
                up += load_float(at + j * (ROWS * 64) + 32)
        value *= scale
        if HALVES == 2:
            value *= row_scales[i][0]
        if HAS_BIAS:
            value += biases[i][0]
        if GATED:
            up *= scale
            if HALVES == 2:
                up *= row_scales[i][1]
            if HAS_BIAS:
                up += biases[i][1]
            value = act(value, ACTIVATION) * up
        if HAS_RESIDUAL:
            value += residuals[i]
        live = (unit < units) & (m < rows)
        gl.store(
            out_ptr + m.to(gl.int64) * out_stride + n,
            value.to(out_ptr.dtype.element_ty),
            mask=live,
        )
    whole._keep_alive()
