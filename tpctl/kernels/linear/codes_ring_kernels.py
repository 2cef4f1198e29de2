"""The device code of `codes_ring`: 4-bit codes come through a ring in shared memory, many copies ahead of the products.

Every tensor here has a number for each thread of a program, so that it is a register, and what a thread does is said
in assembly where Triton would move data between threads, or loads behind products. A thread reads back from the ring
only what it asked for itself, so that its warp never waits for another one before its sums are complete.

A warp takes a run of groups (128 inputs, 64 bytes of a row) of 16 rows, a unit. Thread (r, q) has rows r and r + 8,
and of a group the 32 inputs 32 q. Of the eight columns that a product has, one row of x fills as many as a run has
groups: in column n all inputs but those of the run's group n are zero, and so the sums of several groups are in one
accumulator, each where the thread is that scales it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.7 and 3.6 call it


def _tile_assembly() -> str:
    """Sums of a tile. $0 to $7: two accumulators; $8 to $11, $12 to $15: words of codes of rows r and r + 8; $16 to
    $31: words of x; $32 to $39: the accumulators before."""
    names = [f"{name}{i}" for name in ("a", "b") for i in range(4)] + ["s"]
    body = [f".reg .b32 {', '.join(names)};", f".reg .f32 {', '.join(f'c{i}' for i in range(8))};"]
    body += [f"mov.f32 c{i}, ${32 + i};" for i in range(8)]
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${8 + 4 * row + word}"
            body.append(f"lop3.b32 {name}0, {source}, 0x000f000f, 0x43004300, 0xEA;")
            for i in range(1, 4):
                body += [f"shr.u32 s, {source}, {4 * i};", f"lop3.b32 {name}{i}, s, 0x000f000f, 0x43004300, 0xEA;"]
        for half in range(2):
            sums = ", ".join(f"c{4 * half + i}" for i in range(4))
            one, two = f"{2 * half}", f"{2 * half + 1}"
            x = 16 + 4 * word + 2 * half
            body.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{sums}}}, "
                f"{{a{one}, b{one}, a{two}, b{two}}}, {{${x}, ${x + 1}}}, {{{sums}}};"
            )
    body += [f"mov.f32 ${i}, c{i};" for i in range(8)]
    return "\n".join(["{", *body, "}"])


_TILE = gl.constexpr(_tile_assembly())
_TILE_OPERANDS = gl.constexpr(",".join(["=f"] * 8 + ["r"] * 24 + ["f"] * 8))
_LOAD_4 = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_GLOBAL_4 = gl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_STORE_4 = gl.constexpr("st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;")
_TIMES = gl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
_LOAD_BF16 = gl.constexpr("{ .reg .b16 h; ld.shared.b16 h, [$1]; mov.b32 $0, {0, h}; }")


@gluon.jit
def _shared_base(like):
    """Where the program's shared memory begins, for each thread."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1) + like


@gluon.jit
def copy_16(to, source, go, HINT: gl.constexpr):
    """Ask for 16 bytes to come from global to shared memory, where ``go`` is not 0."""
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global{HINT} [$1], [$2], 16; mov.b32 $0, 0; }}",
        "=r,r,l,r",
        [to, source, go],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def commit(like):
    gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, $1;", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_all_but(like, COUNT: gl.constexpr):
    """Wait until a thread's own copies have come, but those of the COUNT latest groups."""
    gl.inline_asm_elementwise(
        f"cp.async.wait_group {COUNT}; mov.b32 $0, $1;", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_4(at):
    """Four words of shared memory."""
    words: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(_LOAD_4, "=r,=r,=r,=r,r", [at], dtype=words, is_pure=False, pack=1)


@gluon.jit
def load_global_4(pointers):
    """Four words of global memory."""
    words: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(_LOAD_GLOBAL_4, "=r,=r,=r,=r,l", [pointers], dtype=words, is_pure=False, pack=1)


@gluon.jit
def store_4(at, a, b, c, d):
    gl.inline_asm_elementwise(_STORE_4, "=r,r,r,r,r,r", [at, a, b, c, d], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_float(at):
    return gl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def load_bf16(at):
    """A bfloat16 number of shared memory, in float32."""
    return gl.inline_asm_elementwise(_LOAD_BF16, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def store_float(at, value):
    gl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at, value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def other_lanes(value, DISTANCE: gl.constexpr):
    """What the lane has whose number differs in one bit."""
    return gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 0x1f, 0xffffffff;",
        "=f,f",
        [value],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def low_halves(a, b):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def high_halves(a, b):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def times(x, factor, added):
    """x * factor + added, of words of two bfloat16 numbers."""
    return gl.inline_asm_elementwise(_TIMES, "=r,r,r,r", [x, factor, added], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def low_float(word):
    return (word << 16).to(gl.float32, bitcast=True)


@gluon.jit
def high_float(word):
    return (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def tile_sums(acc, w, v, x0, x1, x2, x3):
    """Two accumulators and a tile's products: codes w and v of a thread's two rows, x in words."""
    floats: gl.constexpr = (
        gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _TILE,
        _TILE_OPERANDS,
        [w[0], w[1], w[2], w[3], v[0], v[1], v[2], v[3],
         x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3],
         x2[0], x2[1], x2[2], x2[3], x3[0], x3[1], x3[2], x3[3],
         acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7]],
        dtype=floats,
        is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def run_sums(
    minus_sums,
    slot,
    r,
    own_x,
    no_x,
    held,
    first,
    second,
    go,
    RUN: gl.constexpr,
    TILES: gl.constexpr,
    HELD: gl.constexpr,
    HINT: gl.constexpr,
):
    """Two accumulators of a run that lies in the ring at ``slot``, where the run at ``first`` and ``second`` is asked
    for in its place."""
    one, two = minus_sums
    nothing = one * 0.0
    acc = (one, two, one, two, nothing, nothing, nothing, nothing)
    for i in gl.static_range(RUN):
        wait_for_all_but(r, TILES - 1)
        w = load_4(slot + i * 1024)
        v = load_4(slot + i * 1024 + 512)
        if HELD:
            x = held[i]
        else:
            at = gl.where(r == i, own_x, no_x)
            x = (load_4(at), load_4(at + 64), load_4(at + 128), load_4(at + 192))
        acc = tile_sums(acc, w, v, x[0], x[1], x[2], x[3])
        copy_16(slot + i * 1024, first + i * 64, go, HINT)
        copy_16(slot + i * 1024 + 512, second + i * 64, go, HINT)
        commit(r)
    return acc


@gluon.jit
def gated(gate, up, ACTIVATION: gl.constexpr):
    if ACTIVATION == "silu":
        value = gate / (1.0 + gl.exp(-gate))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + gl.exp(-2.0 * inner))
    return value * up


@gluon.jit
def row_of(unit, within, outputs, GATED: gl.constexpr):
    """The row of W of one of a unit's 16; of gated ones the last eight are the up halves of the first."""
    if GATED:
        row = unit * 8 + within % 8 + within // 8 * outputs
    else:
        row = unit * 16 + within
    return row


@gluon.jit(do_not_specialize=["outputs"])
def codes_ring_kernel(
    x_ptr,  # [COLUMNS / 2], words of two bfloat16 numbers
    w_ptr,  # [rows, COLUMNS / 2]
    scales_ptr,  # [rows, COLUMNS / 128] bfloat16
    out_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,  # as x
    outputs,
    eps,
    COLUMNS: gl.constexpr,
    ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_NORM: gl.constexpr,
    UNIT_OFFSET: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WARPS: gl.constexpr,
    RUN: gl.constexpr,  # groups of a run, at most 8
    AHEAD: gl.constexpr,  # runs that the ring holds
    HELD: gl.constexpr,  # whether x is kept in registers
    HINT: gl.constexpr,  # bytes that the L2 cache is to fetch around those that are asked for, as PTX has it
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
    X: gl.constexpr = WARPS * TILES * 1024
    ZEROS: gl.constexpr = X + 2 * COLUMNS + 64  # in other banks than x
    SUMS: gl.constexpr = X + 2 * COLUMNS + 512
    SQUARES: gl.constexpr = SUMS + 4 * GROUPS
    SCALES: gl.constexpr = SQUARES + 4 * WARPS + (16 - 4 * (GROUPS + WARPS) % 16) % 16
    PARTIAL: gl.constexpr = SCALES + UNITS * 16 * PITCH
    BYTES: gl.constexpr = PARTIAL + UNITS * RUNS * WARPS * 64
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    whole = gl.allocate_shared_memory(gl.int32, [(BYTES + 255) // 256, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros = gl.zeros([64], gl.int32, ONE)
    whole.index((ZEROS - 64) // 256).store(zeros)
    whole.index((ZEROS - 64) // 256 + 1).store(zeros)
    pid = gl.program_id(0)
    thread = gl.arange(0, THREADS, layout=ONE)
    lane = thread % 32
    warp = thread // 32
    r = lane // 4
    q = lane % 4
    base = _shared_base(thread * 0)
    units = (outputs // PER_UNIT - pid + PROGRAMS - 1) // PROGRAMS

    for i in gl.static_range((UNITS * 16 * PARTS + THREADS - 1) // THREADS):
        piece = thread + i * THREADS
        row = piece // PARTS
        unit = row // 16
        w_row = row_of(pid + unit * PROGRAMS, row % 16, outputs, GATED)
        source = scales_ptr + w_row.to(gl.int64) * GROUPS + piece % PARTS * 8
        copy_16(base + SCALES + row * PITCH + piece % PARTS * 16, source, (unit < units).to(gl.int32), "")
    commit(thread)

    slot = base + warp * (TILES * 1024) + lane * 16
    column = (warp * (SHARE * 64) + q * 16).to(gl.int64)
    ROW: gl.constexpr = COLUMNS // 2
    for run in gl.static_range(AHEAD):
        unit = run // RUNS
        first = row_of(pid + unit * PROGRAMS, r, outputs, GATED).to(gl.int64)
        second = row_of(pid + unit * PROGRAMS, r + 8, outputs, GATED).to(gl.int64)
        go = (unit < units).to(gl.int32) + thread * 0
        for i in gl.static_range(RUN):
            copy_16(slot + (run * RUN + i) * 1024, w_ptr + first * ROW + column + (run % RUNS * RUN + i) * 64, go, HINT)
            copy_16(
                slot + (run * RUN + i) * 1024 + 512,
                w_ptr + second * ROW + column + (run % RUNS * RUN + i) * 64,
                go,
                HINT,
            )
            commit(thread)

    CHUNKS: gl.constexpr = (COLUMNS // 8 + THREADS - 1) // THREADS
    factors = ()
    if HAS_NORM:
        for i in gl.static_range(CHUNKS):
            chunk = gl.minimum(thread + i * THREADS, COLUMNS // 8 - 1)
            factors += (load_global_4(norm_ptr + chunk * 4),)
    number = thread  # of one of the program's outputs
    live = number < units * PER_UNIT
    output = (pid + number // PER_UNIT * PROGRAMS) * PER_UNIT + number % PER_UNIT
    bias, up_bias = thread * 0.0, thread * 0.0
    if HAS_BIAS:
        bias = gl.load(bias_ptr + output, mask=live, other=0.0).to(gl.float32)
        if GATED:
            up_bias = gl.load(bias_ptr + outputs + output, mask=live, other=0.0).to(gl.float32)

    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32,
                                  is_pure=False, pack=1)  # fmt: skip
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32,
                                  is_pure=False, pack=1)  # fmt: skip

    inputs = ()
    for i in gl.static_range(CHUNKS):
        chunk = gl.minimum(thread + i * THREADS, COLUMNS // 8 - 1)
        inputs += (load_global_4(x_ptr + chunk * 4),)
    residual = thread * 0.0
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + output, mask=live, other=0.0).to(gl.float32)

    squares = thread * 0.0
    for i in gl.static_range(CHUNKS):
        a, b, c, d = inputs[i]
        chunk = thread + i * THREADS
        inside = chunk < COLUMNS // 8
        if HAS_NORM:
            square = low_float(a) * low_float(a) + high_float(a) * high_float(a)
            square += low_float(b) * low_float(b) + high_float(b) * high_float(b)
            square += low_float(c) * low_float(c) + high_float(c) * high_float(c)
            square += low_float(d) * low_float(d) + high_float(d) * high_float(d)
            squares += gl.where(inside, square, 0.0)
            minus = thread * 0 - 2147450880  # -0, twice
            fa, fb, fc, fd = factors[i]
            if UNIT_OFFSET:
                a, b, c, d = times(a, fa, a), times(b, fb, b), times(c, fc, c), times(d, fd, d)
            else:
                a, b, c, d = times(a, fa, minus), times(b, fb, minus), times(c, fc, minus), times(d, fd, minus)
        total = low_float(a) + high_float(a) + low_float(b) + high_float(b)
        total += low_float(c) + high_float(c) + low_float(d) + high_float(d)
        total += other_lanes(total, 1)
        total += other_lanes(total, 2)
        total += other_lanes(total, 4)
        total += other_lanes(total, 8)
        # The last threads of a program may have no chunk; they write the last one's again.
        chunk = gl.minimum(chunk, COLUMNS // 8 - 1)
        store_4(
            base + X + chunk // 16 * 256 + chunk % 4 * 64 + chunk // 4 % 4 * 16,
            low_halves(a, c), high_halves(a, c), low_halves(b, d), high_halves(b, d),
        )  # fmt: skip
        at = base + SUMS + chunk // 16 * 4
        store_float(gl.where(inside, at, base + BYTES - 4), total)
    if HAS_NORM:
        squares += other_lanes(squares, 1)
        squares += other_lanes(squares, 2)
        squares += other_lanes(squares, 4)
        squares += other_lanes(squares, 8)
        squares += other_lanes(squares, 16)
        store_float(base + SQUARES + warp * 4, squares)
    wait_for_all_but(thread, TILES)
    barrier()

    minus_sums = ()
    for part in gl.static_range(RUNS):
        at = base + SUMS + (warp * SHARE + part * RUN + gl.minimum(2 * q, RUN - 1)) * 4
        one = gl.where(2 * q < RUN, load_float(at) * (-128.0 - ZERO), 0.0)
        at = base + SUMS + (warp * SHARE + part * RUN + gl.minimum(2 * q + 1, RUN - 1)) * 4
        two = gl.where(2 * q + 1 < RUN, load_float(at) * (-128.0 - ZERO), 0.0)
        minus_sums += ((one, two),)
    own_x = base + X + (warp * SHARE + r) * 256 + q * 16
    no_x = base + ZEROS + q * 16
    scale_at = base + SCALES + r * PITCH + warp * SHARE * 2
    scale_0 = scale_at + gl.minimum(2 * q, RUN - 1) * 2
    scale_1 = scale_at + gl.minimum(2 * q + 1, RUN - 1) * 2
    sum_at = base + PARTIAL + warp * 64 + (r + q % 2 * 8) * 4
    odd = q % 2 == 1
    held = ()
    if HELD:
        for i in gl.static_range(RUN):
            at = gl.where(r == i, own_x, no_x)
            held += ((load_4(at), load_4(at + 64), load_4(at + 128), load_4(at + 192)),)

    ring = 0  # the oldest run in the ring
    for unit in range(units):
        for part in gl.static_range(RUNS):
            coming = unit + (part + AHEAD) // RUNS  # the unit whose run is asked for
            next_row = row_of(pid + coming * PROGRAMS, r, outputs, GATED).to(gl.int64)
            lower_row = row_of(pid + coming * PROGRAMS, r + 8, outputs, GATED).to(gl.int64)
            next_at = w_ptr + column + (part + AHEAD) % RUNS * (RUN * 64)
            acc = run_sums(
                minus_sums[part], slot + ring * (RUN * 1024), r, own_x + part * (RUN * 256), no_x, held,
                next_at + next_row * ROW, next_at + lower_row * ROW, (coming < units).to(gl.int32) + thread * 0,
                RUN, TILES, HELD, HINT,
            )  # fmt: skip
            shift = unit * (16 * PITCH) + part * RUN * 2
            upper = (acc[0] + acc[4]) * load_bf16(scale_0 + shift) + (acc[1] + acc[5]) * load_bf16(scale_1 + shift)
            shift += 8 * PITCH
            lower = (acc[2] + acc[6]) * load_bf16(scale_0 + shift) + (acc[3] + acc[7]) * load_bf16(scale_1 + shift)
            both = gl.where(odd, lower, upper) + other_lanes(gl.where(odd, upper, lower), 1)
            both += other_lanes(both, 2)
            store_float(sum_at + (unit * RUNS + part) * (WARPS * 64), both)
            ring = ring + 1
            ring = gl.where(ring == AHEAD, 0, ring) if AHEAD > 1 else 0
    barrier()

    value, up = bias * 0.0, bias * 0.0
    at = base + PARTIAL + gl.minimum(number // PER_UNIT, UNITS - 1) * (RUNS * WARPS * 64) + number % PER_UNIT * 4
    for i in gl.static_range(RUNS * WARPS):
        value += load_float(at + i * 64)
        if GATED:
            up += load_float(at + i * 64 + 32)
    if HAS_NORM:
        total = bias * 0.0
        for i in gl.static_range(WARPS):
            total += load_float(base + SQUARES + i * 4)
        scale = gl.rsqrt(total / COLUMNS + eps)
        value *= scale
        up *= scale
    value += bias
    if GATED:
        value = gated(value, up + up_bias, ACTIVATION)
    value += residual
    gl.store(out_ptr + output, value.to(out_ptr.dtype.element_ty), mask=live)
    whole._keep_alive()
