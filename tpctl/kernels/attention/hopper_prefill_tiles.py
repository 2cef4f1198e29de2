"""A tile of keys and values for the 64 queries of four warps, in Gluon: the inner loop of `hopper_prefill_kernels`.

A group issues the next tile's scores and the product of this tile's weights and values, and computes the next tile's
softmax as soon as its scores are there, while the other product still runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

ROWS = gl.constexpr(64)
"""Queries of a group of four warps."""


@gluon.jit
def weights(score, top, total, scale_log2e):
    """The running softmax of one more tile: its weights, and by what older sums are to be multiplied."""
    new_top = gl.maximum(top, gl.max(score, 1) * scale_log2e)
    p = gl.exp2(score * scale_log2e - new_top[:, None])
    fade = gl.exp2(top - new_top)
    return p, new_top, total * fade + gl.sum(p, 1), fade


@gluon.jit
def seen_by(score, tile, position, TILE: gl.constexpr, SCORES: gl.constexpr):
    token = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    return gl.where(token[None, :] <= position[:, None], score, float("-inf"))


@gluon.jit
def fold(
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
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
        operand = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, SUMS, 2))
        acc = warpgroup_mma(operand, v_smem.index(before), acc, is_async=True)
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            score = seen_by(score, tile, position, TILE, SCORES)
        p, top, total, fade = weights(score, top, total, scale_log2e)
        # Here, and not before the next scores: it ends a basic block, so that the assembler computes the weights before
        # it waits for the sums.
        after = count + 1
        mbarrier.wait(k_ready.index(after % STAGES), (after // STAGES) & 1, pred=tile + 1 < end)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before))
    return acc, p, top, total, fade
