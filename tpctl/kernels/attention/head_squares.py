"""Sums of squares of a token's queries and of its keys: what a norm over the heads of all ranks needs of each rank."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.runs import as_runs, sum_runs


@triton.jit
def _head_squares_kernel(
    qkv_ptr,
    out_ptr,
    qkv_stride,
    split_stride,
    SPLITS: tl.constexpr,
    Q_SIZE: tl.constexpr,
    K_SIZE: tl.constexpr,  # 0: keys are not counted
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = qkv_ptr + token * qkv_stride
    col = tl.arange(0, BLOCK_Q)
    q = sum_runs(row + col, col < Q_SIZE, split_stride, SPLITS).to(tl.float32)
    tl.store(out_ptr + token * 2, tl.sum(q * q, 0))
    keys = 0.0
    if K_SIZE > 0:
        col = tl.arange(0, BLOCK_K)
        k = sum_runs(row + Q_SIZE + col, col < K_SIZE, split_stride, SPLITS).to(tl.float32)
        keys = tl.sum(k * k, 0)
    tl.store(out_ptr + token * 2 + 1, keys)


def head_squares(
    qkv_TF: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    counts_keys: bool = True,
    pdl: bool = False,
) -> torch.Tensor:
    """float32 [T, 2]: the sums of squares of each token's queries, and of its keys.

    qkv_TF: [T, (N + 2K) * D], rows [q | k | v], columns contiguous, or the runs [S, T, (N + 2K) * D] of `split_linear`,
    which are summed and rounded first. counts_keys: otherwise the second sum is 0.
    """
    qkv_STF = as_runs(qkv_TF)
    splits, num_tokens, width = qkv_STF.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    out_T2 = torch.empty(num_tokens, 2, dtype=torch.float32, device=qkv_TF.device)
    if num_tokens == 0:
        return out_T2
    block = next_power_of_2(num_heads * head_dim)
    _head_squares_kernel[(num_tokens,)](
        qkv_STF,
        out_T2,
        qkv_STF.stride(1),
        qkv_STF.stride(0),
        SPLITS=splits,
        Q_SIZE=num_heads * head_dim,
        K_SIZE=num_kv_heads * head_dim if counts_keys else 0,
        BLOCK_Q=block,
        BLOCK_K=next_power_of_2(num_kv_heads * head_dim),
        PDL=pdl,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(pdl),
    )
    return out_T2


def head_squares_reference(
    qkv_TF: torch.Tensor, num_heads: int, num_kv_heads: int, *, counts_keys: bool = True
) -> torch.Tensor:
    """`head_squares` in plain torch."""
    heads = qkv_TF.float().view(qkv_TF.shape[0], num_heads + 2 * num_kv_heads, -1)
    squares = heads.square().sum(-1)
    keys = squares[:, num_heads : num_heads + num_kv_heads].sum(1)
    return torch.stack([squares[:, :num_heads].sum(1), keys if counts_keys else torch.zeros_like(keys)], dim=1)
