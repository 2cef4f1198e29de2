"""The launcher of `hopper_prefill_kernels`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tpctl.kernels.attention.hopper_prefill_kernels import ROWS, hopper_prefill_kernel
from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import num_multiprocessors

BLOCK_M = 2 * ROWS.value
"""Queries of a program."""


class HopperConfig(NamedTuple):
    """tile: keys at a time. num_stages: tiles that buffers hold. turns: whether halves of the queries issue products
    in turns. persistent: one program a multiprocessor."""

    tile: int = 128
    num_stages: int = 2
    turns: bool = False
    persistent: bool = True


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
    config: HopperConfig = HopperConfig(),
) -> torch.Tensor:
    """`paged_prefill` of bfloat16 heads of 64 or 128 on Hopper, all of what is before seen by each query; blocks of as
    many tokens as a tile or a multiple. Rows of q are 16-byte aligned."""
    num_tokens, num_heads, head_dim = q_TND.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs = seq_lens_S.shape[0]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = TensorDescriptor(
        q_TND, [num_tokens, num_heads * head_dim], [q_TND.stride(0), 1], [ROWS.value, head_dim], layout
    )
    width = num_kv_heads * head_dim
    k, v = (
        TensorDescriptor(cache, [num_blocks * block_size, width], [width, 1], [config.tile, head_dim], layout)
        for cache in (k_cache, v_cache)
    )
    # Pieces of work: as many as there are full ones of a head, and one more per sequence.
    works = num_heads * (num_tokens // BLOCK_M + num_seqs)
    programs = min(works, num_multiprocessors(q_TND.device)) if config.persistent else works
    hopper_prefill_kernel[(programs,)](
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
        STAGES=config.num_stages,
        TURNS=config.turns,
        num_warps=4,
    )
    return out
