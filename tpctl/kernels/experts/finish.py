"""The end of a mixture: what the experts of a token add up to, added to the residual or sent to the peers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.collective.all_reduce_kernels import send_values
from tpctl.kernels.common.launch import next_power_of_2


@triton.jit
def peers_of(peers_ptr, epochs_ptr, m, rows, WORLD: tl.constexpr, PEERS: tl.constexpr):
    """The addresses of all ranks' buffers, and the numbers of the calls that will sum rows `m`."""
    peer = tl.arange(0, PEERS)
    targets = tl.load(peers_ptr + peer, mask=peer < WORLD, other=0)
    return targets, tl.load(epochs_ptr + m, mask=m < rows, other=0) + 1


@triton.jit
def finish(
    value,  # [M, N] float32: columns block * N and on of rows m
    m,
    block,
    rows,
    out_ptr,
    residual_ptr,
    peers_ptr,
    epochs_ptr,
    out_stride,
    residual_stride,
    row_words,
    plane_words,
    COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PEERS: tl.constexpr,
):
    n = block * value.shape[1] + tl.arange(0, value.shape[1])
    mask = (m < rows)[:, None] & (n < COLUMNS)[None, :]
    at = m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + at * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if WORLD > 1:
        targets, epochs = peers_of(peers_ptr, epochs_ptr, m, rows, WORLD, PEERS)
        send_values(value, m.to(tl.int64), block, rows, COLUMNS, epochs, targets, row_words, plane_words, RANK, WORLD,
                    out_ptr.dtype.element_ty == tl.float32)  # fmt: skip
    tl.store(out_ptr + at * out_stride + n[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def finish_options(
    out_TH: torch.Tensor, residual_TH: torch.Tensor | None, outlet: PeerBuffer | None, block_n: int
) -> dict[str, Any]:
    """What a kernel that ends with `finish` takes for it. Raises ValueError for what an outlet does not take."""
    if outlet is not None:
        if out_TH.shape[1] % 2 or block_n % 2:
            raise ValueError(f"{out_TH.shape[1]} features in blocks of {block_n} cannot be sent in pairs")
        outlet.check(out_TH, sent=True)
    residual = out_TH if residual_TH is None else residual_TH
    return {
        "out_ptr": out_TH,
        "residual_ptr": residual,
        "peers_ptr": out_TH if outlet is None else outlet.pointers,
        "epochs_ptr": out_TH if outlet is None else outlet.epochs,
        "out_stride": out_TH.stride(0),
        "residual_stride": residual.stride(0),
        "row_words": 0 if outlet is None else outlet.layout.row_words,
        "plane_words": 0 if outlet is None else outlet.layout.plane_words,
        "HAS_RESIDUAL": residual_TH is not None,
        "RANK": 0 if outlet is None else outlet.rank,
        "WORLD": 1 if outlet is None else outlet.world,
        "PEERS": 1 if outlet is None else next_power_of_2(outlet.world),
    }
