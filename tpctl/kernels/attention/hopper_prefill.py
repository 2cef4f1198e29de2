"""When `hopper_prefill_kernels` are used, and their launch."""

from __future__ import annotations

import torch
import triton

from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import is_hopper, num_multiprocessors

HEAD_DIM, TILE, STAGES = 128, 128, 2
"""Of the heads that it is used for; keys at a time; tiles that its buffers hold."""
_BLOCK_M = 128
"""Queries of a piece of work."""
_SEEN, _PAIRS = 512, 1 << 26
"""Tokens that a new one sees, in the mean, and pairs of all heads, from which on it is used: fewer are too few pieces
for the device, or too short ones."""
_MANY = 32
"""Pieces for each multiprocessor from which on those of several sequences are about even among them."""
_VERSIONS = ("3.6.", "3.7.")
"""Of Triton, whose Gluon the kernel is written in: in others there are other names."""


def has_gluon() -> bool:
    """Whether this Triton can compile the kernel."""
    return triton.__version__.startswith(_VERSIONS)


def takes(q_TND: torch.Tensor, k_cache: torch.Tensor, pairs: int) -> bool:
    """Whether `hopper_prefill` is faster than `paged_prefill`'s own kernel, and can read what there is. k_cache:
    [num_blocks, B, K, D], as are values. pairs: as of `paged_prefill`."""
    num_tokens, num_heads, head_dim = q_TND.shape
    return (
        is_hopper(q_TND.device)
        and has_gluon()
        and q_TND.dtype == k_cache.dtype == torch.bfloat16
        and head_dim == HEAD_DIM
        and k_cache.shape[1] % TILE == 0
        and pairs >= _SEEN * num_tokens
        and pairs * num_heads >= _PAIRS
        and (q_TND.data_ptr() | 2 * q_TND.stride(0)) % 16 == 0
    )


def hopper_prefill(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_S: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """`paged_prefill` of bfloat16 heads of 64 or 128, blocks of a multiple of `TILE` and aligned queries, where a query
    sees all that is before it."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tpctl.kernels.attention.hopper_prefill_kernels import ROWS, hopper_prefill_kernel

    num_tokens, num_heads, head_dim = q_TND.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs = seq_lens_S.shape[0]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows = [num_tokens, num_heads * head_dim]
    q = TensorDescriptor(q_TND, rows, [q_TND.stride(0), 1], [ROWS.value, head_dim], layout)
    width = num_kv_heads * head_dim
    k, v = (
        TensorDescriptor(cache, [num_blocks * block_size, width], [width, 1], [TILE, head_dim], layout)
        for cache in (k_cache, v_cache)
    )
    # Of a head as many pieces as there are full ones, and one more per sequence.
    works = num_heads * (num_tokens // _BLOCK_M + num_seqs)
    # A program for each multiprocessor does its next piece with no start; but a few pieces of several sequences are
    # not even among them, so that the device had better give out programs as others end.
    programs = num_multiprocessors(q_TND.device)
    if num_seqs > 1 and works < _MANY * programs:
        programs = works
    hopper_prefill_kernel[(min(works, programs),)](
        q,
        k,
        v,
        block_tables,
        query_start_loc,
        seq_lens_S,
        out,
        scale * LOG2E.value,
        num_seqs,
        num_heads,
        works,
        block_tables.stride(0),
        out.stride(0),
        num_heads // num_kv_heads,
        block_size,
        STAGES=STAGES,
        num_warps=4,
    )
    return out
