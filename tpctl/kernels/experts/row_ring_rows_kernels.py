"""What the kernels of `row_ring` do with a row of W: a thread asks for its chunks, and sums them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import copy, copy_around, load_4, load_float, load_half, load_power, other_lane
from tpctl.kernels.experts.row_ring_tiles_kernels import chunk_sum


@gluon.jit
def own_chunks(rank, CUT: gl.constexpr):
    """A thread's chunks of what its team sums, and whether there are such."""
    chunks, real = (), ()
    CHUNKS: gl.constexpr = CUT.chunks
    for i in gl.static_range(CHUNKS):
        chunk = rank + i * CUT.team
        chunks += (gl.minimum(chunk, CUT.all_chunks - 1),)  # type: ignore[assignment]
        real += (chunk < CUT.all_chunks,)  # type: ignore[assignment]
    return chunks, real


@gluon.jit
def row_of(n, HALF: gl.constexpr, CUT: gl.constexpr):
    """The row of an expert's W that is a result's; of gate_up its gate (HALF 0) or up."""
    if not CUT.gated:
        row = n
    elif CUT.interleaved:
        row = 2 * n + HALF
    else:
        row = n + HALF * CUT.width
    return row


@gluon.jit
def scale_column(column, CUT: gl.constexpr):
    """How many bytes a chunk's scale is behind those of its row."""
    return column // 8 * CUT.scale_bytes if CUT.kind == "e4m3" else column


@gluon.jit
def scales_of(scales_ptr, row, CUT: gl.constexpr):
    """Where an expert's row has its scales."""
    if CUT.kind == "e4m3":
        scales_ptr += row // 128 * (CUT.scale_columns * CUT.scale_bytes)
    elif CUT.kind == "e2m1":
        scales_ptr += row * CUT.row_chunks
    return scales_ptr


@gluon.jit
def of_expert(w_ptr, scales_ptr, expert, CUT: gl.constexpr):
    """Where an expert's rows and scales begin."""
    wide = expert.to(gl.int64)
    return w_ptr + wide * (CUT.outputs * CUT.row_chunks * 16), scales_ptr + wide * CUT.expert_scales


@gluon.jit
def ask_for_chunk(at, scale_at, w_ptr, scales_ptr, go, CUT: gl.constexpr):
    """And for the word that its scale is in."""
    copy(at, w_ptr, go, 16)
    if CUT.scale_bytes == 4:
        copy(scale_at, scales_ptr, go, 4)
    elif CUT.scale_bytes > 0:
        copy_around(scale_at, scales_ptr, go)


@gluon.jit
def row_sum(at, scale_at, inputs, factors, row, columns, own, CUT: gl.constexpr):
    """Of a thread's chunks of an expert's row, which have come."""
    total = factors[0] * 0.0
    CHUNKS: gl.constexpr = CUT.chunks
    for j in gl.static_range(CHUNKS):
        value = chunk_sum(load_4(at + j * (CUT.team * 16)), inputs[j], CUT)
        scale = scale_at + j * (CUT.team * 4)
        if CUT.kind == "e2m1":
            byte = row * (CUT.row_chunks % 4) + columns[j]
            value = value * (load_power(scale + (byte & 3)) * factors[j])
        elif CUT.scale_bytes == 4:
            value = value * (load_float(scale) * factors[j])
        elif CUT.scale_bytes == 2:
            half = row // 128 * CUT.scale_columns + columns[j] // 8
            value = value * (load_half(scale + (half & 1) * 2, False) * factors[j])
        if j >= CUT.full:
            value = gl.where(own[j], value, 0.0)
        total = value if j == 0 else total + value
    return total


@gluon.jit
def _fold(a, b, lane, DISTANCE: gl.constexpr):
    """Of two numbers' halves of a warp each, what lanes have together: below the distance a's, above it b's."""
    high = lane & DISTANCE
    return gl.where(high > 0, b, a) + other_lane(gl.where(high > 0, a, b), DISTANCE)


@gluon.jit
def lane_sums(totals, lane, CUT: gl.constexpr):
    """The sums of a step's rows over a warp: of four, lane 8 i and those behind it have that of row i; of two, 16 i."""
    if CUT.step == 4:
        total = _fold(_fold(totals[0], totals[2], lane, 16), _fold(totals[1], totals[3], lane, 16), lane, 8)
    else:
        total = _fold(totals[0], totals[1], lane, 16)
        total += other_lane(total, 8)
    total += other_lane(total, 4)
    total += other_lane(total, 2)
    total += other_lane(total, 1)
    return total


@gluon.jit
def sum_of(at, row, CUT: gl.constexpr):
    """What the warps of a team have left of a row."""
    total = load_float(at + row * (CUT.share * 4))
    SHARE: gl.constexpr = CUT.share
    for i in gl.static_range(1, SHARE):
        total += load_float(at + row * (CUT.share * 4) + i * 4)
    return total
