"""From a fused qkv row to rotated queries and cached keys and values, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.packed_kv import largest_exponent, pack
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.runs import as_runs, sum_runs


@triton.jit
def _rope_cache_kernel(
    qkv_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    exponents_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    split_stride,
    eps,
    SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,  # heads per program
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0 when the whole head is rotated
    PACKED: tl.constexpr,  # KV blocks of so many tokens, packed; 0: not packed
    PDL: tl.constexpr,
):
    # A head is [x1 (HALF) | x2 (HALF) | rest]; x1 and x2 rotate into each other, the rest passes through.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    rotated = is_q | is_k
    exists = rotated | is_v
    if PDL:
        # Only once the predecessor is complete: the decode kernel that follows reads the step's plan before
        # it waits.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=1.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)[None, :]

    row = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM
    mask = exists[:, None] & in_half[None, :]
    raw1 = sum_runs(row + half[None, :], mask, split_stride, SPLITS)
    raw2 = sum_runs(row + HALF + half[None, :], mask, split_stride, SPLITS)
    dtype = raw1.dtype
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)
    if BLOCK_REST > 0:
        rest = tl.arange(0, BLOCK_REST)
        rest_mask = exists[:, None] & (rest < HEAD_DIM - 2 * HALF)[None, :]
        raw3 = sum_runs(row + 2 * HALF + rest[None, :], rest_mask, split_stride, SPLITS)
        x3 = raw3.to(tl.float32)

    if HAS_NORM:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if BLOCK_REST > 0:
            squares += tl.sum(x3 * x3, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        x1 = _norm_weight(x1 * scale, q_weight_ptr, k_weight_ptr, is_q, half, in_half, dtype, UNIT_OFFSET)
        x2 = _norm_weight(x2 * scale, q_weight_ptr, k_weight_ptr, is_q, HALF + half, in_half, dtype, UNIT_OFFSET)
        if BLOCK_REST > 0:
            inside = rest < HEAD_DIM - 2 * HALF
            x3 = _norm_weight(x3 * scale, q_weight_ptr, k_weight_ptr, is_q, 2 * HALF + rest, inside, dtype, UNIT_OFFSET)

    y1 = tl.where(rotated[:, None], (x1 * cos - x2 * sin).to(dtype), raw1)
    y2 = tl.where(rotated[:, None], (x2 * cos + x1 * sin).to(dtype), raw2)

    q_row = q_out_ptr + (token * NUM_HEADS + head[:, None]) * HEAD_DIM
    k_row = k_cache_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS) * HEAD_DIM
    v_row = v_cache_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
    cached = slot >= 0
    q_mask = is_q[:, None] & in_half[None, :]
    k_mask = (is_k & cached)[:, None] & in_half[None, :]
    v_mask = (is_v & cached)[:, None] & in_half[None, :]
    tl.store(q_row + half[None, :], y1, mask=q_mask)
    tl.store(q_row + HALF + half[None, :], y2, mask=q_mask)
    if PACKED > 0:
        bits1 = y1.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        bits2 = y2.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        largest = largest_exponent(bits1, bits2)
        value1, code1 = pack(bits1, largest)
        value2, code2 = pack(bits2, largest)
        kv_head = head - tl.where(is_k, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
        place = (slot // PACKED * NUM_KV_HEADS + kv_head) * PACKED + slot % PACKED
        offsets = place[:, None] * (3 * HALF) + half[None, :]
        for cache in tl.static_range(2):
            row = (v_cache_ptr if cache else k_cache_ptr) + offsets
            mask = v_mask if cache else k_mask
            tl.store(row, value1.to(tl.uint8), mask=mask)
            tl.store(row + HALF, value2.to(tl.uint8), mask=mask)
            tl.store(row + 2 * HALF, (code1 | (code2 << 4)).to(tl.uint8), mask=mask)
        tl.store(exponents_ptr + place * 2 + is_v.to(tl.int64), largest.to(tl.uint8), mask=(is_k | is_v) & cached)
    else:
        tl.store(k_row + half[None, :], y1, mask=k_mask)
        tl.store(k_row + HALF + half[None, :], y2, mask=k_mask)
        tl.store(v_row + half[None, :], y1, mask=v_mask)
        tl.store(v_row + HALF + half[None, :], y2, mask=v_mask)
        if BLOCK_REST > 0:
            y3 = tl.where(rotated[:, None], x3.to(dtype), raw3)
            inside_row = (rest < HEAD_DIM - 2 * HALF)[None, :]
            tl.store(q_row + 2 * HALF + rest[None, :], y3, mask=is_q[:, None] & inside_row)
            tl.store(k_row + 2 * HALF + rest[None, :], y3, mask=(is_k & cached)[:, None] & inside_row)
            tl.store(v_row + 2 * HALF + rest[None, :], y3, mask=(is_v & cached)[:, None] & inside_row)


@triton.jit
def _norm_weight(x, q_weight_ptr, k_weight_ptr, is_q, dim, inside, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    q_weight = tl.load(q_weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    if UNIT_OFFSET:
        y = (x * (1.0 + weight)).to(dtype).to(tl.float32)
    else:
        y = (x.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return y


def rope_cache(
    qkv_TF: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_heads: int,
    *,
    exponents: torch.Tensor | None = None,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Optional QK-norm, rotary embedding, and the write of keys and values into the paged cache.

    qkv_TF: [T, (N + 2K) * D], rows [q | k | v], columns contiguous, or the runs [S, T, (N + 2K) * D] of
    `split_linear`, which are summed and rounded first. k_cache, v_cache: [num_blocks, B, K, D], contiguous, in qkv's
    dtype; or, with exponents, packed (`kernels.attention.packed_kv`), which takes heads that are rotated whole.
    cos_sin: two float32 tables [max_position, rotary_dim / 2], rotary_dim <= D.
    positions_T: int64 [T]. slot_mapping_T: int64 [T]; slot = block * B + offset; -1 writes nothing. q_norm_D,
    k_norm_D: RMSNorm weights [D] of the query and key heads, both or neither (`unit_offset`: Gemma's 1 +
    weight). Rotation is transformers' `rotate_half`, computed in float32 and rounded once. Returns the
    rotated queries [T, N, D] in qkv's dtype.
    """
    qkv_STF = as_runs(qkv_TF)
    splits, num_tokens, _ = qkv_STF.shape
    num_kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
    cos, sin = cos_sin
    half = cos.shape[1]
    block_size = 0
    if exponents is not None:
        num_kv_heads, block_size, head_dim = k_cache.shape[1], k_cache.shape[2], 2 * half
    q_TND = qkv_TF.new_empty((num_tokens, num_heads, head_dim)) if out is None else out
    if num_tokens == 0:
        return q_TND
    rest = head_dim - 2 * half
    total = num_heads + 2 * num_kv_heads
    # Few tokens: spread one token over several programs, for latency. Many: one program per token or two.
    heads = min(next_power_of_2(total), 4 if num_tokens <= 64 else 16)
    has_norm = q_norm_D is not None
    _rope_cache_kernel[(num_tokens, triton.cdiv(total, heads))](
        qkv_STF,
        q_TND,
        k_cache,
        v_cache,
        cos if exponents is None else exponents,
        cos,
        sin,
        positions_T,
        slot_mapping_T,
        q_norm_D if has_norm else cos,
        k_norm_D if has_norm else cos,
        qkv_STF.stride(1),
        qkv_STF.stride(0),
        eps,
        SPLITS=splits,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HAS_NORM=has_norm,
        UNIT_OFFSET=unit_offset,
        HEADS=heads,
        BLOCK_HALF=next_power_of_2(half),
        BLOCK_REST=next_power_of_2(rest) if rest > 0 else 0,
        PACKED=block_size,
        PDL=pdl,
        num_warps=1 if heads <= 4 else 4,
        **launch_options(pdl),
    )
    return q_TND


def rope_cache_reference(
    qkv_TF: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_heads: int,
    *,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> torch.Tensor:
    """`rope_cache` in plain torch; writes the caches too."""
    from tpctl.kernels.common.norm import rms_norm_reference

    num_tokens = qkv_TF.shape[0]
    num_kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
    q, k, v = qkv_TF.view(num_tokens, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_D is not None and k_norm_D is not None:
        q = rms_norm_reference(q, q_norm_D, eps, unit_offset=unit_offset)
        k = rms_norm_reference(k, k_norm_D, eps, unit_offset=unit_offset)
    cos, sin = (table[positions_T][:, None, :] for table in cos_sin)
    half = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x1, x2, rest = x.float().split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1).to(x.dtype)

    kept = slot_mapping_T >= 0
    k_cache.view(-1, num_kv_heads, head_dim)[slot_mapping_T[kept]] = rotate(k)[kept]
    v_cache.view(-1, num_kv_heads, head_dim)[slot_mapping_T[kept]] = v[kept]
    return rotate(q)
