"""Quantised weights in plain torch: made numbers of a tile at a time, so that memory holds no more than the codes.

Inputs are not rounded, whatever the format says of them: it is the exact product with what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from tpctl.kernels.common.codes import Codes, decode
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import Weight
from tpctl.layers.weights.tiled_cpu import linear_in_tiles


class JoinedWeight(Weight):
    """Several weights below each other."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._weights = tuple(weights)

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        found = torch.cat([weight.linear(x, None) for weight in self._weights], dim=-1)
        return found if bias is None else found.add_(bias)


def joined(weights: Iterable[Weight]) -> Weight:
    """One weight of those below each other."""
    first, *rest = weights
    return JoinedWeight((first, *rest)) if rest else first


class CodesWeight(Weight):
    """W [out, in] as codes."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return linear_in_tiles(x, bias, self.codes.outputs, partial(decode, self.codes))
