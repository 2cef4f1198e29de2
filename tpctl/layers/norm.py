"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.arch import linear
from tpctl.layers.module import Layer


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, unit_offset: bool = False, once: bool = False) -> Tensor:
    """``x / rms(x) * weight`` over the last axis, in float32; rounded to ``x``'s dtype before the weight is applied.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the rounding is that of Llama's reference. With
    ``unit_offset`` the factor is 1 + weight, and the product is rounded, as in Gemma's; with ``once`` it is rounded
    alike, and the factor is the weight (Gemma 4, OLMo). ``None``: there is no weight.
    """
    wide = x.float()
    # The length is one pass over the row, where square and mean are two.
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    if weight is None:
        return (x * scale).to(x.dtype)
    return scaled(x, scale, weight, unit_offset=unit_offset, once=once)


def scaled(x: Tensor, scale: Tensor, weight: Tensor, *, unit_offset: bool = False, once: bool = False) -> Tensor:
    """``x * scale * weight``, rounded as ``rms_norm`` does; ``scale`` is float32."""
    if unit_offset or once:
        return (x.float() * scale).mul_(weight.float() + 1 if unit_offset else weight.float()).to(x.dtype)
    return (x * scale).to(x.dtype).mul_(weight)


class RMSNorm(Layer):
    """RMSNorm whose weight [size] is replicated.

    Attributes:
        in_kernels: whether GPU kernels compute it, alone and within what they do.
    """

    in_kernels = True

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype | None = None,
        *,
        unit_offset: bool = False,
        once: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.unit_offset, self.once = unit_offset, once

    @classmethod
    def of(cls, made_of: linear.Norm, dtype: torch.dtype | None = None, size: int | None = None) -> RMSNorm:
        """``size``: how many of its weights the rank has, where that is not all."""
        kind = CentredNorm if made_of.centred else cls
        size = made_of.size if size is None else size
        return kind(size, made_of.eps, dtype, unit_offset=made_of.unit_offset, once=made_of.once)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset, once=self.once)


class CentredNorm(RMSNorm):
    """LayerNorm without a bias (Ba et al., 2016), in float32, rounded once: ``(x - mean) / deviation * weight``."""

    in_kernels = False

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt_()
        return wide.mul_(scale).mul_(self.weight.float()).to(x.dtype)
