"""Causal attention of new tokens over a paged KV cache on Hopper, in Gluon: products run while a softmax is computed.

There is a program a multiprocessor. A piece of its work are 128 queries of a head, 64 for each of two groups of four
warps. One more warp takes a piece after the other from a counter, tells the groups, and asks for queries, and for tiles
of keys and values through a ring of buffers, ahead of them. A group issues the next tile's scores and the product of
this tile's weights and values, and computes the next tile's softmax as soon as its scores are there, while the other
product still runs.
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

from tpctl.kernels.common.launch import ANYWHERE

ROWS = gl.constexpr(64)
"""Queries of a group of four warps."""
BLOCK_M = gl.constexpr(2 * ROWS.value)
"""Queries of a piece of work."""
FIELDS = gl.constexpr(8)
"""Numbers that the groups are told of a piece of work: its tiles, none where there is no more; its first query's
position; tokens of the sequence; its first query's row; how many there are from there on; its first column; nothing."""


@gluon.jit
def _fill(
    q_desc,
    k_desc,
    v_desc,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    counter_ptr,
    num_seqs,
    num_heads,
    num_works,
    table_stride,
    group,
    block_size,
    work_smem,
    q_smem,
    k_smem,
    v_smem,
    work_ready,
    q_ready,
    k_ready,
    v_ready,
    work_empty,
    q_empty,
    k_empty,
    v_empty,
):
    """Take work, tell the groups, and ask for the queries and the tiles of keys and values of it, as buffers become
    empty."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[2]
    field = gl.arange(0, FIELDS, layout=gl.BlockedLayout([FIELDS], [32], [1], [0]))
    work = gl.program_id(0)
    works = 0
    tiles = 0
    while work < num_works:
        next_work = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
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
        index = slot - (q_start // BLOCK_M + low)
        if (index >= 0) & (index * BLOCK_M < q_len):
            m = (gl.cdiv(q_len, BLOCK_M) - 1 - index) * BLOCK_M
            length = gl.load(seq_lens_ptr + low)
            position = length - q_len + m
            end = gl.cdiv(gl.minimum(position + BLOCK_M, length), TILE)
            mbarrier.wait(work_empty.index(works % 2), works // 2 & 1 ^ 1)
            told = gl.where(field == 0, end, gl.where(field == 1, position, gl.where(field == 2, length, 0)))
            told = gl.where(field == 3, q_start + m, gl.where(field == 4, q_len - m, told))
            told = gl.where(field == 5, head * DIM, told)
            work_smem.index(works % 2).store(told)
            mbarrier.arrive(work_ready.index(works % 2))

            table = block_tables_ptr + low.to(gl.int64) * table_stride
            column = head // group * DIM
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
                        mbarrier.wait(q_empty.index(half), works & 1 ^ 1)
                        mbarrier.expect(q_ready.index(half), q_desc.block_type.nbytes)
                        tma.async_copy_global_to_shared(
                            q_desc, [q_start + m + half * ROWS, head * DIM], q_ready.index(half), q_smem.index(half)
                        )
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(v_desc, [row, column], v_ready.index(stage), v_smem.index(stage))
                tiles += 1
            works += 1
        work = next_work
    mbarrier.wait(work_empty.index(works % 2), works // 2 & 1 ^ 1)
    work_smem.index(works % 2).store(field * 0)
    mbarrier.arrive(work_ready.index(works % 2))


@gluon.jit
def _told(works, work_smem, number: gl.constexpr):
    """One of the numbers of a piece of work."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    field = gl.arange(0, FIELDS, layout=LAYOUT)
    return gl.sum(gl.where(field == number, work_smem.index(works % 2).load(LAYOUT), 0), 0)


@gluon.jit
def _weights(score, top, total, scale_log2e):
    """The running softmax of one more tile: its weights, and by what older sums are to be multiplied."""
    new_top = gl.maximum(top, gl.max(score, 1) * scale_log2e)
    p = gl.exp2(score * scale_log2e - new_top[:, None])
    fade = gl.exp2(top - new_top)
    return p, new_top, total * fade + gl.sum(p, 1), fade


@gluon.jit
def _seen(score, tile, position, TILE: gl.constexpr, SCORES: gl.constexpr):
    token = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    return gl.where(token[None, :] <= position[:, None], score, float("-inf"))


@gluon.jit
def _here(x):
    """x, which the assembler takes for known from here on only: a shuffle that moves nothing. Else it would compute
    what depends on x before the products that have been issued."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _fold(
    first,
    last,
    end,
    tiles,
    acc,
    p,
    top,
    total,
    fade,
    position,
    scale_log2e,
    q,
    k_smem,
    v_smem,
    k_ready,
    v_ready,
    k_empty,
    v_empty,
    MASKED: gl.constexpr,
    LATE: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Tiles [first, last): the scores of each, beside the product of the weights of the one before, p, and values."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    for tile in range(first, last):
        count = tiles + tile
        stage = count % STAGES
        before = (count - 1) % STAGES
        score = warpgroup_mma(
            q,
            k_smem.index(stage).permute((1, 0)),
            gl.zeros([ROWS, TILE], gl.float32, SCORES),
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(v_ready.index(before), ((count - 1) // STAGES) & 1)
        if LATE:
            fade = _here(fade)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
        operand = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, SUMS, 2))
        acc = warpgroup_mma(operand, v_smem.index(before), acc, is_async=True)
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            score = _seen(score, tile, position, TILE, SCORES)
        p, top, total, fade = _weights(score, top, total, scale_log2e)
        # Here, and not before the next scores: it ends a basic block, so that the assembler computes the weights before
        # it waits for the sums.
        after = count + 1
        mbarrier.wait(k_ready.index(after % STAGES), (after // STAGES) & 1, pred=tile + 1 < end)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before))
    return acc, p, top, total, fade


@gluon.jit
def _attend(
    out_ptr,
    scale_log2e,
    out_stride,
    work_smem,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    work_ready,
    q_ready,
    k_ready,
    v_ready,
    work_empty,
    q_empty,
    k_empty,
    v_empty,
    HALF: gl.constexpr,
    LATE: gl.constexpr,
):
    """One half of the queries of all of a program's work."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    q = q_smem.index(HALF)
    works = 0
    tiles = 0
    mbarrier.wait(work_ready.index(0), 0)
    end = _told(works, work_smem, 0)
    while end > 0:
        first_position = _told(works, work_smem, 1) + HALF * ROWS
        position = first_position + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))

        stage = tiles % STAGES
        mbarrier.wait(q_ready.index(HALF), works & 1)
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
        score = _seen(score, 0, position, TILE, SCORES)
        top = gl.max(score, 1) * scale_log2e
        p = gl.exp2(score * scale_log2e - top[:, None])
        total = gl.sum(p, 1)
        fade = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, DIM], gl.float32, SUMS)

        mbarrier.wait(k_ready.index((tiles + 1) % STAGES), ((tiles + 1) // STAGES) & 1, pred=end > 1)
        full_end = gl.minimum(gl.maximum((first_position + 1) // TILE, 1), end)
        acc, p, top, total, fade = _fold(1, full_end, end, tiles, acc, p, top, total, fade, position, scale_log2e, q,
                                         k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, False, LATE, SCORES,
                                         SUMS)  # fmt: skip
        acc, p, top, total, fade = _fold(full_end, end, end, tiles, acc, p, top, total, fade, position, scale_log2e, q,
                                         k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, True, LATE, SCORES,
                                         SUMS)  # fmt: skip
        mbarrier.arrive(q_empty.index(HALF))

        tiles += end
        stage = (tiles - 1) % STAGES
        values = v_smem.index(stage)
        mbarrier.wait(v_ready.index(stage), ((tiles - 1) // STAGES) & 1)
        length = _told(works, work_smem, 2)
        if end * TILE > length:  # what is behind the end may be anything, of which 0 times is no number
            token = (end - 1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, BLOCKED))
            values.store(gl.where((token < length)[:, None], values.load(BLOCKED), 0.0))
            fence_async_shared()
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
        operand = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, SUMS, 2))
        acc = warpgroup_mma(operand, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage))

        result = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
        out_smem.index(HALF).store(result.to(out_smem.dtype))
        row = _told(works, work_smem, 3)
        rows = _told(works, work_smem, 4)
        column = _told(works, work_smem, 5)
        mbarrier.arrive(work_empty.index(works % 2))
        m = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BLOCKED))
        d = column + gl.arange(0, DIM, layout=gl.SliceLayout(0, BLOCKED))
        offsets = (row + m).to(gl.int64)[:, None] * out_stride + d[None, :]
        gl.store(out_ptr + offsets, out_smem.index(HALF).load(BLOCKED), mask=(m < rows)[:, None])
        works += 1
        mbarrier.wait(work_ready.index(works % 2), works // 2 & 1)
        end = _told(works, work_smem, 0)


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
    counter_ptr,
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
    LATE: gl.constexpr,
):
    TILE: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    work_smem = gl.allocate_shared_memory(gl.int32, [2, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, DIM], v_desc.layout)
    out_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, DIM], q_desc.layout)
    work_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(work_ready.index(half), count=1)
        mbarrier.init(work_empty.index(half), count=2)
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
            (_attend, (out_ptr, scale_log2e, out_stride, work_smem, q_smem, k_smem, v_smem, out_smem, work_ready,
                       q_ready, k_ready, v_ready, work_empty, q_empty, k_empty, v_empty, gl.constexpr(0), LATE)),
            (_attend, (out_ptr, scale_log2e, out_stride, work_smem, q_smem, k_smem, v_smem, out_smem, work_ready,
                       q_ready, k_ready, v_ready, work_empty, q_empty, k_empty, v_empty, gl.constexpr(1), LATE)),
            (_fill, (q_desc, k_desc, v_desc, block_tables_ptr, query_start_ptr, seq_lens_ptr, counter_ptr, num_seqs,
                     num_heads, num_works, table_stride, group, block_size, work_smem, q_smem, k_smem, v_smem,
                     work_ready, q_ready, k_ready, v_ready, work_empty, q_empty, k_empty, v_empty)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
