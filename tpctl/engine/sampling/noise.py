"""Randomness that is a function of (seed, position, token id) alone.

A sampled token then depends neither on the other requests of its batch nor on how many ranks share the vocabulary,
and every rank can draw the noise of its own slice. Seed and position give a row two 32-bit keys here; the noise that
keys and token ids give is defined in ``kernels.common.noise``, which the GPU's sampling kernel follows too.
"""

from __future__ import annotations

from torch import Tensor

from tpctl.kernels.common.noise import gumbel_reference, noise_hash_reference, splitmix64

_MASK32 = 0xFFFFFFFF


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys for the token at ``position``: SplitMix64 of seed and position."""
    return keys_of_state(seed_state(seed), position)


def seed_state(seed: int) -> int:
    """What a seed contributes to the keys of every position: 64 bits."""
    return splitmix64(seed)


def keys_of_state(state: int, position: int) -> tuple[int, int]:
    """``noise_keys`` from a seed's ``seed_state``."""
    mixed = splitmix64(state + position)
    return mixed & _MASK32, mixed >> 32


def gumbel_noise(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of the shape that ``keys_R2[:, :1]`` and ``token_ids`` broadcast to.

    Args:
        keys_R2: int64 [R, 2] of 32-bit keys.
        token_ids: int64 [V], or [R, C] for candidates that differ by row.
    """
    return gumbel_reference(noise_hash_reference(token_ids, keys_R2[:, :1], keys_R2[:, 1:]))
