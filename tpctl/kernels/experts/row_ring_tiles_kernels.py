"""What a thread of `row_ring` does with a chunk: 16 bytes of a row of W times the inputs that it has in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import high_float, load_global_4, low_float


def _bf16() -> str:
    """$0: the sum; $1 to $4: words of W; $5 to $12: inputs."""
    body = [".reg .b32 s; .reg .f32 c, d;"]
    for word in range(4):
        for half, (sum_, part) in enumerate((("c", "shl.b32 s, {}, 16;"), ("d", "and.b32 s, {}, 0xffff0000;"))):
            x = f"${5 + 2 * word + half}"
            body.append(part.format(f"${1 + word}"))
            body.append(f"fma.rn.f32 {sum_}, s, {x}, {sum_};" if word else f"mul.f32 {sum_}, s, {x};")
    return "{ " + " ".join([*body, "add.f32 $0, c, d;"]) + " }"


_ENDS = "add.rn.f16x2 c, c, d; mov.b32 {p, q}, c; cvt.f32.f16 e, p; cvt.f32.f16 f, q; add.f32 $0, e, f;"
_REGISTERS = ".reg .b16 l, h, p, q; .reg .b32 t, u, s, c, d; .reg .f32 e, f; mov.b32 c, 0; mov.b32 d, 0;"


def _e4m3() -> str:
    """$0: the sum; $1 to $4: words of W; $5 to $12: inputs, words of two float16 numbers."""
    body = [_REGISTERS]
    for word in range(4):
        body.append(f"mov.b32 {{l, h}}, ${1 + word};")
        for half, (name, sum_) in enumerate((("l", "c"), ("h", "d"))):
            x = f"${5 + 2 * word + half}"
            body += [f"cvt.rn.f16x2.e4m3x2 s, {name};", f"fma.rn.f16x2 {sum_}, s, {x}, {sum_};"]
    return "{ " + " ".join([*body, _ENDS]) + " }"


def _e2m1() -> str:
    """$0: the sum; $1 to $4: words of W; $5 to $20: inputs, of each eight 0 and 2, 4 and 6, 1 and 3, 5 and 7.

    A code is moved to where e4m3 has its bits, where it stands for 2^-6 of the number.
    """
    body = [_REGISTERS]
    for word in range(4):
        w = f"${1 + word}"
        for odd in range(2):
            if odd:
                body += [f"shr.u32 u, {w}, 2;", "and.b32 u, u, 0x1c1c1c1c;", f"lop3.b32 t, {w}, 0x80808080, u, 0xEA;"]
            else:
                body += [f"shl.b32 t, {w}, 4;", f"shl.b32 u, {w}, 2;", "and.b32 u, u, 0x1c1c1c1c;"]
                body += ["lop3.b32 t, t, 0x80808080, u, 0xEA;"]
            body.append("mov.b32 {l, h}, t;")
            for half, (name, sum_) in enumerate((("l", "c"), ("h", "d"))):
                x = f"${5 + 4 * word + 2 * odd + half}"
                body += [f"cvt.rn.f16x2.e4m3x2 s, {name};", f"fma.rn.f16x2 {sum_}, s, {x}, {sum_};"]
    return "{ " + " ".join([*body, _ENDS]) + " }"


_BF16, _E4M3, _E2M1 = gl.constexpr(_bf16()), gl.constexpr(_e4m3()), gl.constexpr(_e2m1())
_BF16_OPERANDS = gl.constexpr(",".join(["=f"] + ["r"] * 4 + ["f"] * 8))
_E4M3_OPERANDS = gl.constexpr(",".join(["=f"] + ["r"] * 4 + ["r"] * 8))
_E2M1_OPERANDS = gl.constexpr(",".join(["=f"] + ["r"] * 4 + ["r"] * 16))


@gluon.jit
def chunk_sum(w, x, CUT: gl.constexpr):
    """Of a chunk's products; not yet scaled."""
    if CUT.kind == "bf16":
        found = gl.inline_asm_elementwise(
            _BF16,
            _BF16_OPERANDS,
            [w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
            dtype=gl.float32,
            is_pure=False,  # else they sink behind the reads of the rows that follow
            pack=1,
        )
    elif CUT.kind == "e4m3":
        found = gl.inline_asm_elementwise(
            _E4M3,
            _E4M3_OPERANDS,
            [w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
            dtype=gl.float32,
            is_pure=False,  # else they sink behind the reads of the rows that follow
            pack=1,
        )
    else:
        found = gl.inline_asm_elementwise(
            _E2M1,
            _E2M1_OPERANDS,
            [w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7],
             x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]],
            dtype=gl.float32,
            is_pure=False,  # else they sink behind the reads of the rows that follow
            pack=1,
        )  # fmt: skip
    return found


@gluon.jit
def _pair(low, high):
    """Two numbers as a word of float16."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _as_multiplied(x, CUT: gl.constexpr):
    """Inputs of a chunk as `chunk_sum` takes them, and what its sum is to be multiplied by.

    Of codes they are float16, the largest of them between 1 and 2; of e2m1 as far apart as the codes are.
    """
    factor = x[0] * 0.0 + 1.0
    if CUT.kind != "bf16":
        largest = gl.abs(x[0])
        SIZE: gl.constexpr = CUT.size
        for i in gl.static_range(1, SIZE):
            largest = gl.maximum(largest, gl.abs(x[i]))
        exponent = largest.to(gl.int32, bitcast=True) & 0x7F800000
        lift = (0x7F000000 - exponent).to(gl.float32, bitcast=True)
        factor = exponent.to(gl.float32, bitcast=True)
        pairs = ()
        if CUT.kind == "e2m1":
            factor = factor * 64.0
            for i in gl.static_range(4):
                pairs += (_pair(x[8 * i] * lift, x[8 * i + 2] * lift),)  # type: ignore[assignment]
                pairs += (_pair(x[8 * i + 4] * lift, x[8 * i + 6] * lift),)  # type: ignore[assignment]
                pairs += (_pair(x[8 * i + 1] * lift, x[8 * i + 3] * lift),)  # type: ignore[assignment]
                pairs += (_pair(x[8 * i + 5] * lift, x[8 * i + 7] * lift),)  # type: ignore[assignment]
        else:
            for i in gl.static_range(8):
                pairs += (_pair(x[2 * i] * lift, x[2 * i + 1] * lift),)  # type: ignore[assignment]
        x = pairs
    return x, factor


@gluon.jit
def load_inputs(x_ptr, chunk, CUT: gl.constexpr):
    """A chunk of x, bfloat16 in pieces of 16 bytes (`ExpertCut`), two numbers a word."""
    found = ()
    PIECES: gl.constexpr = CUT.size // 8
    for i in gl.static_range(PIECES):
        words = load_global_4(x_ptr + (i * CUT.all_chunks + chunk) * 4)
        for j in gl.static_range(4):
            found += (low_float(words[j]), high_float(words[j]))  # type: ignore[assignment]
    return _as_multiplied(found, CUT)


@gluon.jit
def load_weighed(h_ptr, chunk, weight, CUT: gl.constexpr):
    """A chunk of h, in pieces, too, times the weight of its expert; for numbers h is float32, and multiplied itself."""
    found = ()
    PIECES: gl.constexpr = CUT.size // CUT.piece
    for i in gl.static_range(PIECES):
        words = load_global_4(h_ptr + (i * CUT.all_chunks + chunk) * 4)
        for j in gl.static_range(4):
            if CUT.kind == "bf16":
                found += (words[j].to(gl.float32, bitcast=True) * weight,)  # type: ignore[assignment]
            else:
                found += (low_float(words[j]), high_float(words[j]))  # type: ignore[assignment]
    x, factor = _as_multiplied(found, CUT)
    return x, factor * weight
