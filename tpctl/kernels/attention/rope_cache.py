"""From a fused qkv row to rotated queries and cached keys and values, in one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.fp8_kv import store_fp8
from tpctl.kernels.attention.packed_kv import is_fp8, store_packed
from tpctl.kernels.common.launch import ANYWHERE, launch_options, next_power_of_2
from tpctl.kernels.common.runs import as_runs, sum_runs


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _rope_cache_kernel(
    qkv_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    factors_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    sums_ptr,
    growth_ptr,
    qkv_stride,
    split_stride,
    eps,
    q_size,
    k_size,
    value_eps,
    SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,  # 0: none; 1: over each head; 2: over all heads of all ranks, by their sums of squares
    UNIT_OFFSET: tl.constexpr,
    VALUE_NORM: tl.constexpr,  # values are normed, each head and without weights; with NORM 1
    KEYS_AS_VALUES: tl.constexpr,  # a row has no values: they are its keys, as they are projected
    GROWTH: tl.constexpr,  # queries are multiplied by a factor of their position
    HEADS: tl.constexpr,  # heads per program
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0 when the whole head is rotated
    PACKED: tl.constexpr,  # KV blocks of so many tokens, packed or in FP8; 0: as they are
    FP8: tl.constexpr,
    GATED: tl.constexpr,  # behind each query lies its gate, which is left to `head_gates`
    PDL: tl.constexpr,
):
    # A head is [x1 (HALF) | x2 (HALF) | rest]; x1 and x2 rotate into each other, the rest passes through. Where pairs
    # are neighbours, x1 and x2 of queries and keys lie in turn, and are stored apart.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    rotated = is_q | is_k
    exists = rotated | is_v
    slot = tl.load(slots_ptr + token)
    if ROTATED:
        position = tl.load(positions_ptr + token)
        cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=1.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)[None, :]
    if PDL:
        # Only once the predecessor is complete: the decode kernel that follows reads the step's plan before
        # it waits.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    source = head
    if GATED:
        source += tl.minimum(head, NUM_HEADS)
    if KEYS_AS_VALUES:
        source -= tl.where(is_v, NUM_KV_HEADS, 0)
    row = qkv_ptr + token * qkv_stride + source[:, None] * HEAD_DIM
    mask = exists[:, None] & in_half[None, :]
    dim1, dim2 = half, HALF + half
    at1, at2 = dim1[None, :], dim2[None, :]
    if INTERLEAVED:
        dim1, dim2 = 2 * half, 2 * half + 1
        at1 = tl.where(rotated[:, None], dim1[None, :], at1)
        at2 = tl.where(rotated[:, None], dim2[None, :], at2)
    raw1 = sum_runs(row + at1, mask, split_stride, SPLITS)
    raw2 = sum_runs(row + at2, mask, split_stride, SPLITS)
    dtype = raw1.dtype
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)
    if BLOCK_REST > 0:
        rest = tl.arange(0, BLOCK_REST)
        rest_mask = exists[:, None] & (rest < HEAD_DIM - 2 * HALF)[None, :]
        raw3 = sum_runs(row + 2 * HALF + rest[None, :], rest_mask, split_stride, SPLITS)
        x3 = raw3.to(tl.float32)

    if NORM > 0:
        if NORM == 1:
            squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
            if BLOCK_REST > 0:
                squares += tl.sum(x3 * x3, 1)
            mean = squares / HEAD_DIM
        else:
            mean = tl.where(is_q, tl.load(sums_ptr + token * 2) / q_size, tl.load(sums_ptr + token * 2 + 1) / k_size)
        scale = tl.rsqrt(mean + eps)[:, None]
        if VALUE_NORM:
            value_scale = tl.rsqrt(mean + value_eps)[:, None]
            raw1, raw2 = (x1 * value_scale).to(dtype), (x2 * value_scale).to(dtype)
            if BLOCK_REST > 0:
                raw3 = (x3 * value_scale).to(dtype)
        weight = _norm_weight(q_weight_ptr, k_weight_ptr, head, is_q, is_k, dim1, in_half, NUM_HEADS, HEAD_DIM, NORM)
        x1 = _weighted(x1 * scale, weight, dtype, UNIT_OFFSET)
        weight = _norm_weight(q_weight_ptr, k_weight_ptr, head, is_q, is_k, dim2, in_half, NUM_HEADS, HEAD_DIM, NORM)
        x2 = _weighted(x2 * scale, weight, dtype, UNIT_OFFSET)
        if BLOCK_REST > 0:
            weight = _norm_weight(q_weight_ptr, k_weight_ptr, head, is_q, is_k, 2 * HALF + rest,
                                  rest < HEAD_DIM - 2 * HALF, NUM_HEADS, HEAD_DIM, NORM)  # fmt: skip
            x3 = _weighted(x3 * scale, weight, dtype, UNIT_OFFSET)

    if ROTATED:
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    else:
        y1, y2 = x1, x2
    if GROWTH:
        growth = tl.where(is_q, tl.load(growth_ptr + position), 1.0)[:, None]
        y1, y2 = y1 * growth, y2 * growth
        if BLOCK_REST > 0:
            x3 *= growth
    y1 = tl.where(rotated[:, None], y1.to(dtype), raw1)
    y2 = tl.where(rotated[:, None], y2.to(dtype), raw2)

    q_row = q_out_ptr + (token * NUM_HEADS + head[:, None]) * HEAD_DIM
    k_row = k_cache_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS) * HEAD_DIM
    v_row = v_cache_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
    cached = slot >= 0
    q_mask = is_q[:, None] & in_half[None, :]
    k_mask = (is_k & cached)[:, None] & in_half[None, :]
    v_mask = (is_v & cached)[:, None] & in_half[None, :]
    tl.store(q_row + half[None, :], y1, mask=q_mask)
    tl.store(q_row + HALF + half[None, :], y2, mask=q_mask)
    y3, in_rest, inside_row = y1, in_half, in_half[None, :]
    if BLOCK_REST > 0:
        y3 = tl.where(rotated[:, None], x3.to(dtype), raw3)
        in_rest = rest < HEAD_DIM - 2 * HALF
        inside_row = in_rest[None, :]
        tl.store(q_row + 2 * HALF + rest[None, :], y3, mask=is_q[:, None] & inside_row)
    if (tl.program_id(1) + 1) * HEADS > NUM_HEADS:  # others have queries alone
        if PACKED > 0:
            kv_head = head - tl.where(is_k, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
            place = (slot // PACKED * NUM_KV_HEADS + kv_head) * PACKED + slot % PACKED
            if FP8:
                store_fp8(k_cache_ptr, v_cache_ptr, factors_ptr, y1, y2, y3, place, is_k & cached, is_v & cached, half,
                          in_half, in_rest, HALF, HEAD_DIM, BLOCK_REST)  # fmt: skip
            else:
                store_packed(k_cache_ptr, v_cache_ptr, factors_ptr, y1, y2, place, is_k & cached, is_v & cached, half,
                             in_half, HALF)  # fmt: skip
        else:
            tl.store(k_row + half[None, :], y1, mask=k_mask)
            tl.store(k_row + HALF + half[None, :], y2, mask=k_mask)
            tl.store(v_row + half[None, :], y1, mask=v_mask)
            tl.store(v_row + HALF + half[None, :], y2, mask=v_mask)
            if BLOCK_REST > 0:
                tl.store(k_row + 2 * HALF + rest[None, :], y3, mask=(is_k & cached)[:, None] & inside_row)
                tl.store(v_row + 2 * HALF + rest[None, :], y3, mask=(is_v & cached)[:, None] & inside_row)


@triton.jit
def _norm_weight(
    q_weight_ptr,
    k_weight_ptr,
    head,
    is_q,
    is_k,
    dim,
    inside,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    """The norms' weights of some dimensions of some heads, float32 [heads, dimensions]."""
    if NORM == 1:
        q_weight = tl.load(q_weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        k_weight = tl.load(k_weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    else:
        at = head[:, None] * HEAD_DIM + dim[None, :]
        q_weight = tl.load(q_weight_ptr + at, mask=is_q[:, None] & inside[None, :], other=0.0)
        at -= NUM_HEADS * HEAD_DIM
        k_weight = tl.load(k_weight_ptr + at, mask=is_k[:, None] & inside[None, :], other=0.0)
        weight = q_weight.to(tl.float32) + k_weight.to(tl.float32)
    return weight


@triton.jit
def _weighted(x, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    if UNIT_OFFSET:
        y = (x * (1.0 + weight)).to(dtype).to(tl.float32)
    else:
        y = (x.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return y


class NormedOverAll(NamedTuple):
    """How heads are normed over all ranks at once: by the sums of squares of queries and of keys, float32 [T, 2], which
    are those of so many elements."""

    sums_T2: torch.Tensor
    q_size: int
    k_size: int


def rope_cache(
    qkv_TF: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_heads: int,
    *,
    factors: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    over_all: NormedOverAll | None = None,
    interleaved: bool = False,
    gated: bool = False,
    growth: torch.Tensor | None = None,
    value_eps: float | None = None,
    held: str = "qkv",
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Optional QK-norm, rotary embedding, and the write of keys and values into the paged cache.

    qkv_TF: [T, (N + 2K) * D], rows [q | k | v] (or what is `held` of them: without v keys are values, as they are
    projected; queries alone write nothing), columns contiguous, or the runs [S, T, ..] of `split_linear`, which are
    summed and rounded first. k_cache, v_cache: [num_blocks, B, K, D], contiguous, in qkv's dtype; or, with exponents
    for factors, packed (`packed_kv`), of heads that are rotated whole; or, with scales, in FP8 (`fp8_kv`).
    cos_sin: two float32 tables [max_position, rotary_dim / 2], rotary_dim <= D; None: nothing is rotated.
    positions_T: int64 [T]. slot_mapping_T: int64 [T]; slot = block * B + offset; -1 writes nothing. pdl: neither is
    written by the kernel before. q_norm, k_norm (of what is held; `unit_offset`: Gemma's 1 + weight): RMSNorm weights
    [D] of each query and key head, or, with `over_all`, [N * D] and [K * D] of all heads at once. value_eps: of a norm
    of values without weights, beside those. Rotation is transformers' `rotate_half`, computed in float32 and rounded
    once. interleaved: pairs are neighbours; what is rotated is then [first of each pair, second of each pair].
    growth: float32 [max_position], by which queries are multiplied. gated: behind each query lies its gate, which is
    unused (`head_gates`). Returns the queries, [T, N, D] in qkv's dtype.
    """
    qkv_STF = as_runs(qkv_TF)
    splits, num_tokens, _ = qkv_STF.shape
    num_kv_heads, block_size = k_cache.shape[2], 0
    if factors is not None:
        num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    num_kv_heads *= held != "q"
    head_dim = qkv_TF.shape[-1] // (num_heads * (1 + gated) + (len(held) - 1) * num_kv_heads)
    half = head_dim // 2 if cos_sin is None else cos_sin[0].shape[1]
    unread = qkv_TF  # what stands for tensors that are not there
    cos, sin = (unread, unread) if cos_sin is None else cos_sin
    q_TND = qkv_TF.new_empty((num_tokens, num_heads, head_dim)) if out is None else out
    if num_tokens == 0:
        return q_TND
    rest = head_dim - 2 * half
    total = num_heads + 2 * num_kv_heads
    # Few tokens: spread one token over several programs, for latency. Many: one program per token or two.
    heads = min(next_power_of_2(total), 4 if num_tokens <= 64 else 16)
    sums, q_size, k_size = over_all or (unread, 1, 1)
    _rope_cache_kernel[(num_tokens, triton.cdiv(total, heads))](
        qkv_STF,
        q_TND,
        k_cache,
        v_cache,
        unread if factors is None else factors,
        cos,
        sin,
        positions_T,
        slot_mapping_T,
        unread if q_norm is None else q_norm,
        unread if k_norm is None else k_norm,
        sums,
        unread if growth is None else growth,
        qkv_STF.stride(1),
        qkv_STF.stride(0),
        eps,
        float(q_size),
        float(k_size),
        value_eps or 0.0,
        SPLITS=splits,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        ROTATED=cos_sin is not None,
        INTERLEAVED=interleaved,
        NORM=0 if q_norm is None else 1 if over_all is None else 2,
        UNIT_OFFSET=unit_offset,
        VALUE_NORM=value_eps is not None,
        KEYS_AS_VALUES=held == "qk",
        GROWTH=growth is not None,
        HEADS=heads,
        BLOCK_HALF=next_power_of_2(half),
        BLOCK_REST=next_power_of_2(rest) if rest > 0 else 0,
        PACKED=block_size,
        FP8=factors is not None and is_fp8(factors),
        GATED=gated,
        PDL=pdl,
        num_warps=1 if heads <= 4 else 4,
        **launch_options(pdl),
    )
    return q_TND


def rope_cache_reference(
    qkv_TF: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    num_heads: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    over_all: NormedOverAll | None = None,
    interleaved: bool = False,
    growth: torch.Tensor | None = None,
    value_eps: float | None = None,
    held: str = "qkv",
) -> torch.Tensor:
    """`rope_cache` in plain torch; writes the caches too."""
    num_tokens = qkv_TF.shape[0]
    num_kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
    heads = qkv_TF.view(num_tokens, -1, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads], heads[:, -num_kv_heads:]
    if value_eps is not None:
        v = _normed_reference(v, torch.ones_like(v[0, 0]), value_eps, False, None)
    q_mean, k_mean = None, None
    if over_all is not None:
        q_mean, k_mean = over_all.sums_T2[:, 0] / over_all.q_size, over_all.sums_T2[:, 1] / over_all.k_size
    q = q if q_norm is None else _normed_reference(q, q_norm, eps, unit_offset, q_mean)
    k = k if k_norm is None else _normed_reference(k, k_norm, eps, unit_offset, k_mean)
    if cos_sin is not None:
        cos, sin = (table[positions_T][:, None, :] for table in cos_sin)
        q, k = (_rotated_reference(one, cos, sin, interleaved) for one in (q, k))
    if growth is not None:
        q = (q.float() * growth[positions_T][:, None, None]).to(q.dtype)
    if held == "q":
        return q
    kept = slot_mapping_T >= 0
    k_cache.view(-1, num_kv_heads, head_dim)[slot_mapping_T[kept]] = k[kept]
    v_cache.view(-1, num_kv_heads, head_dim)[slot_mapping_T[kept]] = v[kept]
    return q


def _normed_reference(
    x_THD: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, mean_T: torch.Tensor | None
) -> torch.Tensor:
    """Heads normed each, or by the mean of squares of all."""
    from tpctl.kernels.common.norm import rms_norm_reference

    if mean_T is None:
        return rms_norm_reference(x_THD, weight, eps, unit_offset=unit_offset)
    normed = x_THD.float() * torch.rsqrt(mean_T + eps)[:, None, None]
    weight_HD = weight.view(x_THD.shape[1:])
    if unit_offset:
        return (normed * (1 + weight_HD.float())).to(x_THD.dtype)
    return normed.to(x_THD.dtype) * weight_HD


def _rotated_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half, wide = cos.shape[-1], x.float()
    x1, x2 = (
        (wide[..., : 2 * half : 2], wide[..., 1 : 2 * half : 2]) if interleaved else wide[..., : 2 * half].chunk(2, -1)
    )
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, wide[..., 2 * half :]], dim=-1).to(x.dtype)
