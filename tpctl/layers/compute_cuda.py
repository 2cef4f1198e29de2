"""How a GPU computes: linears and streams with fused kernels, in place of ``layers.compute``'s steps of plain torch.

The order of operations and the two all-reduces of a block stay; what differs is how much one launch does:

    few rows, one rank    norm + GEMV (+ bias) | norm + GEMV + activation*up | GEMV + residual
    otherwise             all-reduce + residual + norm | GEMM | activation*up (up to 128 rows within its linear)
                          (a GEMM of few outputs in runs of its input, summed by what follows: ``split_linear``)

Two ranks, and more where messages are small, reduce by writing to each other's memory (``kernels.collective``), for few
rows from within the linear whose result is summed; NCCL does the rest.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import early_launch
from tpctl.kernels.experts.routing import GateScratch
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute import Compute
from tpctl.layers.delta_net.fused import FusedNet
from tpctl.layers.delta_net.layer import DeltaNet
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream_cuda import CudaStream
from tpctl.layers.weights.codes_cuda import KernelCodesWeight
from tpctl.layers.weights.dense import Weight
from tpctl.layers.weights.experts import ExpertWeights, Gating, Stack
from tpctl.layers.weights.experts_cuda import cuda_experts
from tpctl.layers.weights.kernels import GpuFacts, KernelWeight, StepState, normed

PEER_LIMIT = 2 << 20
"""Largest message in bytes that more than two ranks send to each other's memory; above it NCCL sends fewer bytes. An
estimate: measured were two ranks, where peer memory wins at any size."""

PEER_PIECE = 8 << 20
"""Bytes a launch of two ranks' messages, which never go through NCCL (docs/kernel-notes.md)."""


def reach_each_other(group: TPGroup) -> bool:
    """Whether every rank's GPU can address the memory of all others' (collective); else NCCL does all sums."""
    return group.one_host and group.minimum(int(reaches_others(group))) == 1


def reaches_others(group: TPGroup) -> bool:
    """Whether this rank's GPU can address the memory of all others'. Those of another host cannot be addressed,
    whatever GPUs of the same numbers are here."""
    device, count = group.device, torch.cuda.device_count()
    others = [index for index in range(min(count, group.size)) if index != device.index]
    here = group.one_host and count >= group.size
    return here and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)


def connect_peers(group: TPGroup, hidden: int, dtype: torch.dtype, max_rows: int, max_tokens: int) -> PeerBuffer | None:
    """Memory that the ranks write sums of [T, hidden] to (collective); ``None`` where one cannot or need not.

    Args:
        max_rows: the largest decode batch, or captured step.
        max_tokens: the largest step.
    """
    rows = peer_rows(group.size, hidden, dtype, max_rows, max_tokens)
    if not rows or not reach_each_other(group):
        return None
    world = dist.group.WORLD
    assert world is not None
    return PeerBuffer.connect(world, rows, hidden, dtype, group.device)


def peer_rows(size: int, hidden: int, dtype: torch.dtype, max_rows: int, max_tokens: int) -> int:
    """Rows that so many ranks which reach each other's memory send at once at most; 0: they send none. Arguments as of
    ``connect_peers``."""
    if size == 1 or dtype not in (torch.bfloat16, torch.float32):
        return 0
    row = hidden * dtype.itemsize
    if size == 2:
        return max(max_rows, min(max_tokens, PEER_PIECE // row))
    return min(max_rows, max(1, PEER_LIMIT // row))


class CudaCompute(Compute):
    """One rank's GPU. One instance per stream: its scratch memory is shared by all calls.

    Args:
        peers: what ``connect_peers`` gave.
        facts: what the device is; read from it by default.
    """

    merges = True

    def __init__(self, group: TPGroup, peers: PeerBuffer | None = None, facts: GpuFacts | None = None) -> None:
        super().__init__(group)
        self.peers = peers
        self._facts = GpuFacts.of(group.device) if facts is None else facts
        self._scratch = GemvScratch.allocate(group.device)
        self._gates = GateScratch.allocate(group.device)
        self._state = StepState()

    def weight(self, weight: Tensor, *, gated: bool = False) -> Weight:
        return KernelWeight(weight, self._scratch, self._state, self._facts, split=self.group.size > 1)

    def codes(self, codes: Codes, *, gated: bool = False) -> Weight:
        return KernelCodesWeight(codes, self._scratch, self._state, self._facts)

    def experts(self, gate_up: Stack, down: Stack, gating: Gating, first: int) -> ExpertWeights:
        return cuda_experts(gate_up, down, gating, first, self._gates, self._state, self._facts)

    def delta_net(self, net: DeltaNet) -> FusedNet:
        return FusedNet(self, net)

    def normed(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is None or not norm.in_kernels:
            return super().normed(x, norm)
        return normed(x, norm, self._state)

    def begin(self, embedded: Tensor, batch: ForwardBatch) -> CudaStream:
        # Launched early, a kernel's start hides behind the end of the one before; many rows leave nothing to hide.
        self._state.pdl = early_launch(batch.num_tokens, self.group.device)
        return CudaStream(embedded, self.group, self._state, self._peers_for, self._facts)

    def winner(self, scores_R: Tensor, ids_R: Tensor) -> Tensor | None:
        """The token id of the best score over the ranks, for each row (-1: some rank has stopped sending); ``None``
        where peers cannot be written to."""
        return None if self.peers is None else self.peers.winner(scores_R, ids_R, pdl=self._state.pdl)

    def lost_peer(self) -> bool:
        """Whether this rank ever gave up waiting for another (synchronises with the device)."""
        return self.peers is not None and self.peers.timed_out()

    def _peers_for(self, x: Tensor) -> PeerBuffer | None:
        """The peer memory, where sums of this shape go through it: always between two ranks, else what fits one
        launch."""
        if self.peers is None or not self.peers.fits(x):
            return None
        fits = x.nbytes <= PEER_LIMIT and x.shape[0] <= self.peers.layout.max_rows
        return self.peers if self.group.size == 2 or fits else None
