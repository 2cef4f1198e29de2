"""Reading what `split_linear` leaves: the addends of a linear's result, by whichever kernel needs their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def as_runs(x: torch.Tensor) -> torch.Tensor:
    """[S, T, F] of a linear's result [T, F] (one run) or of its runs [S, T, F]."""
    return x if x.dim() == 3 else x[None]


@triton.jit
def sum_runs(pointers, mask, split_stride, SPLITS: tl.constexpr):
    """What is at the pointers, summed over the runs in float32 and rounded once to their dtype."""
    value = tl.load(pointers, mask=mask, other=0.0)
    if SPLITS > 1:
        total = value.to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(pointers + split * split_stride, mask=mask, other=0.0).to(tl.float32)
        value = total.to(value.dtype)
    return value
