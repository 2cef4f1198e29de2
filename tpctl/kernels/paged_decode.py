"""Decode attention over a paged KV cache: one new token per sequence, grouped-query heads, split over the context.

The work is laid out on the device. A sequence's context is cut into tiles; the tiles of all sequences form
one line, and every program takes an equal run of it, so programs read equally much whatever the lengths:

    tiles      | s0 s0 s0 s0 s0 s0 s0 | s1 | s2 s2 s2 s2 s2 s2 |
    programs   | p0    p0    p0  | p1    p1   p1  | p2 ...     |

A run that covers a whole sequence writes its output. Otherwise it leaves a partial result in one of its
program's two slots (0: the run's first sequence, 1: its last), and the program that finishes a sequence last
combines its partials, in order, so results do not depend on timing. The line (`DecodePlan.update`) is
computed once a step and serves all layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.launch import launch_options, next_power_of_2, num_multiprocessors

_LOG2E = 1.4426950408889634
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly
_MAX_PDL_SEQS = 16
LONG_CONTEXT = 8192
"""Tokens from which one or two sequences are decoded by a configuration of its own."""


class DecodeConfig(NamedTuple):
    """How decode is cut: tokens per tile, programs per kv head, the least tiles a program takes, launch parameters."""

    tile: int
    num_programs: int
    num_warps: int
    num_stages: int
    min_tiles: int = 1


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles"])
def _plan_kernel(
    seq_lens_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    num_seqs,
    num_programs,
    min_tiles,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    seq = tl.arange(0, BLOCK_SEQS)
    length = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    tiles = tl.cdiv(length, TILE)
    if WINDOW > 0:
        tiles -= tl.maximum(length - WINDOW, 0) // TILE
    # An empty (padded) sequence has one tile, fully masked: somebody must write its zeros.
    tiles = tl.where(seq < num_seqs, tl.maximum(tiles, 1), 0)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(cu_tiles_ptr + seq, ends - tiles, mask=seq < num_seqs)
        tl.store(cu_tiles_ptr + num_seqs, total)
    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    start = program * tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    first = tl.sum((ends[None, :] <= start[:, None]).to(tl.int32), 1)
    tl.store(first_seq_ptr + program, tl.minimum(first, num_seqs - 1), mask=program < num_programs)


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "min_tiles", "table_stride"])
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    cu_tiles_ptr,
    first_seq_ptr,
    partial_ptr,
    stats_ptr,
    counters_ptr,
    out_ptr,
    scale_log2e,
    num_seqs,
    num_programs,
    min_tiles,
    table_stride,
    q_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    m = tl.arange(0, BLOCK_M)  # the group's query heads, padded to what a dot needs
    d = tl.arange(0, BLOCK_DIM)
    col = tl.arange(0, TILE)
    in_dim = d < HEAD_DIM
    q_mask = (m < GROUP)[:, None] & in_dim[None, :]
    head_offsets = (kv_head * GROUP + m)[:, None] * HEAD_DIM + d[None, :]
    tile_offsets = (col * (NUM_KV_HEADS * HEAD_DIM))[:, None] + d[None, :]

    total = tl.load(cu_tiles_ptr + num_seqs)
    seq = tl.load(first_seq_ptr + program)
    share = tl.maximum(tl.cdiv(total, num_programs), min_tiles)
    run_start = program * share
    run_end = tl.minimum(run_start + share, total)
    seq_start = tl.load(cu_tiles_ptr + seq)
    seq_end = tl.load(cu_tiles_ptr + seq + 1)
    length = tl.load(seq_lens_ptr + seq)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if run_start < run_end:
            _prefetch(k_cache_ptr, v_cache_ptr, block_tables_ptr + seq.to(tl.int64) * table_stride, length, kv_head,
                      run_start - seq_start, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    tile = run_start
    while tile < run_end:
        q = tl.load(q_ptr + seq.to(tl.int64) * q_stride + head_offsets, mask=q_mask, other=0.0)
        table = block_tables_ptr + seq.to(tl.int64) * table_stride
        window_start = 0
        if WINDOW > 0:
            window_start = tl.maximum(length - WINDOW, 0)
        first_token = (window_start // TILE + tile - seq_start) * TILE
        last = tl.minimum(run_end, seq_end)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        if BLOCK_SIZE >= TILE:
            block = _block_of(table, first_token, length, BLOCK_SIZE)
        for i in tl.range(0, last - tile, num_stages=STAGES):
            token0 = first_token + i * TILE
            token = token0 + col
            live = token < length
            if BLOCK_SIZE >= TILE:
                base = ((block * BLOCK_SIZE + token0 % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
                offsets = base + tile_offsets
                # The next tile's block, so that its loads can be asked for before this tile's are used.
                block = _block_of(table, token0 + TILE, length, BLOCK_SIZE)
            else:
                block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
                slot = block * BLOCK_SIZE + token % BLOCK_SIZE
                offsets = ((slot * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
            if BLOCK_DIM == HEAD_DIM:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None], other=0.0)
            else:
                k = tl.load(k_cache_ptr + offsets, mask=live[:, None] & in_dim[None, :], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
            ok = live
            if WINDOW > 0:
                ok &= token >= window_start
            score = tl.where(ok[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(score - safe_top[:, None])
            fade = tl.exp2(top - safe_top)
            weight = weight * fade + tl.sum(p, 1)
            top = new_top
            if BLOCK_DIM == HEAD_DIM:
                v = tl.load(v_cache_ptr + offsets, mask=live[:, None], other=0.0)
            else:
                v = tl.load(v_cache_ptr + offsets, mask=live[:, None] & in_dim[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

        out_row = out_ptr + seq.to(tl.int64) * out_stride
        if (tile == seq_start) & (last == seq_end):
            result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
            tl.store(out_row + head_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            slot = program * 2 + (tile != run_start).to(tl.int32)
            slot_row = (slot * NUM_KV_HEADS + kv_head) * GROUP + m
            tl.store(partial_ptr + slot_row[:, None] * HEAD_DIM + d[None, :], acc, mask=q_mask)
            tl.store(stats_ptr + slot_row * 2, top, mask=m < GROUP)
            tl.store(stats_ptr + slot_row * 2 + 1, weight, mask=m < GROUP)
            first_part = seq_start // share
            num_parts = (seq_end - 1) // share - first_part + 1
            tl.debug_barrier()
            counter = counters_ptr + seq * NUM_KV_HEADS + kv_head
            done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if done == num_parts - 1:
                tl.store(counter, 0)
                first_slot = (seq_start != first_part * share).to(tl.int32)
                _combine(partial_ptr, stats_ptr, out_row, kv_head, first_part, num_parts, first_slot, NUM_KV_HEADS,
                         GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_GROUP, BLOCK_PARTS)  # fmt: skip
        tile = last
        seq += 1
        more = seq < num_seqs
        seq_start = last
        seq_end = tl.load(cu_tiles_ptr + seq + 1, mask=more, other=0)
        length = tl.load(seq_lens_ptr + seq, mask=more, other=0)


@triton.jit
def _block_of(table, token, length, BLOCK_SIZE: tl.constexpr):
    """The KV block that holds `token`, or the sequence's last one.

    Not a `tl.load`: that would become part of the loop's pipeline, and the keys and values, whose addresses wait for
    it, could then not be asked for ahead of their use.
    """
    entry = table + tl.maximum(tl.minimum(token, length - 1), 0) // BLOCK_SIZE
    if _INTERPRETED:
        block = tl.load(entry)
    else:
        block = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [entry], dtype=tl.int32, is_pure=True, pack=1
        )
    return block.to(tl.int64)


@triton.jit
def _prefetch(
    k_cache_ptr,
    v_cache_ptr,
    table,
    length,
    kv_head,
    tile,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Ask the L2 cache for a tile while the predecessor still runs; where it writes, the L2 cache stays coherent."""
    LINE: tl.constexpr = 128 // k_cache_ptr.dtype.element_ty.itemsize
    LINES: tl.constexpr = HEAD_DIM // LINE if HEAD_DIM >= LINE else 1
    first_token = tile * TILE
    if WINDOW > 0:
        first_token += tl.maximum(length - WINDOW, 0) // TILE * TILE
    token = first_token + tl.arange(0, TILE)
    live = token < length
    block = tl.load(table + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    row = ((block * BLOCK_SIZE + token % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    for line in tl.static_range(LINES):
        for cache in tl.static_range(2):
            pointer = (v_cache_ptr if cache else k_cache_ptr) + row + line * LINE
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    out_row,
    kv_head,
    first_part,
    num_parts,
    first_slot,  # the slot that the first part's program used; all others used slot 0
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    part = tl.arange(0, BLOCK_PARTS)
    row = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    top = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        index = start + part
        slot = (first_part + index) * 2 + tl.where(index == 0, first_slot, 0)
        slot_row = ((slot * NUM_KV_HEADS + kv_head) * GROUP)[:, None] + row[None, :]
        live = (index < num_parts)[:, None] & (row < GROUP)[None, :]
        parts = tl.load(
            partial_ptr + slot_row[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=live[:, :, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        tops = tl.load(stats_ptr + slot_row * 2, mask=live, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(stats_ptr + slot_row * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        factors = tl.exp2(tops - safe_top[None, :])
        fade = tl.exp2(top - safe_top)
        weight = weight * fade + tl.sum(weights * factors, 0)
        acc = acc * fade[:, None] + tl.sum(parts * factors[:, :, None], 0)
        top = new_top
    result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    out_ptrs = out_row + (kv_head * GROUP + row)[:, None] * HEAD_DIM + d[None, :]
    mask = (row < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, result.to(out_row.dtype.element_ty), mask=mask)


def decode_config(num_seqs: int, num_kv_heads: int, num_sms: int, *, long: bool = False) -> DecodeConfig:
    """The tuned configuration for a batch shape (docs/kernel-notes.md has the sweep).

    long: the longest context has `LONG_CONTEXT` tokens or more.
    """
    # Few programs with little shared memory let the next kernel's start early, which counts where a step is short;
    # one buffer per tile then does, until a context is so long that its reading outweighs the rest.
    per_sm = 1 if num_seqs <= 16 else 2
    stages = 2 if num_seqs <= 2 and not long else 3
    return DecodeConfig(64, max(1, num_sms * per_sm // num_kv_heads), num_warps=4, num_stages=stages)


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
    differ in window need a plan each. long: see `decode_config`. config: overrides the tuned choice.
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
        long: bool = False,
        config: DecodeConfig | None = None,
    ) -> None:
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
        device = scratch.partial.device
        self.config = config or decode_config(num_seqs, num_kv_heads, num_multiprocessors(device), long=long)
        if self.config.num_programs * 2 * num_heads * head_dim > scratch.partial.numel():
            raise ValueError(f"{self.config.num_programs} programs need more scratch than was allocated")
        self.num_seqs = num_seqs
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.window = window or 0
        self.scratch = scratch
        self.cu_tiles = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device)
        self.first_seq = torch.zeros(self.config.num_programs, dtype=torch.int32, device=device)
        # Partials combined at a time: as many as fill about 32 float32 registers a thread.
        elements = 32 * 32 * self.config.num_warps
        row_elements = next_power_of_2(self.group) * next_power_of_2(head_dim)
        self.block_parts = max(2, min(32, elements // row_elements))

    def update(self, seq_lens_S: torch.Tensor) -> None:
        """Divide the work anew for seq_lens_S, int32 [S]; one launch, before the step's first layer."""
        programs = self.config.num_programs
        _plan_kernel[(triton.cdiv(programs, 16),)](
            seq_lens_S,
            self.cu_tiles,
            self.first_seq,
            self.num_seqs,
            programs,
            self.config.min_tiles,
            TILE=self.config.tile,
            WINDOW=self.window,
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
    scale: float | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one query token per sequence over its cached context, the token itself included.

    q_SND: [S, N, D], heads contiguous. k_cache, v_cache: [num_blocks, B, K, D] contiguous, q's dtype, B a
    power of two. block_tables: int32 [S, max_blocks], rows any stride. seq_lens_S: int32 [S], tokens in the
    cache; 0 gives zeros. plan: updated with these seq_lens; with pdl, at least two kernels before this one.
    scale: softmax scale (default D ** -0.5). Returns [S, N, D] in q's dtype.
    """
    num_seqs, _, head_dim = q_SND.shape
    config = plan.config
    # Programs placed while a predecessor still fills some multiprocessors would pile up on the others, and a
    # big batch's equal shares need them spread evenly.
    pdl = pdl and num_seqs <= _MAX_PDL_SEQS
    out_SND = torch.empty_like(q_SND, memory_format=torch.contiguous_format) if out is None else out
    _decode_kernel[(config.num_programs * plan.num_kv_heads,)](
        q_SND,
        k_cache,
        v_cache,
        block_tables,
        seq_lens_S,
        plan.cu_tiles,
        plan.first_seq,
        plan.scratch.partial,
        plan.scratch.stats,
        plan.scratch.counters,
        out_SND,
        (head_dim**-0.5 if scale is None else scale) * _LOG2E,
        num_seqs,
        config.num_programs,
        config.min_tiles,
        block_tables.stride(0),
        q_SND.stride(0),
        out_SND.stride(0),
        NUM_KV_HEADS=plan.num_kv_heads,
        GROUP=plan.group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=next_power_of_2(head_dim),
        BLOCK_SIZE=plan.block_size,
        TILE=config.tile,
        WINDOW=plan.window,
        BLOCK_M=max(16, next_power_of_2(plan.group)),
        BLOCK_GROUP=next_power_of_2(plan.group),
        BLOCK_PARTS=plan.block_parts,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
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
        out_SND[s] = torch.einsum("nt,tnd->nd", scores.softmax(-1), v).to(q_SND.dtype)
    return out_SND
