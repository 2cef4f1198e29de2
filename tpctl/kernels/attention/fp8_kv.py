"""Keys and values in FP8: a byte each to read for every token that is generated, and 2 bytes a vector.

What a vector is kept as, and how far that is from it, says ``fp8_vectors``, the torch reference of what is here. Codes
lie by block and head, [num_blocks, K, B, D] bytes, so that a tile of a head's tokens is one piece of memory; scales,
bfloat16 [num_blocks, K, B, 2] of key and value, are read as one aligned word of 4 bytes a token.

Codes are made bfloat16 with integer arithmetic, which every e4m3 is exactly, on all GPUs that multiply bfloat16: an
instruction for it came with compute capability 8.9, but gives float16, in which a weight times a scale would vanish.
The scale multiplies a key's score and a value's weight, in float32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly

# Four values at a time, from four bytes ($2). A byte is put in the upper half of 16 bits, moved down by 4 so that its
# exponent becomes the lower end of a bfloat16's, and given its sign back. The product with 2^120 is exact, and makes
# numbers of subnormal ones too.
_NUMBERS = tl.constexpr("""{
.reg .b32 a0, a1, b0, b1, factor, zero;
mov.b32 factor, 0x7b807b80;
mov.b32 zero, 0x80008000;
prmt.b32 a0, $2, 0, 0x1404;
prmt.b32 a1, $2, 0, 0x3424;
shr.u32 b0, a0, 4;
shr.u32 b1, a1, 4;
and.b32 b0, b0, 0x07f007f0;
and.b32 b1, b1, 0x07f007f0;
lop3.b32 a0, a0, 0x80008000, b0, 0xEA;
lop3.b32 a1, a1, 0x80008000, b1, 0xEA;
fma.rn.bf16x2 $0, a0, factor, zero;
fma.rn.bf16x2 $1, a1, factor, zero;
}""")


@triton.jit
def numbers(codes, PURE: tl.constexpr):
    """bfloat16 values of codes, uint8, without their scale. PURE: as of ``packed_kv.unpack``."""
    if _INTERPRETED:
        wide = codes.to(tl.int32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    return tl.inline_asm_elementwise(_NUMBERS, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=PURE, pack=4)


@triton.jit
def load_scales(ptr):
    """int32 of a key's (lower half) and a value's scale. Not a ``tl.load``: see ``tile_runs.block_of``."""
    if _INTERPRETED:
        return tl.load(ptr)
    return tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def key_scale(word):
    """float32: what a key's numbers are to be multiplied by."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def value_scale(word):
    """float32: what a value's numbers are to be multiplied by."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _size(x):
    """The bits of |x| as a float32, which grow with it; those of what is no number are the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(x):
    """The e4m3 nearest to float32 numbers of 464 or less, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 codes are multiples of 2^-9, which is what a float32 from 2^14 to 2^15 is rounded to.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, small, tl.minimum(large, 0x7F))
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def store_fp8(
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    y1,  # [H, D1], the first values of some heads' vectors, and so on
    y2,
    y3,
    place,  # [H], of vectors in the cache
    is_k,  # [H], which of them are keys, and which values, to be stored
    is_v,
    half,  # [D1], the dimensions of y1, and which are there
    in_half,
    in_rest,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: there is no y3
):
    """Quantise vectors [y1 | y2 | y3] and write them; what is not there is 0."""
    largest = tl.maximum(tl.max(_size(y1), 1), tl.max(_size(y2), 1))
    if BLOCK_REST > 0:
        largest = tl.maximum(largest, tl.max(_size(y3), 1))
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    scale = tl.where(largest < 0x7F800000, (scale + 0xFFFF) & -65536, 0x7FC00000)  # up to a bfloat16; no number
    divisor = tl.where(scale > 0, scale, 0x3F800000).to(tl.float32, bitcast=True)[:, None]
    code1 = _code(tl.math.div_rn(y1.to(tl.float32), divisor))
    code2 = _code(tl.math.div_rn(y2.to(tl.float32), divisor))
    offsets = place[:, None] * HEAD_DIM + half[None, :]
    for cache in tl.static_range(2):
        mine = is_v if cache else is_k
        row = (v_cache_ptr if cache else k_cache_ptr) + offsets
        tl.store(row, code1, mask=mine[:, None] & in_half[None, :])
        tl.store(row + HALF, code2, mask=mine[:, None] & in_half[None, :])
    if BLOCK_REST > 0:
        code3 = _code(tl.math.div_rn(y3.to(tl.float32), divisor))
        offsets = place[:, None] * HEAD_DIM + 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(k_cache_ptr + offsets, code3, mask=is_k[:, None] & in_rest[None, :])
        tl.store(v_cache_ptr + offsets, code3, mask=is_v[:, None] & in_rest[None, :])
    half = (scale >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(scales_ptr + place * 2 + is_v.to(tl.int64), half, mask=is_k | is_v)
