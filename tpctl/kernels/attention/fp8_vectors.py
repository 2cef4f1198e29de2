"""Keys and values in FP8, in plain torch: what a vector is kept as, and what it then stands for.

A vector is what one token leaves in one head: D values, each kept as a float8_e4m3fn (4 bits of exponent, 3 of
mantissa, 448 at most), all with one scale, a bfloat16:

    scale   = the largest |value| / 448, rounded up to a bfloat16; not a number where one of the values is not finite
    code    = value / scale, rounded to the nearest e4m3, ties to even
    value'  = code * scale, in float32

So a value of 2^-14.8 of the largest or more is within 2^-4 of itself, and a smaller one within 2^-18.8 of the largest.
Rounding the scale costs nothing, for values are divided by the rounded one; rounding it up keeps all of them in range.

``tests`` and ``benchmarks/kv_error.py`` hold the kernels, and other scales, against these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn."""

_LEAST = 2.0**-133  # of bfloat16s more than 0


def rounded_up(scale: Tensor) -> Tensor:
    """The least bfloat16 that is no smaller than a float32 of 0 or more, as a float32; NaN for infinity and NaN."""
    up = scale.clone()
    up.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
    return up.add_(scale - scale)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [..., D], and scales, bfloat16 [...], of vectors [..., D] of any float type.

    What the codes of a vector say that is not finite does not matter: its scale is not a number.
    """
    largest = x.abs().amax(-1).float()
    # By a tensor: with a number torch multiplies on GPUs, by its rounded reciprocal, which is another quotient.
    scale = rounded_up(largest / torch.full_like(largest, LARGEST))
    divisor = scale.clamp(min=_LEAST)
    return (x.float() / divisor.unsqueeze(-1)).to(torch.float8_e4m3fn), scale.to(torch.bfloat16)


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [..., D] that codes, float8_e4m3fn or their bytes, and scales [...] stand for; rounded to ``dtype``.

    An e4m3's bits are those of a float32 that is 2^120 times smaller, subnormal numbers included. A CPU is ten times as
    fast at moving them there as torch is at converting.
    """
    bits = codes.view(torch.int8).int().bitwise_left_shift_(20).bitwise_and_(-0x7810_0000)  # sign, and 7 bits
    return bits.view(torch.float32).mul_(2.0**120).mul_(scale.float().unsqueeze(-1)).to(dtype)
