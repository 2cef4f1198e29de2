"""What comes before latent attention, in one launch: the new tokens' vectors into the paged cache, and queries into the
space of what is kept there.

    kv_a x ── norm | RoPE ─────────────────── a row of the cache, [R + Q]
    q      ── W_k^T | RoPE, head by head ──── [N, R + Q], whose products with such rows are the scores

Rows of which the second is not wanted, those of prompts that make keys of the cache, have their queries rotated alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.rope_cache import _rotated_reference
from tpctl.kernels.common.launch import ANYWHERE, launch_options, next_power_of_2
from tpctl.kernels.common.norm import rms_norm_reference


class LatentShape(NamedTuple):
    """Dimensions: of the latent vector (R), of a head's part without RoPE (P) and with it (Q), and of a value (V)."""

    rank: int
    nope: int
    rope: int
    value: int


@triton.jit
def _rotate_some(
    pointers,  # [M, 1], to what is rotated
    out,  # [M, 1]
    cos_ptr,
    sin_ptr,
    positions_ptr,
    token,  # [M], whose positions they have
    live,  # [M]
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate M vectors of pairs, and store the firsts of all pairs and then the seconds."""
    half = tl.arange(0, BLOCK_HALF)[None, :]
    mask = live[:, None] & (half < HALF)
    position = tl.load(positions_ptr + token, mask=live, other=0)[:, None]
    cos = tl.load(cos_ptr + position * HALF + half, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=mask, other=0.0)
    if INTERLEAVED:
        x1 = tl.load(pointers + 2 * half, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(pointers + 2 * half + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        x1 = tl.load(pointers + half, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(pointers + HALF + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + half, (x1 * cos - x2 * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF + half, (x2 * cos + x1 * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _keep(
    kept_ptr,
    cache_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    kept_stride,
    eps,
    token,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Norm a token's latent vector, rotate its key, and write both to its slot."""
    r = tl.arange(0, BLOCK_RANK)
    in_rank = r < RANK
    token = token.to(tl.int64)
    slot = tl.load(slots_ptr + token)
    row = kept_ptr + token * kept_stride
    raw = tl.load(row + r, mask=in_rank, other=0.0)
    value = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / RANK + eps)
    weight = tl.load(weight_ptr + r, mask=in_rank, other=0.0).to(tl.float32)
    normed = (value * scale).to(raw.dtype).to(tl.float32) * weight
    out = cache_ptr + slot * (RANK + 2 * HALF)
    tl.store(out + r, normed.to(raw.dtype), mask=in_rank & (slot >= 0))
    one = tl.arange(0, 1)
    key, to = row + RANK + one[:, None], out + RANK + one[:, None]
    _rotate_some(key, to, cos_ptr, sin_ptr, positions_ptr, token + one, slot + one >= 0, HALF, BLOCK_HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["num_tokens", "num_absorbed"], do_not_specialize_on_alignment=ANYWHERE)
def _prepare_kernel(
    q_ptr,
    kept_ptr,
    kv_b_ptr,
    cache_ptr,
    absorbed_ptr,
    rotated_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_stride,
    kept_stride,
    eps,
    num_tokens,
    num_absorbed,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,  # of the dimensions with RoPE
    VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of the latent space's dimensions that a program gives
    PDL: tl.constexpr,
):
    # The first programs have a token each, the others one head of some tokens and a part of its result.
    KEPT: tl.constexpr = RANK + 2 * HALF
    KEY: tl.constexpr = NOPE + 2 * HALF
    TILES: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if program < num_tokens:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _keep(kept_ptr, cache_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, kept_stride, eps, program,
              RANK, HALF, BLOCK_RANK, BLOCK_HALF, INTERLEAVED)  # fmt: skip
        if program >= num_absorbed:
            for first in tl.range(0, NUM_HEADS, BLOCK_HEADS):
                heads = first + tl.arange(0, BLOCK_HEADS)
                queries = q_ptr + program.to(tl.int64) * q_stride + heads[:, None] * KEY + NOPE
                to = rotated_ptr + ((program - num_absorbed).to(tl.int64) * NUM_HEADS + heads)[:, None] * (2 * HALF)
                _rotate_some(queries, to, cos_ptr, sin_ptr, positions_ptr, program + 0 * heads, heads < NUM_HEADS, HALF,
                             BLOCK_HALF, INTERLEAVED)  # fmt: skip
    else:
        job = program - num_tokens
        tile = job % TILES
        head = job // TILES % NUM_HEADS
        t = job // (TILES * NUM_HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p = tl.arange(0, BLOCK_NOPE)
        weights = kv_b_ptr + (head * (NOPE + VALUE) + p).to(tl.int64)[:, None] * RANK + n[None, :]
        w = tl.load(weights, mask=(p < NOPE)[:, None] & (n < RANK)[None, :], other=0.0)
        if PDL:
            # Only once the predecessor is complete: attention, which follows, reads the step's plan before it waits.
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        in_rows = t < num_absorbed
        queries = q_ptr + t.to(tl.int64)[:, None] * q_stride + head * KEY
        q = tl.load(queries + p[None, :], mask=in_rows[:, None] & (p < NOPE)[None, :], other=0.0)
        found = tl.dot(q, w, input_precision="ieee")
        out = absorbed_ptr + (t.to(tl.int64) * NUM_HEADS + head)[:, None] * KEPT
        found = found.to(absorbed_ptr.dtype.element_ty)
        tl.store(out + n[None, :], found, mask=in_rows[:, None] & (n < RANK)[None, :])
        if tile == 0:
            _rotate_some(queries + NOPE, out + RANK, cos_ptr, sin_ptr, positions_ptr, t, in_rows, HALF, BLOCK_HALF,
                         INTERLEAVED)  # fmt: skip


class PrepareConfig(NamedTuple):
    """Tokens and dimensions of the latent space that a program absorbs."""

    block_t: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1


def prepare_config(num_absorbed: int, num_heads: int, rank: int, itemsize: int) -> PrepareConfig:
    """Few tokens read the weights once, by many programs; many tokens are a batched GEMM."""
    widest = max(16, next_power_of_2(rank))
    if itemsize == 4:
        return PrepareConfig(16, min(widest, 32))
    if num_absorbed <= 16:
        return PrepareConfig(16, min(widest, 64 if num_heads <= 32 else 128))
    return PrepareConfig(32 if num_absorbed <= 64 else 64, min(widest, 128))


def latent_prepare(
    q_TF: torch.Tensor,
    kept_TC: torch.Tensor,
    kv_b: torch.Tensor,
    cache: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    shape: LatentShape,
    *,
    num_absorbed: int | None = None,
    interleaved: bool = False,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write what is kept of new tokens, and prepare their queries.

    q_TF: [T, N * (P + Q)], and kept_TC: [T, R + Q], latent vectors and keys, as they are projected, rows any stride.
    kv_b: [N * (P + V), R] contiguous. cache: [num_blocks, B, R + Q] contiguous. All of one dtype.
    norm: the latent vectors' RMSNorm, (weight [R], eps). cos_sin: two float32 tables [max_position, Q / 2].
    positions_T, slot_mapping_T: int64 [T]; a slot of -1 writes nothing. interleaved: pairs are neighbours; the rotated
    dimensions are then [first of each pair, second of each pair]. num_absorbed: of the first so many rows, default all.
    Returns, in q's dtype, [num_absorbed, N, R + Q], and of the other rows what is rotated, [T - num_absorbed, N, Q].
    """
    num_tokens = q_TF.shape[0]
    num_absorbed = num_tokens if num_absorbed is None else num_absorbed
    num_heads = q_TF.shape[1] // (shape.nope + shape.rope)
    absorbed = q_TF.new_empty(num_absorbed, num_heads, shape.rank + shape.rope)
    rotated = q_TF.new_empty(num_tokens - num_absorbed, num_heads, shape.rope)
    if num_tokens == 0:
        return absorbed, rotated
    config = prepare_config(num_absorbed, num_heads, shape.rank, q_TF.itemsize)
    jobs = triton.cdiv(num_absorbed, config.block_t) * num_heads * triton.cdiv(shape.rank, config.block_n)
    _prepare_kernel[(num_tokens + jobs,)](
        q_TF,
        kept_TC,
        kv_b,
        cache,
        absorbed,
        rotated,
        norm[0],
        *cos_sin,
        positions_T,
        slot_mapping_T,
        q_TF.stride(0),
        kept_TC.stride(0),
        norm[1],
        num_tokens,
        num_absorbed,
        NUM_HEADS=num_heads,
        RANK=shape.rank,
        NOPE=shape.nope,
        HALF=shape.rope // 2,
        VALUE=shape.value,
        INTERLEAVED=interleaved,
        BLOCK_RANK=next_power_of_2(shape.rank),
        BLOCK_NOPE=max(16, next_power_of_2(shape.nope)),
        BLOCK_HALF=next_power_of_2(shape.rope // 2),
        BLOCK_HEADS=min(next_power_of_2(num_heads), 16),
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )
    return absorbed, rotated


def latent_prepare_reference(
    q_TF: torch.Tensor,
    kept_TC: torch.Tensor,
    kv_b: torch.Tensor,
    cache: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    shape: LatentShape,
    *,
    num_absorbed: int | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`latent_prepare` in plain torch; writes the cache too."""
    num_tokens = len(q_TF)
    num_absorbed = num_tokens if num_absorbed is None else num_absorbed
    cos, sin = (table[positions_T] for table in cos_sin)
    key_TQ = _rotated_reference(kept_TC[:, shape.rank :], cos, sin, interleaved)
    row_TC = torch.cat([rms_norm_reference(kept_TC[:, : shape.rank], norm[0], norm[1]), key_TQ], dim=-1)
    live = slot_mapping_T >= 0
    cache.view(-1, row_TC.shape[1])[slot_mapping_T[live]] = row_TC[live]
    q_TND = q_TF.view(num_tokens, -1, shape.nope + shape.rope)
    rotated = _rotated_reference(q_TND[..., shape.nope :], cos[:, None], sin[:, None], interleaved)
    keys_NPR = kv_b.view(q_TND.shape[1], -1, shape.rank)[:, : shape.nope]
    wide = torch.promote_types(q_TF.dtype, torch.float32)
    absorbed = torch.einsum("tnp,npr->tnr", q_TND[:num_absorbed, :, : shape.nope].to(wide), keys_NPR.to(wide))
    absorbed = torch.cat([absorbed.to(q_TF.dtype), rotated[:num_absorbed]], dim=-1)
    return absorbed, rotated[num_absorbed:]
