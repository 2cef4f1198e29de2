"""Weights packed for oneDNN, which CPUs multiply fastest.

oneDNN multiplies a weight that was reordered once into its blocked layout 1.1 to 3 times faster than it multiplies a
plain one, which it reorders or strides over at every call.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tpctl.arch.block import Activation
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.dense import Weight

_ROWS_HINT = 32  # the batch that the blocked layout is chosen for; other batches work, a little slower


@cache
def onednn_available(dtype: torch.dtype) -> bool:
    """Whether this build and processor run the packed linear, found by running one."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        weight, x = torch.ones(16, 16, dtype=dtype), torch.ones(1, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return True


class PackedWeight(Weight):
    """W reordered once; the plain one is not kept."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = _pack(weight)

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        return _linear(x if norm is None else norm(x), self._packed, bias)


_POST: dict[Activation, tuple[str, list[float], str]] = {"silu": ("swish", [], ""), "gelu_tanh": ("gelu", [], "tanh")}
"""oneDNN's names of what follows a product, with their arguments."""


class PackedGate(Weight):
    """The rows [gate; up] of a gated MLP, packed apart: oneDNN applies the activation to a tile of the gate while that
    is in registers; in prefill the passes over memory that this spares are worth more than one wide GEMM."""

    def __init__(self, weight: Tensor) -> None:
        self._gate, self._up = (_pack(half) for half in weight.chunk(2))

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        gate, up = (None, None) if bias is None else bias.chunk(2)
        return torch.cat((_linear(x, self._gate, gate), _linear(x, self._up, up)), dim=-1)

    def gated(self, x: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        gate: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._gate, gate_bias, *_POST[activation])
        return gate.mul_(_linear(x, self._up, up_bias))


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    return packed
