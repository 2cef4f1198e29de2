"""What comes after latent attention: sums of latent vectors become values, W_v of each head, a batched GEMM."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.attention.latent_prepare import LatentShape
from tpctl.kernels.common.launch import launch_options, next_power_of_2


@triton.jit(do_not_specialize=["num_tokens"])
def _values_kernel(
    sums_ptr,
    kv_b_ptr,
    out_ptr,
    num_tokens,
    out_stride,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (RANK + BLOCK_K - 1) // BLOCK_K
    head = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_value = (t < num_tokens)[:, None], (v < VALUE)[:, None]
    weights = kv_b_ptr + (head * (NOPE + VALUE) + NOPE + v).to(tl.int64)[:, None] * RANK + k[None, :]
    sums = sums_ptr + (t.to(tl.int64) * NUM_HEADS + head)[:, None] * RANK + k[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if TILES == 1:
        w = tl.load(weights, mask=in_value & (k < RANK)[None, :], other=0.0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        x = tl.load(sums, mask=in_rows & (k < RANK)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    else:
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        for i in tl.range(0, TILES, num_stages=STAGES):
            inside = (i * BLOCK_K + k < RANK)[None, :]
            w = tl.load(weights + i * BLOCK_K, mask=in_value & inside, other=0.0)
            x = tl.load(sums + i * BLOCK_K, mask=in_rows & inside, other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    out = out_ptr + t.to(tl.int64)[:, None] * out_stride + head * VALUE + v[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_rows & (v < VALUE)[None, :])


class ValuesConfig(NamedTuple):
    """Tokens, dimensions of a value and numbers of a sum that a program takes at once."""

    block_t: int
    block_v: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 1


def values_config(num_tokens: int, num_heads: int, shape: LatentShape, itemsize: int) -> ValuesConfig:
    """Few tokens read the weights once, each program all of its own before it waits; many are a batched GEMM."""
    widest, longest = max(16, next_power_of_2(shape.value)), max(16, next_power_of_2(shape.rank))
    if itemsize == 4:
        return ValuesConfig(16 if num_tokens <= 16 else 32, min(widest, 32), min(longest, 64))
    if num_tokens <= 16:
        return ValuesConfig(16, min(widest, 16 if num_heads <= 32 else 32), min(longest, 512))
    return ValuesConfig(32 if num_tokens <= 64 else 128, min(widest, 128), min(longest, 64), 4, 3)


def latent_values(
    sums_TNR: torch.Tensor,
    kv_b: torch.Tensor,
    shape: LatentShape,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Weighted sums of latent vectors [T, N, R], contiguous, to those of values, [T, N * V], rows any stride.

    kv_b: [N * (P + V), R] contiguous, the sums' dtype; products are summed in float32 and rounded once.
    """
    num_tokens, num_heads, rank = sums_TNR.shape
    out_TF = sums_TNR.new_empty(num_tokens, num_heads * shape.value) if out is None else out
    if num_tokens == 0:
        return out_TF
    config = values_config(num_tokens, num_heads, shape, sums_TNR.itemsize)
    grid = (num_heads, triton.cdiv(shape.value, config.block_v), triton.cdiv(num_tokens, config.block_t))
    _values_kernel[grid](
        sums_TNR,
        kv_b,
        out_TF,
        num_tokens,
        out_TF.stride(0),
        NUM_HEADS=num_heads,
        RANK=rank,
        NOPE=shape.nope,
        VALUE=shape.value,
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )
    return out_TF


def latent_values_reference(sums_TNR: torch.Tensor, kv_b: torch.Tensor, shape: LatentShape) -> torch.Tensor:
    """`latent_values` in plain torch."""
    wide = torch.promote_types(sums_TNR.dtype, torch.float32)
    values_NVR = kv_b.view(sums_TNR.shape[1], -1, shape.rank)[:, shape.nope :].to(wide)
    return torch.einsum("tnr,nvr->tnv", sums_TNR.to(wide), values_NVR).flatten(1).to(sums_TNR.dtype)
