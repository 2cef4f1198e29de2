"""Causal attention of new tokens over a paged KV cache on Hopper, in Gluon: products run while a softmax is computed.

A piece of a program's work are 128 queries of a head, 64 for each of two groups of four warps. One more warp asks for
queries, and for tiles of keys and values through a ring of buffers, ahead of them, also of the next piece.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tpctl.kernels.attention.hopper_prefill_tiles import ROWS, fold, seen_by
from tpctl.kernels.common.launch import ANYWHERE

BLOCK_M = gl.constexpr(2 * ROWS.value)
"""Queries of a piece of work."""


@gluon.jit
def _place(work, num_heads, query_start_ptr, seq_lens_ptr, num_seqs):
    """A piece of work's sequence and head, its first query's row, place among the new ones and position, new queries
    of the sequence, its length, and how many tokens of keys are seen, none where there is nothing to do."""
    head = work % num_heads
    slot = work // num_heads
    # The slots of a sequence, and which of its queries come first, are as in `paged_prefill`.
    low = slot * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(query_start_ptr + middle) // BLOCK_M + middle <= slot:
            low = middle
        else:
            high = middle
    q_start = gl.load(query_start_ptr + low)
    q_len = gl.load(query_start_ptr + low + 1) - q_start
    length = gl.load(seq_lens_ptr + low)
    index = slot - (q_start // BLOCK_M + low)
    some = (index >= 0) & (index * BLOCK_M < q_len)
    m = (gl.cdiv(q_len, BLOCK_M) - 1 - index) * BLOCK_M
    seen = gl.where(some, gl.minimum(length - q_len + m + BLOCK_M, length), 0)
    return low, head, q_start, m, q_len, length, seen


@gluon.jit
def _work(round, num_works):
    """What a program does in some round, nothing being -1. Every other round they take it in the opposite order, since
    of a sequence pieces that come earlier are larger."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    work = round * programs + gl.where(round % 2 == 0, program, programs - 1 - program)
    return gl.where(work < num_works, work, -1)


@gluon.jit
def _fill(
    q_desc,
    k_desc,
    v_desc,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    num_seqs,
    num_heads,
    num_works,
    table_stride,
    group,
    block_size,
    q_smem,
    k_smem,
    v_smem,
    q_ready,
    k_ready,
    v_ready,
    q_empty,
    k_empty,
    v_empty,
):
    """Ask for the queries and the tiles of keys and values of all of a program's work, as buffers become empty."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[2]
    done = 0
    tiles = 0
    for round in range(gl.cdiv(num_works, gl.num_programs(0))):
        work = _work(round, num_works)
        if work >= 0:
            seq, head, q_start, m, _q_len, _length, seen = _place(
                work, num_heads, query_start_ptr, seq_lens_ptr, num_seqs
            )
            if seen > 0:
                table = block_tables_ptr + seq.to(gl.int64) * table_stride
                column = head // group * DIM
                end = gl.cdiv(seen, TILE)
                block = gl.load(table)
                for tile in range(end):
                    stage = tiles % STAGES
                    phase = (tiles // STAGES) & 1
                    row = block * block_size + tile * TILE % block_size
                    block = gl.load(table + gl.minimum(tile + 1, end - 1) * TILE // block_size)  # of the next tile
                    mbarrier.wait(k_empty.index(stage), phase ^ 1)
                    mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_desc, [row, column], k_ready.index(stage), k_smem.index(stage))
                    if tile == 0:
                        for half in gl.static_range(2):
                            mbarrier.wait(q_empty.index(half), done & 1 ^ 1)
                            mbarrier.expect(q_ready.index(half), q_desc.block_type.nbytes)
                            tma.async_copy_global_to_shared(
                                q_desc, [q_start + m + half * ROWS, head * DIM], q_ready.index(half), q_smem.index(half)
                            )
                    mbarrier.wait(v_empty.index(stage), phase ^ 1)
                    mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(v_desc, [row, column], v_ready.index(stage), v_smem.index(stage))
                    tiles += 1
                done += 1


@gluon.jit
def _attend(
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    scale_log2e,
    num_seqs,
    num_heads,
    num_works,
    out_stride,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    q_ready,
    k_ready,
    v_ready,
    q_empty,
    k_empty,
    v_empty,
    HALF: gl.constexpr,
):
    """One half of the queries of all of a program's work."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    q = q_smem.index(HALF)
    done = 0
    tiles = 0
    for round in range(gl.cdiv(num_works, gl.num_programs(0))):
        work = _work(round, num_works)
        if work >= 0:
            _seq, head, q_start, m, q_len, length, seen = _place(
                work, num_heads, query_start_ptr, seq_lens_ptr, num_seqs
            )
            if seen > 0:
                end = gl.cdiv(seen, TILE)
                first_position = length - q_len + m + HALF * ROWS
                position = first_position + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))

                stage = tiles % STAGES
                mbarrier.wait(q_ready.index(HALF), done & 1)
                mbarrier.wait(k_ready.index(stage), (tiles // STAGES) & 1)
                score = warpgroup_mma(
                    q,
                    k_smem.index(stage).permute((1, 0)),
                    gl.zeros([ROWS, TILE], gl.float32, SCORES),
                    use_acc=False,
                    is_async=True,
                )
                score = warpgroup_mma_wait(0, deps=[score])
                mbarrier.arrive(k_empty.index(stage))
                score = seen_by(score, 0, position, TILE, SCORES)
                top = gl.max(score, 1) * scale_log2e
                p = gl.exp2(score * scale_log2e - top[:, None])
                total = gl.sum(p, 1)
                fade = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, SCORES))
                acc = gl.zeros([ROWS, DIM], gl.float32, SUMS)

                mbarrier.wait(k_ready.index((tiles + 1) % STAGES), ((tiles + 1) // STAGES) & 1, pred=end > 1)
                full_end = gl.minimum(gl.maximum((first_position + 1) // TILE, 1), end)
                acc, p, top, total, fade = fold(
                    1, full_end, end, tiles, acc, p, top, total, fade, position, scale_log2e, q, k_smem, v_smem,
                    k_ready, v_ready, k_empty, v_empty, False, SCORES, SUMS)  # fmt: skip
                acc, p, top, total, fade = fold(
                    full_end, end, end, tiles, acc, p, top, total, fade, position, scale_log2e, q, k_smem, v_smem,
                    k_ready, v_ready, k_empty, v_empty, True, SCORES, SUMS)  # fmt: skip
                mbarrier.arrive(q_empty.index(HALF))

                tiles += end
                stage = (tiles - 1) % STAGES
                values = v_smem.index(stage)
                mbarrier.wait(v_ready.index(stage), ((tiles - 1) // STAGES) & 1)
                if end * TILE > length:  # what is behind the end may be anything, of which 0 times is no number
                    token = (end - 1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, BLOCKED))
                    tail = values.load(BLOCKED)
                    values.store(gl.where((token < length)[:, None], tail, 0.0))
                    fence_async_shared()
                acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
                operand = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, SUMS, 2))
                acc = warpgroup_mma(operand, values, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(stage))

                result = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
                out_smem.index(HALF).store(result.to(out_smem.dtype))
                row = m + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BLOCKED))
                d = head * DIM + gl.arange(0, DIM, layout=gl.SliceLayout(0, BLOCKED))
                offsets = (q_start + row).to(gl.int64)[:, None] * out_stride + d[None, :]
                gl.store(out_ptr + offsets, out_smem.index(HALF).load(BLOCKED), mask=(row < q_len)[:, None])
                done += 1


@gluon.jit(
    do_not_specialize=["num_seqs", "num_heads", "num_works", "table_stride", "group", "block_size"],
    do_not_specialize_on_alignment=ANYWHERE,
)
def hopper_prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    scale_log2e,
    num_seqs,
    num_heads,
    num_works,
    table_stride,
    out_stride,
    group,
    block_size,
    STAGES: gl.constexpr,
):
    TILE: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, DIM], v_desc.layout)
    out_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, DIM], q_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_ready.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (query_start_ptr, seq_lens_ptr, out_ptr, scale_log2e, num_seqs, num_heads, num_works, out_stride,
                       q_smem, k_smem, v_smem, out_smem, q_ready, k_ready, v_ready, q_empty, k_empty, v_empty,
                       gl.constexpr(0))),
            (_attend, (query_start_ptr, seq_lens_ptr, out_ptr, scale_log2e, num_seqs, num_heads, num_works, out_stride,
                       q_smem, k_smem, v_smem, out_smem, q_ready, k_ready, v_ready, q_empty, k_empty, v_empty,
                       gl.constexpr(1))),
            (_fill, (q_desc, k_desc, v_desc, block_tables_ptr, query_start_ptr, seq_lens_ptr, num_seqs, num_heads,
                     num_works, table_stride, group, block_size, q_smem, k_smem, v_smem, q_ready, k_ready, v_ready,
                     q_empty, k_empty, v_empty)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
