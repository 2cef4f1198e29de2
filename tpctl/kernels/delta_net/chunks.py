"""Prompts through a gated delta net: tokens in chunks of 64, in which nothing is done token by token.

Three launches: the convolution; what else chunks can be prepared without a state, for all at once; and the states, from
chunk to chunk. What goes from one to the next lies chunk by chunk in memory that is given back at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from tpctl.accounting import NET_CHUNK
from tpctl.kernels.common.launch import next_power_of_2, shared_memory
from tpctl.kernels.delta_net.chunks_kernels import conv_kernel, gated_norm_kernel, prepare_kernel, scan_kernel
from tpctl.kernels.delta_net.inputs import NetShape, NetState, NetWeights, Projected, constants
from tpctl.kernels.delta_net.tables import Group

BLOCK = 16
"""Rows of the blocks on a system's diagonal, which are inverted row by row."""

CONV_WARPS, PREPARE_WARPS = 8, 4


class ScanConfig(NamedTuple):
    """Of a value's dimensions, those that a program takes; how many chunks are on their way; warps."""

    tile: int
    stages: int
    warps: int


def pick_scan(shape: NetShape, dtype: torch.dtype, limit: int) -> ScanConfig:
    """With 32 heads of 128 dimensions, four programs each fill a GPU for one sequence. ``limit``: the shared memory in
    bytes that a program may have."""
    blocks = _blocks(shape)
    tile = min(32, blocks["BLOCK_E"])
    chunk = NET_CHUNK * (3 * blocks["BLOCK_D"] + tile + NET_CHUNK) * dtype.itemsize
    return ScanConfig(tile, 2 if dtype != torch.float32 and 2 * chunk + (16 << 10) <= limit else 1, 4)


class ChunkTables(NamedTuple):
    """``tables.Chunks`` on the device: int32 [5, C] and [4, sequences + 1]."""

    chunks: torch.Tensor
    sequences: torch.Tensor
    groups: Sequence[Group]


def _blocks(shape: NetShape) -> dict[str, int]:
    """Tiles of products have powers of two, from 16 on."""
    return {
        "BLOCK_D": max(16, next_power_of_2(shape.key_dim)),
        "BLOCK_E": max(16, next_power_of_2(shape.value_dim)),
    }


def precision(dtype: torch.dtype) -> str:
    """Of products of float32 tiles: where the model's dtype is that, all of its bits."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def chunks(
    projected: Projected,
    weights: NetWeights,
    state: NetState,
    tables: ChunkTables,
    shape: NetShape,
    out: torch.Tensor,
) -> None:
    """The rows of ``out`` [T, N * E] that ``tables`` name, from the same rows of ``projected``, before the gated norm;
    states are moved on, and kept where the tables say so.

    Products of tiles are of the model's dtype and summed in float32; states are float32, and the system's inverse.
    """
    for group in tables.groups:
        _group(projected, weights, state, tables, shape, out, group)


def _group(
    projected: Projected,
    weights: NetWeights,
    state: NetState,
    tables: ChunkTables,
    shape: NetShape,
    out: torch.Tensor,
    group: Group,
) -> None:
    blocks, heads, count = _blocks(shape), shape.value_heads, group.chunks
    block_d, block_e = blocks["BLOCK_D"], blocks["BLOCK_E"]
    mixed = out.new_empty(count, NET_CHUNK * (2 * shape.key_heads * block_d + heads * block_e))
    value = out.new_empty(count, heads, NET_CHUNK, block_e)
    weight, query, key = (out.new_empty(count, heads, NET_CHUNK, block_d) for _ in range(3))
    within = out.new_empty(count, heads, NET_CHUNK, NET_CHUNK)
    total = out.new_empty((count, heads), dtype=torch.float32)
    between = (value, weight, query, key, within, total)
    sizes = constants(shape)
    num_chunks, num_sequences = tables.chunks.shape[1], tables.sequences.shape[1]
    conv_kernel[(2 * shape.key_heads + heads, count)](
        projected.q,
        weights.taps,
        state.inputs,
        tables.chunks,
        tables.sequences,
        mixed,
        num_chunks,
        num_sequences,
        group.chunk,
        projected.q.stride(0),
        projected.qk_step,
        projected.qv_step,
        projected.key_step,
        projected.v_step,
        **sizes,
        **blocks,
        CHUNK=NET_CHUNK,
        num_warps=CONV_WARPS,
    )
    prepare_kernel[(heads, count)](
        mixed,
        projected.b,
        projected.a,
        weights.dt_bias,
        weights.a_log,
        tables.chunks,
        *between,
        num_chunks,
        group.chunk,
        projected.b.stride(0),
        projected.gate_step,
        **sizes,
        **blocks,
        PRECISION=precision(out.dtype),
        CHUNK=NET_CHUNK,
        BLOCK=BLOCK,
        num_warps=PREPARE_WARPS,
    )
    scan = pick_scan(shape, out.dtype, shared_memory(out.device))
    scan_kernel[(triton.cdiv(shape.value_dim, scan.tile), heads, group.sequences)](
        projected.q,
        projected.k,
        projected.v,
        *state,
        out,
        tables.chunks,
        tables.sequences,
        *between,
        num_chunks,
        num_sequences,
        group.chunk,
        group.sequence,
        projected.q.stride(0),
        projected.key_step,
        projected.v_step,
        **sizes,
        **blocks,
        TILE=scan.tile,
        PRECISION=precision(out.dtype),
        CHUNK=NET_CHUNK,
        STAGES=scan.stages,
        num_warps=scan.warps,
    )


def gated_norm(
    projected: Projected,
    weights: NetWeights,
    shape: NetShape,
    out: torch.Tensor,
    starts_P1: torch.Tensor | None = None,
) -> None:
    """``out`` [T, N * E] in place: RMSNorm over each head, times silu(z).

    starts_P1: int32 [P + 1], where the prompts' rows begin, and behind all of them: rows before are left alone, those
    after are none, and get zeros.
    """
    if not len(out):
        return
    block_h = min(8, next_power_of_2(shape.value_heads))
    gated_norm_kernel[(len(out), triton.cdiv(shape.value_heads, block_h))](
        out,
        projected.z,
        weights.norm,
        weights.norm if starts_P1 is None else starts_P1,
        projected.z.stride(0),
        projected.z_step,
        weights.eps,
        GROUP=shape.group,
        HEADS=shape.value_heads,
        VALUE_DIM=shape.value_dim,
        PROMPTS=0 if starts_P1 is None else len(starts_P1) - 1,
        BLOCK_H=block_h,
        BLOCK_E=next_power_of_2(shape.value_dim),
        num_warps=4,
    )
