"""Root mean square normalisation, alone and fused with what comes before it in a decoder block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.distributed import TPGroup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis, in float32; rounded to ``x``'s dtype before the weight is applied.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the rounding is that of Llama's reference.
    """
    if x.dtype == torch.float32:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps)) * weight
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
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
