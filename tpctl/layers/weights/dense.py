"""Weights as they are stored, [out, in] in the model's dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from tpctl.arch.block import Activation
from tpctl.kernels.common.codes import Codes
from tpctl.layers.activation import act_and_mul
from tpctl.layers.norm import RMSNorm


class Weight(ABC):
    """W [out, in] of one linear. What a device does better than in steps it overrides.

    ``norm`` is one that ``x`` has still to go through; ``bias`` [out] is added where there is one.
    """

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        """[T, in] -> norm(x) W^T + bias [T, out]."""

    def gated(self, x: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None = None) -> Tensor:
        """[T, in] -> activation(gate) * up [T, out / 2], for rows [gate; up] of W."""
        return act_and_mul(self.linear(x, bias, norm), activation)

    def runs(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        """As ``linear``, or [S, T, out] of which the sum over S is that: for kernels that take both."""
        return self.linear(x, bias, norm)

    def partial(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As ``runs``, for a sum over the ranks that follows."""
        return self.linear(x, bias)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """``residual += x W^T + bias``."""
        residual.add_(self.linear(x, bias))


class WeightMaker(Protocol):
    """What gives a linear the ``Weight`` that its device multiplies by."""

    def weight(self, weight: Tensor, *, gated: bool = False) -> Weight:
        """Of ``weight`` [out, in]; ``gated``: its rows are [gate; up]."""
        ...

    def codes(self, codes: Codes, *, gated: bool = False) -> Weight:
        """Of quantised ones."""
        ...


class DenseWeight(Weight):
    """In plain torch, anywhere."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        return F.linear(x if norm is None else norm(x), self.weight, bias)
