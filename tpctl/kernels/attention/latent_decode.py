"""Decode attention over a paged cache of latent vectors: one query token a sequence, and all heads read the same rows.

A row of the cache is [latent vector (R) | rotated key (Q)]. A head's query is absorbed (`latent_prepare`), so its score
with a row is one product over R + Q, and the row's first R numbers are its value. The heads of a sequence are the rows
of a matrix: what a program reads of the cache it multiplies with all of them, up to 64 at once.

Work is laid out as of `paged_decode`, in equal runs of one line of tiles. A run that covers a whole sequence writes its
sums; of any other it leaves a part in one of its program's two slots, and a second kernel adds the parts up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from tpctl.kernels.attention.latent_decode_kernels import latent_combine_kernel, latent_decode_kernel
from tpctl.kernels.attention.tile_runs import LOG2E, plan_kernel
from tpctl.kernels.common.launch import (
    capability,
    launch_options,
    next_power_of_2,
    num_multiprocessors,
    shared_memory,
)


class LatentConfig(NamedTuple):
    """Heads of a program, tokens of a tile, programs for all heads together, the least tiles of one."""

    block_m: int
    tile: int
    num_programs: int
    num_warps: int
    num_stages: int
    min_tiles: int = 1


def most_rows(capability: tuple[int, int]) -> int:
    """Heads whose products with a row fit a program: sums of 64 x 512 are half of all registers, and need the shared
    memory of an A100 or an H100; the products that B200s have for 64 rows take more of it than there is."""
    return 64 if capability == (8, 0) or capability[0] == 9 else 32


def latent_config(
    num_heads: int, rank: int, rope: int, num_sms: int, itemsize: int, limit: int, most: int = 64
) -> LatentConfig:
    """The configuration for so many heads of a rank, that takes at most ``limit`` bytes of shared memory.

    rank, rope: dimensions of a row. itemsize: bytes of a number. most: what `most_rows` says.
    """
    block_m = 16 if itemsize == 4 else min(most, max(16, next_power_of_2(num_heads)))
    row = (row_width(rank) + row_width(rope)) * itemsize
    # Two tiles are in flight; the products of 64 rows and more want one less for that.
    tile, stages = 16 if itemsize == 4 else 64, 2 if block_m == 64 else 3

    def taken() -> int:  # queries, two tiles, weights of one
        return (block_m + 2 * tile) * row + block_m * tile * itemsize

    while taken() > limit and tile > 16:
        tile //= 2
    programs = max(1, num_sms // -(-num_heads // block_m))
    return LatentConfig(block_m, tile, programs, 4 if block_m == 16 else 8, stages)


def row_width(dim: int) -> int:
    """Columns of a tile that a product takes of so many dimensions."""
    return max(16, next_power_of_2(dim))


@dataclass(frozen=True)
class LatentScratch:
    """Device memory that decode calls on one stream share: parts of sums, their top scores and weights."""

    partial: torch.Tensor
    stats: torch.Tensor

    @staticmethod
    def allocate(num_heads: int, rank: int, device: torch.device) -> LatentScratch:
        """Room for any plan of `num_heads` (rank-local) query heads."""
        rows = 2 * max(num_multiprocessors(device), 8) * num_heads
        return LatentScratch(
            torch.empty(rows * rank, dtype=torch.float32, device=device),
            torch.empty(rows * 2, dtype=torch.float32, device=device),
        )


class LatentPlan:
    """How the work of one batch is divided. Build one per (captured) batch size; `update` it once a step.

    num_heads: this rank's. rank, rope: dimensions of a row. config: overrides the choice.
    """

    def __init__(
        self,
        num_seqs: int,
        num_heads: int,
        rank: int,
        rope: int,
        block_size: int,
        scratch: LatentScratch,
        *,
        itemsize: int = 2,
        config: LatentConfig | None = None,
    ) -> None:
        device = scratch.partial.device
        self.config = config or latent_config(
            num_heads,
            rank,
            rope,
            num_multiprocessors(device),
            itemsize,
            shared_memory(device),
            most_rows(capability(device)),
        )
        if self.config.num_programs * 2 * num_heads * rank > scratch.partial.numel():
            raise ValueError(f"{self.config.num_programs} programs need more scratch than was allocated")
        self.num_seqs, self.num_heads, self.rank, self.rope = num_seqs, num_heads, rank, rope
        self.block_size, self.scratch = block_size, scratch
        self.cu_tiles = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device)
        self.first_seq, self._ahead = torch.zeros(2, self.config.num_programs, dtype=torch.int32, device=device)

    def update(self, seq_lens_S: torch.Tensor) -> None:
        """Divide the work anew for seq_lens_S, int32 [S]; one launch, before the step's first layer."""
        programs = self.config.num_programs
        plan_kernel[(triton.cdiv(programs, 16),)](
            seq_lens_S,
            seq_lens_S,
            self.cu_tiles,
            self.cu_tiles,
            self.first_seq,
            self._ahead,
            self.num_seqs,
            programs,
            self.config.min_tiles,
            TILE=self.config.tile,
            WINDOW=0,
            SHARED=False,
            BLOCK_SEQS=next_power_of_2(self.num_seqs),
            BLOCK_PROGRAMS=16,
            num_warps=4,
        )


def latent_decode(
    q_SNC: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens_S: torch.Tensor,
    plan: LatentPlan,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one query token per sequence over what is kept of its context, the token itself included.

    q_SNC: [S, N, R + Q] contiguous, absorbed. cache: [num_blocks, B, R + Q] contiguous, q's dtype, B a power of two.
    block_tables: int32 [S, max_blocks], rows any stride. seq_lens_S: int32 [S]; 0 marks a row without work, whose
    output is not touched. plan: updated with these seq_lens; with pdl, at least two kernels before this one.
    Returns [S, N, R] in q's dtype, contiguous: each head's weighted sum of latent vectors.
    """
    num_seqs, num_heads = q_SNC.shape[:2]
    rank, rope, config = plan.rank, plan.rope, plan.config
    sums = q_SNC.new_empty(num_seqs, num_heads, rank) if out is None else out
    scratch = plan.scratch
    latent_decode_kernel[(config.num_programs * triton.cdiv(num_heads, config.block_m),)](
        q_SNC,
        cache,
        block_tables,
        seq_lens_S,
        plan.cu_tiles,
        plan.first_seq,
        scratch.partial,
        scratch.stats,
        sums,
        scale * LOG2E.value,
        num_seqs,
        config.num_programs,
        config.min_tiles,
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        RANK=rank,
        ROPE=rope,
        BLOCK_RANK=row_width(rank),
        BLOCK_ROPE=row_width(rope),
        BLOCK_SIZE=plan.block_size,
        TILE=config.tile,
        BLOCK_M=config.block_m,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    block_n = min(128, next_power_of_2(rank))
    latent_combine_kernel[(num_seqs, num_heads, triton.cdiv(rank, block_n))](
        scratch.partial,
        scratch.stats,
        plan.cu_tiles,
        sums,
        num_seqs,
        config.num_programs,
        config.min_tiles,
        NUM_HEADS=num_heads,
        RANK=rank,
        BLOCK_N=block_n,
        BLOCK_PARTS=32,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return sums


def latent_attention_reference(
    q_TNC: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    rank: int,
    *,
    scale: float,
) -> torch.Tensor:
    """[T, N, R]: the last ``query_lens`` tokens of each sequence, each over all before it and itself, in plain torch:
    what `latent_decode` computes of one token each, and `latent_prefill` of several."""
    block_size, wide = cache.shape[1], torch.promote_types(q_TNC.dtype, torch.float32)
    found = q_TNC.new_zeros(*q_TNC.shape[:2], rank)
    first = 0
    for s, (new, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = block_tables[s, : -(-length // block_size)].long()
        kept_LC = cache[blocks].reshape(-1, cache.shape[-1])[:length].to(wide)
        scores = torch.einsum("tnc,lc->ntl", q_TNC[first : first + new].to(wide), kept_LC) * scale
        keys = torch.arange(length, device=cache.device)
        scores = scores.masked_fill(keys > keys[length - new :, None], float("-inf"))
        weights = scores.softmax(-1)
        found[first : first + new] = torch.einsum("ntl,lr->tnr", weights, kept_LC[:, :rank]).to(q_TNC.dtype)
        first += new
    return found
