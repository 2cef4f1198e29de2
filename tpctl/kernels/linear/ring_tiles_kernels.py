"""What a warp of `codes_ring` does with a run: codes of the ring become numbers and meet the tensor cores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import commit, copy, load_4, wait_for_all_but

_PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def _sums_assembly(inputs: int, body: list[str]) -> str:
    """$0 to $7: two accumulators, c0 to c7; $8 to $11 and $12 to $15: words of codes of a thread's two rows; so many
    words of x; the accumulators before."""
    start = [".reg .b32 a0, a1, a2, a3, b0, b1, b2, b3, s, t;", ".reg .f32 c0, c1, c2, c3, c4, c5, c6, c7;"]
    start += [f"mov.f32 c{i}, ${16 + inputs + i};" for i in range(8)]
    return "\n".join(["{", *start, *body, *(f"mov.f32 ${i}, c{i};" for i in range(8)), "}"])


def _product(accumulator: int, first: int, second: int, x: int) -> str:
    """Of registers ``first`` and ``second`` of both rows, and two words of x."""
    sums = ", ".join(f"c{4 * accumulator + i}" for i in range(4))
    weights = f"a{first}, b{first}, a{second}, b{second}"
    return f"{_PRODUCT} {{{sums}}}, {{{weights}}}, {{${16 + x}, ${17 + x}}}, {{{sums}}};"


def _uint4() -> str:
    """A tile of 4-bit integers: a code c is the number 128 + c."""
    body = []
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${8 + 4 * row + word}"
            body.append(f"lop3.b32 {name}0, {source}, 0x000f000f, 0x43004300, 0xEA;")
            for i in range(1, 4):
                body += [f"shr.u32 s, {source}, {4 * i};", f"lop3.b32 {name}{i}, s, 0x000f000f, 0x43004300, 0xEA;"]
        body += [_product(0, 0, 1, 4 * word), _product(1, 2, 3, 4 * word + 2)]
    return _sums_assembly(16, body)


def _e4m3() -> str:
    """Half a tile of e4m3. Numbers are 2^-120 of what they stand for; 0x7f, which is no number, is 480."""
    body = []
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${8 + 4 * row + word}"
            body += [f"shl.b32 t, {source}, 8;", f"shl.b32 s, {source}, 4;", "and.b32 s, s, 0x07f007f0;"]
            body += [f"lop3.b32 {name}0, t, 0x80008000, s, 0xEA;"]
            body += [f"shr.u32 s, {source}, 4;", "and.b32 s, s, 0x07f007f0;"]
            body += [f"lop3.b32 {name}1, {source}, 0x80008000, s, 0xEA;"]
        body.append(_product(word % 2, 0, 1, 2 * word))
    return _sums_assembly(8, body)


_UINT4, _UINT4_OPERANDS = gl.constexpr(_uint4()), gl.constexpr(",".join(["=f"] * 8 + ["r"] * 24 + ["f"] * 8))
_E4M3, _E4M3_OPERANDS = gl.constexpr(_e4m3()), gl.constexpr(",".join(["=f"] * 8 + ["r"] * 16 + ["f"] * 8))
_SUMS = gl.constexpr((gl.float32,) * 8)


@gluon.jit
def uint4_sums(acc, w, v, x0, x1, x2, x3):
    """Two accumulators and a tile's products: codes w and v of a thread's two rows, x in words."""
    return gl.inline_asm_elementwise(
        _UINT4,
        _UINT4_OPERANDS,
        [w[0], w[1], w[2], w[3], v[0], v[1], v[2], v[3],
         x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3],
         x2[0], x2[1], x2[2], x2[3], x3[0], x3[1], x3[2], x3[3],
         acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7]],
        dtype=_SUMS,
        is_pure=False,  # else they sink behind the reads of the tiles that follow
        pack=1,
    )  # fmt: skip


@gluon.jit
def e4m3_sums(acc, w, v, x0, x1):
    """The same of half a tile."""
    return gl.inline_asm_elementwise(
        _E4M3,
        _E4M3_OPERANDS,
        [w[0], w[1], w[2], w[3], v[0], v[1], v[2], v[3],
         x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3],
         acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7]],
        dtype=_SUMS,
        is_pure=False,  # else they sink behind the reads of the tiles that follow
        pack=1,
    )  # fmt: skip


@gluon.jit
def row_of(unit, within, outputs, CUT: gl.constexpr):
    """The row of W of one of a unit's 16; of gated ones the last eight are the up halves of the first."""
    if CUT.gated:
        row = unit * 8 + within % 8 + within // 8 * outputs
    else:
        row = unit * 16 + within
    return row.to(gl.int64)


@gluon.jit
def ask_for_tile(slot, first, second, go, CUT: gl.constexpr):
    """Ask for a thread's part of a tile, 16 of each 64 bytes of two rows."""
    HALVES: gl.constexpr = CUT.halves
    for i in gl.static_range(HALVES):
        copy(slot + i * 1024, first + i * 64, go, 16)
        copy(slot + i * 1024 + 512, second + i * 64, go, 16)
    commit(slot)


@gluon.jit
def run_sums(start_0, start_1, slot, column_slot, own_x, no_x, first, second, go, CUT: gl.constexpr):
    """The sums of a run that lies in the ring at ``slot``, in place of which the run at ``first`` and ``second`` is
    asked for: of rows r and r + 8, each of two columns, which begin with start_0 and start_1."""
    nothing = start_0 * 0.0
    acc = (start_0, start_1, start_0, start_1, nothing, nothing, nothing, nothing)
    RUN: gl.constexpr = CUT.run
    for i in gl.static_range(RUN):
        wait_for_all_but(slot, CUT.tiles - 1)
        here = slot + i * (1024 * CUT.halves)
        w, v = load_4(here), load_4(here + 512)
        at = gl.where(column_slot == i, own_x, no_x)
        x0, x1, x2, x3 = load_4(at), load_4(at + 64), load_4(at + 128), load_4(at + 192)
        if CUT.kind == "uint4":
            acc = uint4_sums(acc, w, v, x0, x1, x2, x3)
        else:
            acc = e4m3_sums(acc, w, v, x0, x1)
            acc = e4m3_sums(acc, load_4(here + 1024), load_4(here + 1536), x2, x3)
        ask_for_tile(here, first + i * (64 * CUT.halves), second + i * (64 * CUT.halves), go, CUT)
    return acc[0] + acc[4], acc[1] + acc[5], acc[2] + acc[6], acc[3] + acc[7]
