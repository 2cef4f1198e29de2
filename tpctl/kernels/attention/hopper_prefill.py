"""When `hopper_prefill_kernels` are used, and their launch."""

from __future__ import annotations

import torch
import triton

from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import is_hopper, num_multiprocessors

HEAD_DIM, TILE, STAGES = 128, 128, 2
"""Of the heads that it is for; keys at a time; tiles that its buffers hold."""
_BLOCK_M = 128
_FROM = 1024
"""New tokens of a sequence, in the mean, from which on it is used."""
_VERSIONS = ("3.6", "3.7")
"""Of Triton, whose Gluon the kernel is written in: others' has other names."""


def has_gluon() -> bool:
    """Whether this Triton can compile the kernel."""
    return triton.__version__.startswith(tuple(f"{version}." for version in _VERSIONS))


def takes(q_TND: torch.Tensor, k_cache: torch.Tensor, num_seqs: int) -> bool:
    """Whether `hopper_prefill` is faster than `paged_prefill`'s kernel here, and can read what there is. k_cache:
    [num_blocks, B, K, D], as are values."""
    num_tokens, _, head_dim = q_TND.shape
    return (
        is_hopper(q_TND.device)
        and has_gluon()
        and q_TND.dtype == k_cache.dtype == torch.bfloat16
        and head_dim == HEAD_DIM
        and k_cache.shape[1] % TILE == 0
        and num_tokens >= _FROM * num_seqs
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
    late: bool = True,
) -> torch.Tensor:
    """`paged_prefill` of what it `takes`, where a query sees all that is before it."""
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
    # Pieces of work of a head: as many as there are full ones, and one more per sequence.
    works = num_heads * (num_tokens // _BLOCK_M + num_seqs)
    hopper_prefill_kernel[(min(works, num_multiprocessors(q_TND.device)),)](
        q,
        k,
        v,
        block_tables,
        query_start_loc,
        seq_lens_S,
        torch.zeros(1, dtype=torch.int32, device=q_TND.device),  # pieces that have been taken
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
        LATE=late,
        num_warps=4,
    )
    return out
