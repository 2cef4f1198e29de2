"""Device-specific ways to compute ``x W^T + b`` for a weight that never changes.

On CPUs, oneDNN multiplies a weight that was reordered once into its blocked layout 1.1 to 3 times faster than it
multiplies a plain one, which it reorders or strides over at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Gemm = Callable[[Tensor, Tensor | None], Tensor]
"""(x [T, in], bias [out] or None) -> [T, out]."""

_ROWS_HINT = 32  # the batch that the blocked layout is chosen for; other batches work, a little slower

GatedGemm = Callable[[Tensor], Tensor]
"""x [T, in] -> silu(x W_gate^T + b_gate) * (x W_up^T + b_up) [T, out]."""


@cache
def _onednn_available(dtype: torch.dtype) -> bool:
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


def make_gemm(weight: Tensor) -> Gemm | None:
    """The fastest known GEMM for ``weight`` [out, in], or ``None`` where a plain ``F.linear`` is."""
    if weight.device.type == "cpu" and _onednn_available(weight.dtype):
        return _packed_onednn(weight)
    return None


def make_gated_gemm(weight: Tensor, bias: Tensor | None) -> GatedGemm | None:
    """A GEMM for ``weight`` [2 out, in] of rows [gate; up] that gates as it goes, or ``None`` where none is known.

    oneDNN applies SiLU to a tile of the gate while that is in registers; in prefill the passes over memory that this
    spares are worth more than one wide GEMM instead of two.
    """
    if weight.device.type != "cpu" or not _onednn_available(weight.dtype):
        return None
    linear = torch.ops.mkldnn._linear_pointwise
    gate_weight, up_weight = (_pack(half) for half in weight.chunk(2))
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)

    def gated(x: Tensor) -> Tensor:
        gate: Tensor = linear(x, gate_weight, gate_bias, "swish", [], "")
        return gate.mul_(linear(x, up_weight, up_bias, "none", [], ""))

    return gated


def _packed_onednn(weight: Tensor) -> Gemm:
    packed = _pack(weight)
    linear = torch.ops.mkldnn._linear_pointwise

    def gemm(x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = linear(x, packed, bias, "none", [], "")
        return result

    return gemm


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    return packed
