"""Decode attention over a paged KV cache: one new token per sequence, grouped-query heads, split over the context.

The work is laid out on the device. A sequence's context is cut into tiles; the tiles of all sequences form
one line, and every program takes an equal run of it, so programs read equally much whatever the lengths:

    tiles      | s0 s0 s0 s0 s0 s0 s0 | s1 | s2 s2 s2 s2 s2 s2 |
    programs   | p0    p0    p0  | p1    p1   p1  | p2 ...     |

A run that covers a whole sequence writes its output. Otherwise it leaves a partial result in one of its
program's two slots (0: the run's first sequence, 1: its last), and the program that finishes a sequence last
combines its partials, in order, so results do not depend on timing. The line (`DecodePlan.update`) is
computed once a step and serves all layers.

In large batches a program begins with the end of its run, the sequence that the next program goes on with (p0 with s1
above), so that combining happens while others still read, and most programs end with a whole sequence.

The cache holds keys and values as they are; or packed (`packed_kv`) or in FP8 (`fp8_kv`), for which there is a kernel
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from tpctl.kernels.attention.packed_decode_kernels import packed_decode_kernel
from tpctl.kernels.attention.packed_kv import as_words, is_fp8, row_bytes
from tpctl.kernels.attention.paged_decode_kernels import decode_kernel
from tpctl.kernels.attention.reference import softcap_reference, softmax_reference
from tpctl.kernels.attention.shared_prefix import SharedPrefix, attend_to_prefix
from tpctl.kernels.attention.tile_runs import LOG2E, plan_kernel
from tpctl.kernels.common.launch import launch_options, next_power_of_2, num_multiprocessors, shared_memory

LONG_CONTEXT = 1024
"""Tokens from which one or two sequences are decoded by a configuration of their own."""


class DecodeConfig(NamedTuple):
    """How decode is cut: tokens per tile, programs per kv head, the least tiles a program takes, launch parameters.

    early: whether programs may be placed while the kernel before still runs. ahead: whether a run's last sequence is
    computed first where it goes on in the next run.
    """

    tile: int
    num_programs: int
    num_warps: int
    num_stages: int
    min_tiles: int = 1
    early: bool = True
    ahead: bool = False


def decode_config(
    num_seqs: int, num_heads: int, num_kv_heads: int, num_sms: int, *, long: bool = False, wide: bool = False
) -> DecodeConfig:
    """The tuned configuration for a batch shape (docs/kernel-notes.md has the sweep).

    long: the longest context has `LONG_CONTEXT` tokens or more. wide: heads have 128 dimensions and KV blocks at least
    128 tokens.
    """
    # Few programs with little shared memory let the next kernel's start early, which counts where a step is short;
    # one buffer per tile then does, until a context is so long that its reading outweighs the rest.
    per_sm = 1 if num_seqs <= 16 else 2
    num_programs = max(1, num_sms * per_sm // num_kv_heads)
    if per_sm == 2:
        # A big batch's equal shares need the programs spread evenly. Placed while the kernel before still fills some
        # multiprocessors, small ones would pile up on the others.
        ahead = num_seqs > 64  # of fewer, a run has too few to end with a whole one
        if wide:
            return DecodeConfig(128, num_programs, num_warps=4, num_stages=2, ahead=ahead)
        return DecodeConfig(64, num_programs, num_warps=4, num_stages=3, early=False, ahead=ahead)
    if num_seqs > 2 or (long and (num_seqs > 1 or num_heads <= 2 * num_kv_heads)):
        return DecodeConfig(64, num_programs, num_warps=4, num_stages=3)
    if long:
        # Two buffers of half the size, and fewer partial results to combine.
        return DecodeConfig(32, num_programs, num_warps=4, num_stages=3, min_tiles=4)
    return DecodeConfig(64, num_programs, num_warps=4, num_stages=2)


def packed_decode_config(
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_sms: int,
    limit: int,
    *,
    long: bool = False,
) -> DecodeConfig:
    """The tuned configuration for a packed cache, whose unpacking wants many warps that wait for nobody, made smaller
    where it takes more than ``limit`` bytes of shared memory."""
    if num_seqs > 2:
        programs = min(num_sms * (8 if num_seqs > 8 else 4) // num_kv_heads, 4 * num_sms)
        config = DecodeConfig(16, programs, num_warps=1, num_stages=3, ahead=num_seqs > 64)
    elif long:
        # Two buffers, where few query heads share what is read, and the values that are unpacked.
        fits = 64 * (2 * 2 * row_bytes(head_dim) + 2 * head_dim) + 8192 <= limit
        stages = 3 if fits and num_heads <= 2 * num_kv_heads else 2
        config = DecodeConfig(64, num_sms // num_kv_heads, num_warps=4, num_stages=stages)
    else:
        config = DecodeConfig(32, num_sms // num_kv_heads, num_warps=1, num_stages=2)
    return config._replace(tile=min(config.tile, block_size), num_programs=max(1, config.num_programs))


def fit_config(config: DecodeConfig, head_dim: int, group: int, itemsize: int, limit: int) -> DecodeConfig:
    """``config`` made smaller where it takes more than ``limit`` bytes of shared memory (wide heads in float32, small
    devices). group: query heads a kv head. itemsize: bytes of an element."""
    row = next_power_of_2(head_dim) * itemsize

    def taken() -> int:  # keys and values in flight, and what the queries of a group are multiplied through
        return (2 * (config.num_stages - 1) * config.tile + 8 + max(16, next_power_of_2(group))) * row + 2048

    while taken() > limit:
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.tile > 16:
            config = config._replace(tile=config.tile // 2)
        else:
            break
    return config


@dataclass(frozen=True)
class DecodeScratch:
    """Device memory that decode calls on one stream share: partial results and counters (zero between calls)."""

    partial: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def allocate(max_seqs: int, num_heads: int, head_dim: int, device: torch.device) -> DecodeScratch:
        """Room for any plan of up to max_seqs sequences and num_heads (rank-local) query heads."""
        rows = 2 * max(4 * num_multiprocessors(device), 8) * num_heads
        return DecodeScratch(
            partial=torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            stats=torch.empty(rows * 2, dtype=torch.float32, device=device),
            counters=torch.zeros(max_seqs * num_heads, dtype=torch.int32, device=device),
        )


class DecodePlan:
    """How the work of one batch is divided. Build one per (captured) batch size; `update` it once a step.

    num_heads, num_kv_heads: this rank's. window: sliding window in tokens (None: full attention); layers that
    differ in window need a plan each. softcap: a scaled score s becomes softcap * tanh(s / softcap). long: see
    `decode_config`. config: overrides the tuned choice. itemsize: bytes of an element of the cache. packed: the cache
    is packed or in FP8. prefix: room for what a prefix gives that all sequences share, in layers without window and
    sinks.
    """

    def __init__(
        self,
        num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        scratch: DecodeScratch,
        *,
        window: int | None = None,
        softcap: float | None = None,
        long: bool = False,
        config: DecodeConfig | None = None,
        itemsize: int = 2,
        packed: bool = False,
        prefix: SharedPrefix | None = None,
    ) -> None:
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
        device = scratch.partial.device
        sms, wide = num_multiprocessors(device), head_dim == 128 and block_size >= 128
        if packed:
            self.config = config or packed_decode_config(
                num_seqs, num_heads, num_kv_heads, head_dim, block_size, sms, shared_memory(device), long=long
            )
        else:
            tuned = config or decode_config(num_seqs, num_heads, num_kv_heads, sms, long=long, wide=wide)
            limit = shared_memory(device)
            self.config = fit_config(tuned, head_dim, num_heads // num_kv_heads, itemsize, limit)
        if self.config.num_programs * 2 * num_heads * head_dim > scratch.partial.numel():
            raise ValueError(f"{self.config.num_programs} programs need more scratch than was allocated")
        self.num_seqs = num_seqs
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.window = window or 0
        self.softcap = softcap
        self.prefix = prefix
        self.scratch = scratch
        self.cu_tiles = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device)
        self.first_seq, self.ahead_seq = torch.zeros(2, self.config.num_programs, dtype=torch.int32, device=device)
        # Partials combined at a time: as many as fill about 32 float32 registers a thread.
        elements = 32 * 32 * self.config.num_warps
        row_elements = next_power_of_2(self.group) * next_power_of_2(head_dim)
        self.block_parts = max(2, min(32, elements // row_elements))
        self.constants: dict[str, Any] = {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "TILE": self.config.tile,
            "WINDOW": self.window,
            "SOFTCAP": softcap or 0.0,
            "SHARED": prefix is not None,
            "AHEAD": self.config.ahead,
            "BLOCK_GROUP": next_power_of_2(self.group),
            "BLOCK_PARTS": self.block_parts,
            "STAGES": self.config.num_stages,
            "num_warps": self.config.num_warps,
        }

    def update(self, seq_lens_S: torch.Tensor, shared_1: torch.Tensor | None = None) -> None:
        """Divide the work anew for seq_lens_S, int32 [S], and a shared prefix of so many tokens, int32 [1]; one launch,
        before the step's first layer."""
        programs = self.config.num_programs
        plan_kernel[(triton.cdiv(programs, 16),)](
            seq_lens_S,
            seq_lens_S if shared_1 is None else shared_1,
            self.cu_tiles if self.prefix is None else self.prefix.tokens,
            self.cu_tiles,
            self.first_seq,
            self.ahead_seq,
            self.num_seqs,
            programs,
            self.config.min_tiles,
            TILE=self.config.tile,
            WINDOW=self.window,
            SHARED=self.prefix is not None,
            BLOCK_SEQS=next_power_of_2(self.num_seqs),
            BLOCK_PROGRAMS=16,
            num_warps=4,
        )


def paged_decode(
    q_SND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens_S: torch.Tensor,
    plan: DecodePlan,
    *,
    factors: torch.Tensor | None = None,
    scale: float | None = None,
    sinks_N: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one query token per sequence over its cached context, the token itself included.

    q_SND: [S, N, D], heads contiguous. k_cache, v_cache: [num_blocks, B, K, D] contiguous, q's dtype, B a
    power of two; or, with exponents for factors, packed (`packed_kv`), or, with scales, in FP8 (`fp8_kv`), and so the
    plan. block_tables: int32 [S, max_blocks], rows any stride. seq_lens_S: int32 [S], tokens in the cache; 0 marks a
    row without work: its output is undefined, and not touched if no row with work follows. plan: updated with these
    seq_lens; with pdl, at least two kernels before this one.
    scale: softmax scale (default D ** -0.5). sinks_N: [N], scores that join the softmax of each head, with no value of
    their own. Returns [S, N, D] in q's dtype.
    """
    num_seqs, _, head_dim = q_SND.shape
    config = plan.config
    pdl = pdl and config.early
    out_SND = torch.empty_like(q_SND, memory_format=torch.contiguous_format) if out is None else out
    if plan.prefix is not None:
        attend_to_prefix(q_SND, k_cache, v_cache, factors, block_tables, plan.prefix, scale, plan.softcap, pdl=pdl)
    grid = (config.num_programs * plan.num_kv_heads,)
    args = (
        block_tables,
        seq_lens_S,
        plan.cu_tiles,
        plan.first_seq,
        plan.ahead_seq,
        plan.scratch.partial,
        plan.scratch.stats,
        plan.scratch.counters,
        out_SND,
        q_SND if sinks_N is None else sinks_N,
        *((q_SND,) * 3 if plan.prefix is None else plan.prefix),
        (head_dim**-0.5 if scale is None else scale) * LOG2E.value,
        num_seqs,
        config.num_programs,
        config.min_tiles,
        block_tables.stride(0),
        q_SND.stride(0),
        out_SND.stride(0),
    )
    flags = plan.constants | {"SINKS": sinks_N is not None, "PDL": pdl, **launch_options(pdl)}
    if factors is not None:
        flags |= {"BLOCK_M": max(8, flags["BLOCK_GROUP"]), "FP8": is_fp8(factors)}
        packed_decode_kernel[grid](q_SND, k_cache, v_cache, as_words(factors), *args, **flags)
    else:
        block_dim = next_power_of_2(head_dim)
        decode_kernel[grid](
            q_SND, k_cache, v_cache, *args, BLOCK_DIM=block_dim, BLOCK_M=max(16, flags["BLOCK_GROUP"]), **flags
        )
    return out_SND


def paged_decode_reference(
    q_SND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens_S: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_decode` in plain torch, one sequence at a time, computed in float32 (float64 for float64)."""
    num_heads, head_dim = q_SND.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    wide = torch.promote_types(q_SND.dtype, torch.float32)
    out_SND = torch.zeros_like(q_SND)
    for s, length in enumerate(seq_lens_S.tolist()):
        if length == 0:
            continue
        start = max(length - window, 0) if window else 0
        blocks = block_tables[s, : -(-length // block_size)].long()
        k, v = (
            cache[blocks]
            .reshape(-1, num_kv_heads, head_dim)[start:length]
            .to(wide)
            .repeat_interleave(num_heads // num_kv_heads, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("nd,tnd->nt", q_SND[s].to(wide), k) * (head_dim**-0.5 if scale is None else scale)
        scores = softcap_reference(scores, softcap)
        out_SND[s] = torch.einsum("nt,tnd->nd", softmax_reference(scores, sinks_N), v).to(q_SND.dtype)
    return out_SND
