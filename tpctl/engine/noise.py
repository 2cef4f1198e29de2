"""Randomness that is a function of (seed, position, token id) alone.

A sampled token then depends neither on the other requests of its batch nor on how many ranks share the vocabulary,
and every rank can draw the noise of its own slice. The generator is a counter hash; all arithmetic is on 32 bits and
wraps:

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    h = mix(mix(token * 0x9E3779B9 + k0) ^ k1)              (k0, k1) from (seed, position), see ``noise_keys``
    w = (h + 0.5) / 2^32                                    uniform in (0, 1)
    gumbel = -log(-log1p(-w))

The mixing function is "lowbias32" of Chris Wellons' hash prospector (public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys for the token at ``position``: SplitMix64 (Steele et al., 2014) of seed and position."""
    return keys_of_state(seed_state(seed), position)


def seed_state(seed: int) -> int:
    """What a seed contributes to the keys of every position: 64 bits."""
    return _splitmix64(seed)


def keys_of_state(state: int, position: int) -> tuple[int, int]:
    """``noise_keys`` from a seed's ``seed_state``."""
    mixed = _splitmix64((state + position) & _MASK64)
    return mixed & _MASK32, mixed >> 32


def gumbel_noise(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of the shape that ``keys_R2[:, :1]`` and ``token_ids`` broadcast to.

    Args:
        keys_R2: int64 [R, 2] of 32-bit keys.
        token_ids: int64 [V], or [R, C] for candidates that differ by row.
    """
    h = _mix((token_ids * 0x9E3779B9 + keys_R2[:, :1]) & _MASK32)
    h = _mix(h ^ keys_R2[:, 1:])
    w = ((h.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return torch.log1p(w.neg_()).neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x ^= x >> 15
    x = (x * 0x846CA68B) & _MASK32
    x ^= x >> 16
    return x


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
