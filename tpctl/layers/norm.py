"""Root mean square normalisation, alone and fused with what comes before it in a decoder block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.distributed import TPGroup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis, in float32; rounded to ``x``'s dtype before the weight is applied.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the rounding is that of Llama's reference.
    """
    wide = x.float()
    # The length is one pass over the row, where square and mean are two.
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    if wide is x:
        return (x * scale).mul_(weight)
    return wide.mul_(scale).to(x.dtype).mul_(weight)


class RMSNorm(nn.Module):
    """RMSNorm whose weight [size] is replicated."""

    def __init__(self, size: int, eps: float, group: TPGroup, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def reduce_add(self, partial: Tensor, residual: Tensor) -> Tensor:
        """All-reduce ``partial`` over the ranks, add it to ``residual`` in place, and normalise the sum.

        The three belong together: each reads and writes the same [T, H] rows, and on a GPU one kernel does them all.
        """
        residual.add_(self.group.all_reduce(partial))
        return rms_norm(residual, self.weight, self.eps)
