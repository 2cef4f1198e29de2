"""Device-specific ways to compute ``x W^T + b`` for a weight that never changes.

On CPUs, oneDNN multiplies a weight that was reordered once into its blocked layout 1.1 to 3 times faster than it
multiplies a plain one, which it reorders or strides over at every call (docs/performance.md has the table).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Gemm = Callable[[Tensor, Tensor | None], Tensor]
"""(x [T, in], bias [out] or None) -> [T, out]."""

_ROWS_HINT = 32  # the batch that the blocked layout is chosen for; other batches work, a little slower


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


def _packed_onednn(weight: Tensor) -> Gemm:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    linear = torch.ops.mkldnn._linear_pointwise

    def gemm(x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = linear(x, packed, bias, "none", [], "")
        return result

    return gemm
