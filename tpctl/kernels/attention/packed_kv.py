"""Keys and values of bfloat16 in 12 bits each: less memory to read for every token that is generated.

A vector is what one token leaves in one head: D values. Their exponents lie close together, so each is kept as its
distance from the largest, in 4 bits instead of 8. Sign and mantissa stay as they are:

    row, 3 D / 2 bytes   | sign and mantissa of value 0 .. D - 1 | codes of 0 and D / 2, 1 and D / 2 + 1, .. |
    exponents, 2 bytes   | largest exponent of the key | of the value |

A value of code c > 0 is +-(1 + mantissa / 128) 2^(c - 15 + largest - 127), and of code 0 +-(mantissa / 128)
2^(-14 + largest - 127), as a float's own subnormal numbers are made. So a value is kept exactly unless it is less than
2^-14 of the largest one's power of two, and then within 2^-22 of that power: bfloat16 itself rounds the largest value
by up to 2^-8 of it. Values of less than 2^-126 become 0, as do small ones beside a largest of less than 2^-104. Where
one value is infinite or no number, none of its vector is finite.

Rows lie by block and head, [num_blocks, K, B, 3 D / 2], exponents [num_blocks, K, B, 2], both bytes: a tile of a head's
tokens is one piece of memory.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.fp8_kv import key_scale, numbers, value_scale
from tpctl.kernels.common.launch import ANYWHERE

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly

# Four values at a time, from four bytes of sign and mantissa ($2) and four of codes ($3). A byte is doubled so that its
# sign gets to the top of 16 bits, the code is put between, and the product with 2^112 turns the small numbers that come
# out, exponents 0 to 15, into ones from 2^-14 on. It is exact, and settles code 0.
_UNPACK = """{{
.reg .b32 a0, a1, c0, c1, factor, zero;
mov.b32 factor, 0x77807780;
mov.b32 zero, 0x80008000;
prmt.b32 a0, $2, 0, 0x1100;
prmt.b32 a1, $2, 0, 0x3322;
prmt.b32 c0, $3, 0, 0x4140;
prmt.b32 c1, $3, 0, 0x4342;
shl.b32 c0, c0, {shift};
shl.b32 c1, c1, {shift};
{combine}
fma.rn.bf16x2 $0, a0, factor, zero;
fma.rn.bf16x2 $1, a1, factor, zero;
}}"""
_LOW = tl.constexpr(
    _UNPACK.format(  # the other half's code stands above: it is masked out
        shift=7,
        combine="""and.b32 a0, a0, 0x807f807f;
and.b32 a1, a1, 0x807f807f;
lop3.b32 a0, c0, 0x07800780, a0, 0xEA;
lop3.b32 a1, c1, 0x07800780, a1, 0xEA;""",
    )
)
_HIGH = tl.constexpr(
    _UNPACK.format(  # the other half's code stands below, where the mantissa is taken: one selection does
        shift=3,
        combine="""lop3.b32 a0, a0, c0, 0x7f807f80, 0xD8;
lop3.b32 a1, a1, c1, 0x7f807f80, 0xD8;""",
    )
)


@triton.jit
def unpack(values, codes, HIGH: tl.constexpr, PURE: tl.constexpr):
    """bfloat16 values of half a vector, without their `factor`. HIGH: which half.

    PURE: the compiler may do this in whatever layout the result is wanted in. Where that is the transposed one of a
    second operand it would read byte by byte, so there it must not.
    """
    if _INTERPRETED:
        code = (codes >> 4) if HIGH else (codes & 15)
        wide = values.to(tl.int32)
        bits = ((wide & 0x80) << 24) | (code.to(tl.int32) << 23) | ((wide & 0x7F) << 16)
        return bits.to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0
    return tl.inline_asm_elementwise(
        _HIGH if HIGH else _LOW, "=r,=r,r,r", [values, codes], dtype=tl.bfloat16, is_pure=PURE, pack=4
    )


@triton.jit
def factor(exponent):
    """float32: what unpacked values of a vector are to be multiplied by. exponent: its largest, as stored."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_exponents(ptr):
    """uint16 of a key's (low byte) and a value's exponent. Not a `tl.load`: see `_block_of` of the decode kernel."""
    if _INTERPRETED:
        return tl.load(ptr).to(tl.uint16, bitcast=True)
    return tl.inline_asm_elementwise("ld.global.u16 $0, [$1];", "=h,l", [ptr], dtype=tl.uint16, is_pure=True, pack=1)


@triton.jit
def largest_exponent(low, high):
    """The largest exponent [H] of vectors whose halves have the bits low and high, int32 [H, D / 2]."""
    return tl.maximum(tl.max((low >> 7) & 0xFF, 1), tl.max((high >> 7) & 0xFF, 1))


@triton.jit
def pack(bits, largest):
    """Sign and mantissa, and code, of bfloat16 bits, int32 [H, D / 2], in vectors of the largest exponent [H]."""
    exponent = (bits >> 7) & 0xFF
    code = exponent - largest[:, None] + 15
    shift = tl.minimum(tl.maximum(1 - code, 0), 9)
    mantissa = (bits & 0x7F) | 0x80
    half = tl.where(shift > 0, (1 << tl.maximum(shift - 1, 0)) - 1 + ((mantissa >> shift) & 1), 0)  # to nearest even
    small = (mantissa + half) >> shift
    full = tl.where(code > 0, (code << 7) | (bits & 0x7F), small)
    full = tl.where(exponent > 0, full, 0)
    return ((bits >> 8) & 0x80) | (full & 0x7F), full >> 7


@triton.jit
def store_packed(
    k_cache_ptr,
    v_cache_ptr,
    exponents_ptr,
    y1,  # [H, D / 2], the first half of some heads' vectors
    y2,
    place,  # [H], of vectors in the cache
    is_k,  # [H], which of them are keys, and which values, to be stored
    is_v,
    half,
    in_half,
    HALF: tl.constexpr,
):
    """Pack vectors [y1 | y2] and write them."""
    bits1 = y1.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    bits2 = y2.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    largest = largest_exponent(bits1, bits2)
    value1, code1 = pack(bits1, largest)
    value2, code2 = pack(bits2, largest)
    offsets = place[:, None] * (3 * HALF) + half[None, :]
    for cache in tl.static_range(2):
        row = (v_cache_ptr if cache else k_cache_ptr) + offsets
        mask = (is_v if cache else is_k)[:, None] & in_half[None, :]
        tl.store(row, value1.to(tl.uint8), mask=mask)
        tl.store(row + HALF, value2.to(tl.uint8), mask=mask)
        tl.store(row + 2 * HALF, (code1 | (code2 << 4)).to(tl.uint8), mask=mask)
    tl.store(exponents_ptr + place * 2 + is_v.to(tl.int64), largest.to(tl.uint8), mask=is_k | is_v)


@triton.jit
def key_factor(word, FP8: tl.constexpr):
    """float32: what the values of keys are to be multiplied by. word: what is kept for a key and a value."""
    return key_scale(word) if FP8 else factor(word & 0xFF)


@triton.jit
def value_factor(word, FP8: tl.constexpr):
    """float32: what the values of values are to be multiplied by."""
    return value_scale(word) if FP8 else factor((word >> 8) & 0xFF)


@triton.jit
def load_vectors(cache_ptr, place, HEAD_DIM: tl.constexpr, FP8: tl.constexpr, PURE: tl.constexpr):
    """Vectors [TILE] as values [TILE, D], without their factors. PURE: as of `unpack`."""
    if FP8:
        values = numbers(tl.load(cache_ptr + place[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]), PURE)
    else:
        HALF: tl.constexpr = HEAD_DIM // 2
        row = cache_ptr + place[:, None] * (HEAD_DIM + HALF) + tl.arange(0, HALF)[None, :]
        codes = tl.load(row + HEAD_DIM)
        low = unpack(tl.load(row), codes, False, PURE)
        high = unpack(tl.load(row + HALF), codes, True, PURE)
        values = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (place.shape[0], HEAD_DIM))
    return values


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=ANYWHERE)
def _unpack_blocks_kernel(
    k_ptr,
    v_ptr,
    factors_ptr,
    tables_ptr,
    lens_ptr,
    starts_ptr,
    query_start_ptr,
    k_out_ptr,
    v_out_ptr,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
):
    seq, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + seq)
    if index * BLOCK_SIZE >= length:
        return
    if WINDOW > 0:
        new = tl.load(query_start_ptr + seq + 1) - tl.load(query_start_ptr + seq)
        if (index + 1) * BLOCK_SIZE <= length - new - WINDOW + 1:
            return
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, HALF)[None, :]
    block = tl.load(tables_ptr + seq.to(tl.int64) * table_stride + index).to(tl.int64)
    target = (tl.load(starts_ptr + seq) + index).to(tl.int64)
    for first in range(0, BLOCK_SIZE, ROWS):
        row = first + tl.arange(0, ROWS)
        place = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + row
        to = (((target * BLOCK_SIZE + row) * NUM_KV_HEADS + head) * HEAD_DIM)[:, None] + d
        for side in tl.static_range(2):
            source = (v_ptr if side else k_ptr) + (place * (HEAD_DIM if FP8 else HEAD_DIM + HALF))[:, None] + d
            out = (v_out_ptr if side else k_out_ptr) + to
            if FP8:
                scale = tl.load(factors_ptr + place * 2 + side).to(tl.float32)[:, None]
                low = numbers(tl.load(source), True).to(tl.float32) * scale
                high = numbers(tl.load(source + HALF), True).to(tl.float32) * scale
            else:
                scale = factor(tl.load(factors_ptr + place * 2 + side))[:, None]
                codes = tl.load(source + HEAD_DIM)
                low = unpack(tl.load(source), codes, False, True).to(tl.float32) * scale
                high = unpack(tl.load(source + HALF), codes, True, True).to(tl.float32) * scale
            tl.store(out, low.to(out.dtype.element_ty))
            tl.store(out + HALF, high.to(out.dtype.element_ty))


def unpack_blocks(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    factors: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens_S: torch.Tensor,
    starts_S: torch.Tensor,
    longest: int,
    out: tuple[torch.Tensor, torch.Tensor],
    *,
    query_start: torch.Tensor | None = None,
    window: int | None = None,
) -> None:
    """Copy the blocks of some sequences out of a cache that is packed or in FP8, as the numbers that they stand for.

    k_cache, v_cache: packed, or FP8 codes (`fp8_kv`). factors: exponents or, bfloat16, scales. block_tables: int32 [S,
    max_blocks]. seq_lens_S: int32 [S], the longest of them `longest`. out: keys and values [n, B, K, D]; block j of
    sequence s goes to starts_S[s] + j, int32. window: only blocks that new tokens see, of which sequence s has those of
    rows query_start[s] to query_start[s + 1], int32 [S + 1], are copied.
    """
    _, num_kv_heads, block_size, row = k_cache.shape
    fp8 = is_fp8(factors)
    _unpack_blocks_kernel[(seq_lens_S.shape[0], -(-longest // block_size), num_kv_heads)](
        k_cache,
        v_cache,
        factors,
        block_tables,
        seq_lens_S,
        starts_S,
        seq_lens_S if query_start is None else query_start,
        *out,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=row if fp8 else row * 2 // 3,
        BLOCK_SIZE=block_size,
        WINDOW=0 if query_start is None else window or 0,
        ROWS=min(block_size, 32),
        FP8=fp8,
        num_warps=4,
    )


def is_fp8(factors: torch.Tensor) -> bool:
    """Whether what is kept for vectors, [num_blocks, K, B, 2], are scales (`fp8_kv`), and not exponents."""
    return factors.dtype == torch.bfloat16


def as_words(factors: torch.Tensor) -> torch.Tensor:
    """[num_blocks, K, B, 1]: what is kept for a key and a value as one word."""
    return factors.view(torch.int32 if is_fp8(factors) else torch.int16)


def row_bytes(head_dim: int) -> int:
    """Bytes of one packed vector, its exponent aside."""
    return head_dim + head_dim // 2


def pack_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [..., 3 D / 2] and largest exponents [...], bytes, of bfloat16 vectors [..., D]."""
    bits = x.view(torch.int16).int() & 0xFFFF
    exponent, mantissa = (bits >> 7) & 0xFF, (bits & 0x7F) | 0x80
    largest = exponent.amax(-1, keepdim=True)
    code = exponent - largest + 15
    shift = (1 - code).clamp(0, 9)
    half = torch.where(shift > 0, (1 << (shift - 1).clamp(min=0)) - 1 + ((mantissa >> shift) & 1), 0)
    full = torch.where(code > 0, (code << 7) | (bits & 0x7F), (mantissa + half) >> shift)
    full = torch.where(exponent > 0, full, 0)
    values, codes = ((bits >> 8) & 0x80) | (full & 0x7F), full >> 7
    low, high = codes.chunk(2, -1)
    return torch.cat([values, low | (high << 4)], -1).to(torch.uint8), largest.squeeze(-1).to(torch.uint8)


def unpack_reference(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] of what `pack_reference` gives."""
    head_dim = rows.shape[-1] * 2 // 3
    values, codes = rows.int().split([head_dim, head_dim // 2], -1)
    code = torch.cat([codes & 15, codes >> 4], -1)
    bits = ((values & 0x80) << 24) | (code << 23) | ((values & 0x7F) << 16)
    factors = (largest.int() << 23).view(torch.float32)
    return bits.view(torch.float32) * 2.0**112 * factors[..., None]
