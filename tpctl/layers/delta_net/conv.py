"""A causal convolution of each channel by itself, with what it has seen last as its state. Shapes as in ``rule``.

The state is the last P - 1 inputs [P - 1, X], P the number of taps; token by token in memory, as tokens come.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def taps_of(weight_X1P: Tensor) -> Tensor:
    """[P, X], float32: a row of weights for each tap, from the oldest input to the newest."""
    return weight_X1P[:, 0].float().t().contiguous()


def step(x_SX: Tensor, state_SPX: Tensor, taps_PX: Tensor) -> Tensor:
    """[S, X]: one token of each sequence, through silu; its state is changed in place."""
    seen_SPX = torch.cat((state_SPX, x_SX.unsqueeze(1)), dim=1)
    state_SPX.copy_(seen_SPX[:, 1:])
    return F.silu((seen_SPX * taps_PX).sum(1).to(x_SX.dtype))


def run(seen_LX: Tensor, taps_PX: Tensor) -> Tensor:
    """[T, X]: tokens of one sequence, through silu.

    Args:
        seen_LX: its state and the new tokens, below each other: L = P - 1 + T.
    """
    new = len(seen_LX) - len(taps_PX) + 1
    out = seen_LX[:new] * taps_PX[0]
    for at, tap_X in enumerate(taps_PX[1:], 1):
        out.addcmul_(seen_LX[at : at + new], tap_X)
    return F.silu(out.to(seen_LX.dtype))
