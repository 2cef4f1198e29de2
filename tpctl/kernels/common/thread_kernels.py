"""What one thread of a Gluon program does, said in assembly: every tensor has a number for each thread, a register.

So nothing moves between threads but where it is said, and what is read stays before what is computed from it.
Addresses are of shared memory, in bytes, unless they are pointers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.7 and 3.6 call it

_HALF = gl.constexpr("{ .reg .b16 h; ld.shared.b16 h, [$1]; mov.b32 $0, {0, h}; }")
_HALF_FP16 = gl.constexpr("{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.f32.f16 $0, h; }")


@gluon.jit
def shared_base(like):
    """Where the program's shared memory begins. It must have been allocated, as one."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1) + like


@gluon.jit
def launch_dependents_and_wait(like):
    """Let the next kernel start, and wait for the one before."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;",
        "=r,r",
        [like],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def launch_dependents(like):
    """Let the next kernel start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_kernel_before(like):
    """Wait until the kernel before has ended, and what it wrote can be seen."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def copy(to, source, go, BYTES: gl.constexpr):
    """Ask for 4, 8 or 16 bytes to come from global to shared memory, where ``go`` is not 0."""
    COPY: gl.constexpr = "cp.async.cg.shared.global.L2::128B" if BYTES == 16 else "cp.async.ca.shared.global"
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p {COPY} [$1], [$2], {BYTES}; mov.b32 $0, 0; }}",
        "=r,r,l,r",
        [to, source, go],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def copy_around(to, source, go):
    """Ask for the word of global memory, 4 bytes, that a byte is in, where ``go`` is not 0."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b64 a; setp.ne.b32 p, $3, 0; and.b64 a, $2, -4; "
        "@p cp.async.ca.shared.global [$1], [a], 4; mov.b32 $0, 0; }",
        "=r,r,l,r",
        [to, source, go],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def commit(like):
    """Make a group of what a thread has asked for since the last one."""
    gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, $1;",
        "=r,r",
        [like],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for_all_but(like, COUNT: gl.constexpr):
    """Wait until a thread's own copies have come, but those of the COUNT latest groups."""
    gl.inline_asm_elementwise(
        f"cp.async.wait_group {COUNT}; mov.b32 $0, $1;",
        "=r,r",
        [like],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_4(at):
    """Four words."""
    words: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [at],
        dtype=words,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_global_4(pointers):
    """Four words of global memory."""
    words: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [pointers],
        dtype=words,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_4(at, a, b, c, d):
    gl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;",
        "=r,r,r,r,r,r",
        [at, a, b, c, d],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_float(at):
    return gl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def load_power(at):
    """Two to the power of a byte less 127, as scales of bytes are: of 0 it is 0, of 255 infinite."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 e; ld.shared.u8 e, [$1]; shl.b32 $0, e, 23; }",
        "=f,r",
        [at],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_half(at, FP16: gl.constexpr):
    """A bfloat16 or float16 number, in float32."""
    ASSEMBLY: gl.constexpr = _HALF_FP16 if FP16 else _HALF
    return gl.inline_asm_elementwise(ASSEMBLY, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def load_byte(at):
    """A byte, as a number in float32."""
    return gl.inline_asm_elementwise("ld.shared.u8 $0, [$1];", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1).to(
        gl.float32
    )


@gluon.jit
def store_float(at, value):
    gl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;",
        "=r,r,f",
        [at, value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def other_lane(value, DISTANCE: gl.constexpr):
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
def from_lane(value, lane):
    """What another lane has, an int32."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
        "=r,r,r",
        [value, lane],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def most_of_lanes(value):
    """The largest int32 of a warp."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def lanes_where(value):
    """A bit for each lane of a warp whose int32 is not 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def first_lane(lanes):
    """The lowest bit that is set, of one at least."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; brev.b32 t, $1; clz.b32 $0, t; }", "=r,r", [lanes], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def lane_sum(value, LANES: gl.constexpr):
    """The sum over as many neighbouring lanes, in each of them."""
    value += other_lane(value, 1)
    value += other_lane(value, 2)
    if LANES > 4:
        value += other_lane(value, 4)
        value += other_lane(value, 8)
    if LANES > 16:
        value += other_lane(value, 16)
    return value


@gluon.jit
def low_halves(a, b):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;",
        "=r,r,r",
        [a, b],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def high_halves(a, b):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;",
        "=r,r,r",
        [a, b],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def times_plus(x, factor, added):
    """x * factor + added, of words of two bfloat16 numbers."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [x, factor, added],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def low_float(word):
    """The first of a word's two bfloat16 numbers."""
    return (word << 16).to(gl.float32, bitcast=True)


@gluon.jit
def high_float(word):
    return (word & -65536).to(gl.float32, bitcast=True)
