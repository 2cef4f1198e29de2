"""How a rank computes: which weights and streams its device gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.kernels.common.codes import Codes
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.instructions import multiplies
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import ResidualStream
from tpctl.layers.weights.codes import CodesWeight
from tpctl.layers.weights.dense import DenseWeight, Weight
from tpctl.layers.weights.experts import ExpertWeights, Gating, PlainExperts, Stack
from tpctl.layers.weights.packed_cpu import PackedGate, PackedWeight, onednn_available
from tpctl.layers.weights.tiled_cpu import TiledWeight

if TYPE_CHECKING:
    from tpctl.layers.delta_net.layer import DeltaNet, Net


class Compute:
    """Plain torch, and on CPUs oneDNN's packed weights.

    Attributes:
        merges: whether weights that read the same rows are multiplied at once where they can be.
    """

    merges = False

    def __init__(self, group: TPGroup) -> None:
        self.group = group

    def weight(self, weight: Tensor, *, gated: bool = False) -> Weight:
        """What multiplies by ``weight`` [out, in]; ``gated``: its rows are [gate; up]."""
        if weight.device.type == "cpu":
            if not multiplies(weight.dtype):
                return TiledWeight(weight)
            if onednn_available(weight.dtype):
                return PackedGate(weight) if gated else PackedWeight(weight)
        return DenseWeight(weight)

    def codes(self, codes: Codes, *, gated: bool = False) -> Weight:
        """What multiplies by quantised weights."""
        return CodesWeight(codes)

    def experts(self, gate_up: Stack, down: Stack, gating: Gating, first: int) -> ExpertWeights:
        """The experts of a mixture, this rank's from number ``first`` on."""
        return PlainExperts(self, gate_up, down, gating, first)

    def delta_net(self, net: DeltaNet) -> Net | None:
        """What computes a gated delta net in place of plain torch."""
        return None

    def normed(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[T, H], with a norm that was left open, if any, applied."""
        return x if norm is None else norm(x)

    def begin(self, embedded: Tensor, batch: ForwardBatch) -> ResidualStream:
        """A step's stream; ``embedded`` [T, H] is this rank's summand of the embeddings."""
        return ResidualStream(self.group.all_reduce(embedded), self.group)
