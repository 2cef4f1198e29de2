"""The weights of a mixture's experts on a device, and what they make of the tokens that chose them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.arch.block import Activation, Clamped
from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.experts.routing_reference import route
from tpctl.layers.activation import act_and_mul, clamped_act_and_mul
from tpctl.layers.norm import rms_norm
from tpctl.layers.stream import Rows
from tpctl.layers.weights.codes import joined
from tpctl.layers.weights.dense import Weight, WeightMaker

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


class MatrixMaker(Protocol[M_co]):
    """What makes the matrices of all experts what a device's kernels read."""

    def numbers(self, matrix: Tensor) -> M_co:
        """Of floats [E, out, in], strided in any way."""

    def codes(self, codes: tuple[Codes, ...]) -> M_co:
        """Of codes of matrices [E, …, in] below each other."""


class Stack(ABC):
    """One linear of all experts that a rank has, ``bias`` [E, out] included."""

    bias: Tensor | None

    @property
    @abstractmethod
    def count(self) -> int:
        """E."""

    @abstractmethod
    def expert(self, device: WeightMaker, number: int, *, gated: bool = False) -> Weight:
        """The weight of one, in the device's own form."""

    @abstractmethod
    def matrix(self, maker: MatrixMaker[M]) -> M:
        """Those of all, in the form that ``maker`` makes."""


@dataclass(frozen=True)
class DenseStack(Stack):
    """Floats ``values`` [E, out, in], strided as they are stored."""

    values: Tensor
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.values)

    def expert(self, device: WeightMaker, number: int, *, gated: bool = False) -> Weight:
        return device.weight(self.values[number].contiguous(), gated=gated)

    def matrix(self, maker: MatrixMaker[M]) -> M:
        return maker.numbers(self.values)


@dataclass(frozen=True)
class CodedStack(Stack):
    """``codes`` of matrices below each other."""

    codes: tuple[Codes, ...]
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.codes[0].values)

    def expert(self, device: WeightMaker, number: int, *, gated: bool = False) -> Weight:
        gated = gated and len(self.codes) == 1
        return joined(device.codes(codes.of_expert(number), gated=gated) for codes in self.codes)

    def matrix(self, maker: MatrixMaker[M]) -> M:
        return maker.codes(self.codes)


@dataclass(frozen=True)
class Gating:
    """What is between the two linears of an expert; ``interleaved``: rows of gate and up alternate."""

    activation: Activation | Clamped = "silu"
    interleaved: bool = False

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> [T, I]."""
        if self.interleaved:
            gate_up = torch.cat((gate_up[..., ::2], gate_up[..., 1::2]), dim=-1)
        if isinstance(self.activation, Clamped):
            return clamped_act_and_mul(gate_up, self.activation)
        return act_and_mul(gate_up, self.activation)


@dataclass(frozen=True)
class Scaled:
    """``x / rms(x) * scale / root of H``, for ``scale`` [H] (Gemma 4's router)."""

    scale: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] in any dtype -> float32."""
        return rms_norm(x.float(), None, self.eps).mul_(self.scale.float()).mul_(x.shape[-1] ** -0.5)


class SharedMLP(Protocol):
    """The gated MLP that every token takes beside its experts (``layers.mlp``)."""

    def local(self, rows: Rows) -> Tensor:
        """This rank's partial sum of normed [T, H]."""

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """Gate and up, [2I, H], and down, [H, I], where nothing but SiLU is between these numbers."""


@dataclass(frozen=True)
class MixtureParts:
    """What is around the experts of a mixture.

    Attributes:
        count: E of all ranks.
        gate: [E, H], the router's linear, and ``bias`` [E], its bias.
        correction: float32 [E], added to scores for the choice alone.
        shared_gate: [H], by whose product's sigmoid ``shared`` counts.
        scaled: what the router reads is not what the experts do, but what that is before its norm, scaled so.
        factors: [E], what each expert's weight is multiplied by.
    """

    count: int
    per_token: int
    routing: Routing
    gate: Tensor
    bias: Tensor | None
    correction: Tensor | None
    shared: SharedMLP | None
    shared_gate: Tensor | None
    scaled: Scaled | None = None
    factors: Tensor | None = None


class ExpertWeights(ABC):
    """Experts ``first`` to ``first + E`` of a mixture, or this rank's slices of them."""

    @abstractmethod
    def mixture(
        self, rows: Rows, parts: MixtureParts, residual: Tensor | None = None, *, partial: bool = False
    ) -> Tensor:
        """This rank's partial sum of the experts that tokens chose, to which others than its own add nothing, and of
        the shared MLP: [T, H] in the dtype of ``rows``. A token's is its own, whatever those beside it are; in plain
        torch but for the last bits, which a product of other rows may round otherwise.

        Experts are chosen in float32 whatever the model's dtype is: near ties decide a token's way.

        Args:
            residual: [T, H], to which it is added in place.
            partial: send it, where the device's linears send sums themselves.
        """


class PlainExperts(ExpertWeights):
    """In plain torch, one expert after the other, by the numbers they have: a token's sum has one order."""

    def __init__(self, device: WeightMaker, gate_up: Stack, down: Stack, gating: Gating, first: int) -> None:
        fused = not gating.interleaved and not isinstance(gating.activation, Clamped)
        self._gate_up = [gate_up.expert(device, number, gated=fused) for number in range(gate_up.count)]
        self._down = [down.expert(device, number) for number in range(down.count)]
        self._biases = gate_up.bias, down.bias
        self._gating, self._fused, self._first = gating, fused, first

    def mixture(
        self, rows: Rows, parts: MixtureParts, residual: Tensor | None = None, *, partial: bool = False
    ) -> Tensor:
        x = rows.x if rows.norm is None else rows.norm(rows.x)
        bias = None if parts.bias is None else parts.bias.float()
        logits = F.linear(x.float() if parts.scaled is None else parts.scaled(rows.x), parts.gate.float(), bias)
        ids, weights = route(logits, parts.routing, parts.per_token, parts.correction)
        if parts.factors is not None:
            weights = weights * parts.factors.float()[ids]
        total = self._routed(x, ids, weights)
        if parts.shared is not None:
            shared = parts.shared.local(Rows(x))
            gate = parts.shared_gate
            total += shared if gate is None else shared * F.linear(x, gate.view(1, -1)).sigmoid()
        return total if residual is None else residual.add_(total)

    def _routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The chosen experts' sum [T, H], for ``ids`` int32 [T, K] of all experts and ``weights`` float32 [T, K]."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        chosen = ids - self._first
        for number in torch.unique(chosen).tolist():
            if 0 <= number < len(self._down):
                tokens, place = (chosen == number).nonzero(as_tuple=True)
                found = self._expert(number, x[tokens])
                total.index_add_(0, tokens, found.float() * weights[tokens, place, None])
        return total.to(x.dtype)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        inner, outer = (None if bias is None else bias[number] for bias in self._biases)
        matrix, activation = self._gate_up[number], self._gating.activation
        if self._fused and not isinstance(activation, Clamped):
            between = matrix.gated(x, inner, activation)
        else:
            between = self._gating(matrix.linear(x, inner))
        return self._down[number].linear(between, outer)
