"""Device code that makes numbers of codes (`codes`): in few instructions where the operands are bfloat16.

Packed kinds keep two planes apart, the even inputs (low halves of the bytes) and the odd ones: their order then never
changes on the way to the tensor cores, and x is taken apart alike (`planes`).

What a code is in bfloat16, two numbers a register:

    uint4   128 + code is 0x4300 | code; less 128 + zero, which is exact
    int8    the low 7 bits likewise; less 128, or 256 where the sign bit is set, which is the bit 0x80 of 0x4300
    e4m3    the bits moved to bfloat16's places are the number times 2^-120; times 2^120, which is exact
    e2m1    the same with 2^-126; the factor is left to the scale. So that it fits bfloat16 for scales up to 2^65, it is
            2^62, and the sums are multiplied by 2^64 (`unlifted`)

A scale within a tile is the operand of a multiplication, rounded to bfloat16: exact for e2m1 with scales of e4m3 or
exponents. Elsewhere (float32, float16, Triton's interpreter) numbers are made in float32, then rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAGIC = 0x43004300  # 128.0, twice
_ONE = 0x3F803F80
_MINUS_ZERO = 0x80008000
_UP_120 = 0x7B807B80  # 2^120, twice


def _asm(outputs: int, body: list[str]) -> str:
    """Assembly of ``outputs`` registers r0, r1, … from a packed one, w; the further operands are written out."""
    names = ", ".join([f"r{i}" for i in range(outputs)] + ["w", "t", "u", "v"])
    ends = [f"mov.b32 ${i}, r{i};" for i in range(outputs)]
    return "\n".join(["{", f".reg .b32 {names};", f"mov.b32 w, ${outputs};", *body, *ends, "}"])


def _bits(out: str, value: str, mask: int, other: str) -> str:
    """``out = value & mask | other``."""
    return f"lop3.b32 {out}, {value}, {mask:#010x}, {other}, 0xEA;"


def _pair(out: str, first: int, *, high: bool) -> str:
    """Two neighbouring bytes of w, each the low or the high one of its half of a register."""
    selector = (0x0040 | first | (first + 1) << 8 | 0x4000) if not high else (0x0404 | first << 4 | (first + 1) << 12)
    return f"prmt.b32 {out}, w, 0, {selector:#06x};"


def _uint4(scaled: bool) -> str:
    """$0, $1: even inputs; $2, $3: odd ones; $4: bytes; $5, $6: -(128 + zero); $7, $8: scales."""
    body = []
    for pair in range(2):
        body += [_pair("t", 2 * pair, high=False), "shr.u32 u, t, 4;"]
        for out, source in ((f"r{pair}", "t"), (f"r{2 + pair}", "u")):
            body += [_bits(out, source, 0x000F000F, f"{_MAGIC:#x}")]
            body += [f"fma.rn.bf16x2 {out}, {out}, one, ${5 + pair};"]
            body += [f"fma.rn.bf16x2 {out}, {out}, ${7 + pair}, none;"] if scaled else []
    return _asm(4, _constants(one=_ONE, none=_MINUS_ZERO) + body)


def _uint4_half(scaled: bool, odd: bool) -> str:
    """One plane of `_uint4`. $0, $1: inputs; $2: bytes; $3, $4: -(128 + zero); $5, $6: scales."""
    body = []
    for pair in range(2):
        out = f"r{pair}"
        body += [_pair("t", 2 * pair, high=False), *(["shr.u32 t, t, 4;"] if odd else [])]
        body += [_bits(out, "t", 0x000F000F, f"{_MAGIC:#x}"), f"fma.rn.bf16x2 {out}, {out}, one, ${3 + pair};"]
        body += [f"fma.rn.bf16x2 {out}, {out}, ${5 + pair}, none;"] if scaled else []
    return _asm(2, _constants(one=_ONE, none=_MINUS_ZERO) + body)


def _e2m1() -> str:
    """$0, $1: even inputs; $2, $3: odd ones; $4: bytes; $5, $6: scales times 2^126 (less the lift)."""
    body = []
    for pair in range(2):
        body += [_pair("t", 2 * pair, high=True), "shl.b32 u, t, 4;"]
        for out, source in ((f"r{pair}", "u"), (f"r{2 + pair}", "t")):
            body += [f"shr.u32 v, {source}, 6;", "and.b32 v, v, 0x01c001c0;", _bits(out, source, _MINUS_ZERO, "v")]
            body += [f"fma.rn.bf16x2 {out}, {out}, ${5 + pair}, none;"]
    return _asm(4, _constants(none=_MINUS_ZERO) + body)


def _int8(scaled: bool) -> str:
    """$0, $1: inputs; $2: bytes; $3, $4: -zero; $5, $6: scales."""
    body = []
    for pair in range(2):
        out = f"r{pair}"
        body += [_pair("t", 2 * pair, high=False)]
        body += [_bits("u", "t", 0x00800080, f"{_MAGIC | _MINUS_ZERO:#x}"), _bits(out, "t", 0x007F007F, f"{_MAGIC:#x}")]
        body += [f"fma.rn.bf16x2 {out}, {out}, one, u;", f"fma.rn.bf16x2 {out}, {out}, one, ${3 + pair};"]
        body += [f"fma.rn.bf16x2 {out}, {out}, ${5 + pair}, none;"] if scaled else []
    return _asm(2, _constants(one=_ONE, none=_MINUS_ZERO) + body)


def _e4m3(scaled: bool) -> str:
    """$0, $1: inputs; $2: bytes; $3, $4: scales. 0x7f, which is no number, reads as 480."""
    body = []
    for pair in range(2):
        out = f"r{pair}"
        body += [_pair("t", 2 * pair, high=True), "shr.u32 u, t, 4;", "and.b32 u, u, 0x07f007f0;"]
        body += [_bits(out, "t", _MINUS_ZERO, "u"), f"fma.rn.bf16x2 {out}, {out}, lift, none;"]
        body += [f"fma.rn.bf16x2 {out}, {out}, ${3 + pair}, none;"] if scaled else []
    return _asm(2, _constants(lift=_UP_120, none=_MINUS_ZERO) + body)


def _constants(**values: int) -> list[str]:
    return [f".reg .b32 {', '.join(values)};", *(f"mov.b32 {name}, {value:#x};" for name, value in values.items())]


_UINT4, _UINT4_SCALED = tl.constexpr(_uint4(False)), tl.constexpr(_uint4(True))
_E2M1 = tl.constexpr(_e2m1())
_UINT4_EVEN, _UINT4_ODD = (tl.constexpr(_uint4_half(False, odd)) for odd in (False, True))
_UINT4_EVEN_SCALED, _UINT4_ODD_SCALED = (tl.constexpr(_uint4_half(True, odd)) for odd in (False, True))
_INT8, _INT8_SCALED = tl.constexpr(_int8(False)), tl.constexpr(_int8(True))
_E4M3, _E4M3_SCALED = tl.constexpr(_e4m3(False)), tl.constexpr(_e4m3(True))


@triton.jit
def e4m3_float(bits):
    """e4m3 bytes in float32, on GPUs without the type as well. 0x7f is no number."""
    bits = bits.to(tl.int32)
    size = bits & 0x7F
    number = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    number = tl.where(size == 0x7F, float("nan"), number)
    return tl.where(bits > 0x7F, -number, number)


@triton.jit
def scale_float(scale, FORM: tl.constexpr):
    """Scales in float32: "floats", or bytes of "e8m0" (`codes.as_floats`) or "e4m3"."""
    if FORM == "e8m0":
        bits = scale.to(tl.int32)
        number = (bits << 23).to(tl.float32, bitcast=True)
        number = tl.where(bits == 0, 5.877471754111438e-39, number)
        number = tl.where(bits == 255, float("nan"), number)
    elif FORM == "e4m3":
        number = e4m3_float(scale)
    else:
        number = scale.to(tl.float32)
    return number


@triton.jit
def e2m1_float(code):
    """Codes 0 to 15 of e2m1 in float32."""
    code = code.to(tl.int32)
    number = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return tl.where(code > 7, -number, number)


@triton.jit
def code_float(code, KIND: tl.constexpr):
    """Codes of one input each in float32, before zeros and scales."""
    if KIND == "e2m1":
        number = e2m1_float(code)
    elif KIND == "e4m3":
        number = e4m3_float(code)
    elif KIND == "int8":
        number = code.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        number = code.to(tl.float32)
    return number


@triton.jit
def lifted(scale, KIND: tl.constexpr):
    """float32 scales as the factor that `fast_pair` and `fast_single` take, bfloat16."""
    if KIND == "e2m1":
        scale *= 4611686018427387904.0  # 2^62 = 2^(126 - 64): the codes' own 2^-126, and the lift
    return scale.to(tl.bfloat16)


@triton.jit
def unlifted(value, KIND: tl.constexpr):
    """float32 sums of `fast_pair`'s numbers as those of what they stand for."""
    if KIND == "e2m1":
        value *= 18446744073709551616.0
    return value


@triton.jit
def minus_zero(zero, KIND: tl.constexpr):
    """float32 zeros as `fast_pair` and `fast_single` add them, bfloat16."""
    if KIND == "uint4":
        zero += 128.0
    return (-zero).to(tl.bfloat16)


@triton.jit
def fast_pair(w, minus, factor, KIND: tl.constexpr, SCALED: tl.constexpr):
    """bfloat16 numbers of the even and of the odd inputs of packed bytes w. minus: what `minus_zero` gave; factor: what
    `lifted` gave; each in the shape of w. Of e2m1, minus is not read and factor always is."""
    both: tl.constexpr = (tl.bfloat16, tl.bfloat16)
    if KIND == "e2m1":
        even, odd = tl.inline_asm_elementwise(_E2M1, "=r,=r,=r,=r,r,r,r", [w, factor], both, is_pure=True, pack=4)
    elif SCALED:
        even, odd = tl.inline_asm_elementwise(
            _UINT4_SCALED, "=r,=r,=r,=r,r,r,r,r,r", [w, minus, factor], both, is_pure=True, pack=4
        )
    else:
        even, odd = tl.inline_asm_elementwise(_UINT4, "=r,=r,=r,=r,r,r,r", [w, minus], both, is_pure=True, pack=4)
    return even, odd


@triton.jit
def fast_half(w, minus, factor, SCALED: tl.constexpr, ODD: tl.constexpr):
    """One of the two that `fast_pair` gives of uint4: Triton makes what has one result where it is taken from."""
    PLAIN: tl.constexpr = _UINT4_ODD if ODD else _UINT4_EVEN
    TIMES: tl.constexpr = _UINT4_ODD_SCALED if ODD else _UINT4_EVEN_SCALED
    ASM: tl.constexpr = TIMES if SCALED else PLAIN
    return tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r,r,r", [w, minus, factor], tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def fast_single(w, minus, factor, KIND: tl.constexpr, SCALED: tl.constexpr):
    """bfloat16 numbers of bytes w of one input each; minus and factor as for `fast_pair`, minus for int8 alone."""
    if KIND == "e4m3" and SCALED:
        numbers = tl.inline_asm_elementwise(_E4M3_SCALED, "=r,=r,r,r,r", [w, factor], tl.bfloat16, is_pure=True, pack=4)
    elif KIND == "e4m3":
        numbers = tl.inline_asm_elementwise(_E4M3, "=r,=r,r", [w], tl.bfloat16, is_pure=True, pack=4)
    elif SCALED:
        numbers = tl.inline_asm_elementwise(
            _INT8_SCALED, "=r,=r,r,r,r,r,r", [w, minus, factor], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = tl.inline_asm_elementwise(_INT8, "=r,=r,r,r,r", [w, minus], tl.bfloat16, is_pure=True, pack=4)
    return numbers


@triton.jit
def planes(x):
    """The even and the odd inputs, bfloat16, of 32-bit words of two."""
    even = x.to(tl.int16).to(tl.bfloat16, bitcast=True)
    odd = (x >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return even, odd


@triton.jit
def scale_for(value, AXIS: tl.constexpr, LARGEST: tl.constexpr):
    """What numbers of 8 bits along an axis are to be multiplied by, whose largest size becomes LARGEST: 1 where all are
    zero, NaN where any is. A GPU's maximum and its limits pass NaN over; what has none must not become a number."""
    scale = tl.max(tl.abs(value), AXIS) / LARGEST
    scale = tl.where(scale > 0, scale, 1.0)
    return tl.where(tl.max((value != value).to(tl.int32), AXIS) > 0, float("nan"), scale)
