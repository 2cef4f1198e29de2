"""Causal attention of prompts over keys and values that were made of latent vectors: heads of usual size, whose keys
are [made for the head | rotated, one for all heads] and whose values may have another size.

What was made lies one sequence after the other, not in pages: it serves one layer of one step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.latent_decode import row_width
from tpctl.kernels.attention.latent_prepare import LatentShape
from tpctl.kernels.attention.paged_prefill import PrefillConfig, fitted
from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import shared_memory


@triton.jit
def _attend(
    acc,
    top,
    weight,
    q,
    q_rope,
    made,
    shared,
    length,
    position,
    first,
    last,
    scale_log2e,
    made_stride,
    shared_stride,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the key tiles [first, last) into the running softmax; MASKED where causality or length can cut."""
    p = tl.arange(0, BLOCK_NOPE)
    c = tl.arange(0, BLOCK_ROPE)
    v = tl.arange(0, BLOCK_VALUE)
    for tile in tl.range(first, last, num_stages=STAGES):
        token = tile * TILE + tl.arange(0, TILE)
        rows = made + token.to(tl.int64)[:, None] * made_stride
        shared_rows = shared + token.to(tl.int64)[:, None] * shared_stride
        if MASKED:
            live = (token < length)[:, None]
            key = tl.load(rows + p[None, :], mask=live & (p < NOPE)[None, :], other=0.0)
            key_rope = tl.load(shared_rows + c[None, :], mask=live & (c < ROPE)[None, :], other=0.0)
            value = tl.load(rows + NOPE + v[None, :], mask=live & (v < VALUE)[None, :], other=0.0)
        else:
            key = tl.load(rows + p[None, :], mask=(p < NOPE)[None, :], other=0.0)
            key_rope = tl.load(shared_rows + c[None, :], mask=(c < ROPE)[None, :], other=0.0)
            value = tl.load(rows + NOPE + v[None, :], mask=(v < VALUE)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(key_rope), score, input_precision="ieee") * scale_log2e
        if MASKED:
            score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))  # every row sees the first tile: finite from there on
        weights = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(weights, 1)
        top = new_top
        acc = tl.dot(weights.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return acc, top, weight


@triton.jit(do_not_specialize=["num_seqs"])
def latent_plain_kernel(
    q_ptr,
    rotated_ptr,
    made_ptr,
    shared_ptr,
    query_start_ptr,
    key_start_ptr,
    out_ptr,
    scale_log2e,
    num_seqs,
    q_stride,
    rotated_stride,
    made_stride,
    shared_stride,
    out_stride,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    slot = tl.program_id(1)
    # As in `paged_prefill`: sequence s owns the slots from its first row // BLOCK_M + s on.
    low = slot * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_M + middle <= slot:
            low = middle
        else:
            high = middle
    seq = low
    q_start = tl.load(query_start_ptr + seq)
    q_len = tl.load(query_start_ptr + seq + 1) - q_start
    index = slot - (q_start // BLOCK_M + seq)
    if (index < 0) | (index * BLOCK_M >= q_len):  # before the first sequence; beyond its tiles
        return
    index = tl.cdiv(q_len, BLOCK_M) - 1 - index  # the last rows see the most keys; start them first
    key_start = tl.load(key_start_ptr + seq)
    length = tl.load(key_start_ptr + seq + 1) - key_start
    m = index * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.arange(0, BLOCK_NOPE)
    c = tl.arange(0, BLOCK_ROPE)
    v = tl.arange(0, BLOCK_VALUE)
    in_rows = (m < q_len)[:, None]
    row = (q_start + m).to(tl.int64)[:, None]
    q = tl.load(q_ptr + row * q_stride + head * (NOPE + ROPE) + p[None, :], mask=in_rows & (p < NOPE)[None, :],
                other=0.0)  # fmt: skip
    q_rope = tl.load(rotated_ptr + row * rotated_stride + head * ROPE + c[None, :],
                     mask=in_rows & (c < ROPE)[None, :], other=0.0)  # fmt: skip
    made = made_ptr + key_start.to(tl.int64) * made_stride + head * (NOPE + VALUE)
    shared = shared_ptr + key_start.to(tl.int64) * shared_stride
    first_position = length - q_len + index * BLOCK_M
    position = length - q_len + m
    full_end = (first_position + 1) // TILE  # tiles below the diagonal need no mask
    end = (tl.minimum(first_position + BLOCK_M, length) - 1) // TILE + 1
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    acc, top, weight = _attend(acc, top, weight, q, q_rope, made, shared, length, position, 0, full_end, scale_log2e,
                               made_stride, shared_stride, NOPE, ROPE, VALUE, BLOCK_NOPE, BLOCK_ROPE, BLOCK_VALUE, TILE,
                               False, STAGES)  # fmt: skip
    acc, top, weight = _attend(acc, top, weight, q, q_rope, made, shared, length, position, full_end, end, scale_log2e,
                               made_stride, shared_stride, NOPE, ROPE, VALUE, BLOCK_NOPE, BLOCK_ROPE, BLOCK_VALUE, TILE,
                               True, STAGES)  # fmt: skip
    out = (acc / weight[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + head * VALUE + v[None, :], out, mask=in_rows & (v < VALUE)[None, :])


def plain_config(num_tokens: int, num_seqs: int, shape: LatentShape, itemsize: int, limit: int) -> PrefillConfig:
    """The configuration for new tokens of so many sequences, made smaller where it takes more than ``limit`` bytes of
    shared memory. itemsize: bytes of a number."""
    if itemsize == 4:
        config = PrefillConfig(16, 32, 4, 1)
    elif num_tokens <= max(512, 64 * num_seqs):  # short chunks: do not pad them far
        config = PrefillConfig(64, 64, 4, 2)
    else:
        config = PrefillConfig(128, 128, 8, 2)
    key, value = row_width(shape.nope) + row_width(shape.rope), row_width(shape.value)
    return fitted(config, key * itemsize, value * itemsize, limit)


def latent_plain(
    q_TND: torch.Tensor,
    rotated_TNQ: torch.Tensor,
    made_LF: torch.Tensor,
    shared_LQ: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
    shape: LatentShape,
    out_TNV: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Causal attention of each sequence's new tokens, its last, over all of its keys, into ``out_TNV``.

    q_TND: [T, N, P + Q], of which the last Q are not read: rotated they are rotated_TNQ, [T, N, Q]. made_LF:
    [L, N * (P + V)], a key without RoPE and a value of each head. shared_LQ: [L, Q], rotated keys. out_TNV: [T, N, V].
    Rows of any stride, heads behind each other. Sequence s owns the rows query_start_loc[s] to query_start_loc[s + 1]
    of T, which may be none, and key_start_loc[s] to key_start_loc[s + 1] of L; int32 [S + 1].
    """
    num_tokens, num_heads = q_TND.shape[:2]
    num_seqs = query_start_loc.shape[0] - 1
    config = plain_config(num_tokens, num_seqs, shape, q_TND.itemsize, shared_memory(q_TND.device))
    latent_plain_kernel[(num_heads, num_tokens // config.block_m + num_seqs)](
        q_TND,
        rotated_TNQ,
        made_LF,
        shared_LQ,
        query_start_loc,
        key_start_loc,
        out_TNV,
        scale * LOG2E.value,
        num_seqs,
        q_TND.stride(0),
        rotated_TNQ.stride(0),
        made_LF.stride(0),
        shared_LQ.stride(0),
        out_TNV.stride(0),
        NOPE=shape.nope,
        ROPE=shape.rope,
        VALUE=shape.value,
        BLOCK_NOPE=row_width(shape.nope),
        BLOCK_ROPE=row_width(shape.rope),
        BLOCK_VALUE=row_width(shape.value),
        BLOCK_M=config.block_m,
        TILE=config.tile,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def latent_plain_reference(
    q_TND: torch.Tensor,
    rotated_TNQ: torch.Tensor,
    made_LF: torch.Tensor,
    shared_LQ: torch.Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    shape: LatentShape,
    *,
    scale: float,
) -> torch.Tensor:
    """[T, N, V]: `latent_plain` in plain torch."""
    wide = torch.promote_types(q_TND.dtype, torch.float32)
    q_TND = torch.cat([q_TND[..., : shape.nope], rotated_TNQ], dim=-1).to(wide)
    found = q_TND.new_zeros(*q_TND.shape[:2], shape.value)
    made_LNF = made_LF.view(len(made_LF), q_TND.shape[1], shape.nope + shape.value).to(wide)
    first = start = 0
    for new, length in zip(query_lens, seq_lens, strict=True):
        own = slice(start, start + length)
        shared_LNQ = shared_LQ[own, None].expand(-1, q_TND.shape[1], -1).to(wide)
        keys = torch.cat([made_LNF[own, :, : shape.nope], shared_LNQ], dim=-1)
        scores = torch.einsum("tnd,lnd->ntl", q_TND[first : first + new], keys) * scale
        places = torch.arange(length, device=q_TND.device)
        scores = scores.masked_fill(places > places[length - new :, None], float("-inf"))
        values_LNV = made_LNF[own, :, shape.nope :]
        found[first : first + new] = torch.einsum("ntl,lnv->tnv", scores.softmax(-1), values_LNV)
        first, start = first + new, start + length
    return found.to(made_LF.dtype)
