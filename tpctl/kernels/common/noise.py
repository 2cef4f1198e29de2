"""The noise of Gumbel-max sampling: its definition, and sampling by it in plain torch (no triton needed).

The noise depends on (row keys, token id) alone, so every rank, batch composition and device draws the same
token. All arithmetic is on uint32 and wraps:

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    h      = mix(mix(id * 0x9E3779B9 + k0) ^ k1)          id is the global token id, (k0, k1) the row's keys
    w      = (float32(h) + 0.5) * 2^-32                   in float32, at most 1 - 2^-24
    gumbel = -log(-log1p(-w))
    score  = logit / temperature + gumbel                 temperature 0: score = logit

The winner is the highest score, the lowest id among equals. The hash is exact everywhere; the two logarithms
agree between devices to a few units in the last place.

Where a logit is NaN, or the highest score infinite, the score is infinite and the id `NOT_FINITE`: among several
ranks' winners that one wins. A rank whose slice has nothing to choose scores -inf, with that id too, which stands if no
rank has anything better.
"""

from __future__ import annotations

import torch

MAX_W = 1.0 - 2.0**-24
NOT_FINITE = -2
"""The engine's word for it too (``engine.scheduling.sequence``). -1 is a peer that was lost."""


def splitmix64(state: int) -> int:
    """SplitMix64 (Steele et al., 2014) of 64 bits, from which a row's keys are made."""
    mask = 0xFFFFFFFFFFFFFFFF
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _mix_reference(x: torch.Tensor) -> torch.Tensor:
    """mix() on uint32 values held in int64."""
    mask = 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & mask
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def noise_hash_reference(ids: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor) -> torch.Tensor:
    """h of the definition, as int64; the arguments broadcast (int64 holding uint32 values)."""
    mask = 0xFFFFFFFF
    return _mix_reference(_mix_reference((ids * 0x9E3779B9 + key0) & mask) ^ key1)


def gumbel_reference(hashed: torch.Tensor) -> torch.Tensor:
    """The Gumbel noise of hashes, float32."""
    w = ((hashed.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=MAX_W)
    return -torch.log(-torch.log1p(-w))


def sample_reference(
    logits_TV: torch.Tensor,
    temperatures_T: torch.Tensor,
    keys_T2: torch.Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sampling.sample` in plain torch, on any device: best scores float32 [T] and their token ids int64 [T]."""
    infinity = float("inf")
    width = logits_TV.shape[1]
    ids = torch.arange(vocab_start, vocab_start + width, device=logits_TV.device)
    logits = logits_TV.float()
    noise = gumbel_reference(noise_hash_reference(ids[None, :], keys_T2[:, :1], keys_T2[:, 1:]))
    temperature = temperatures_T.float()[:, None]
    drawn = logits / temperature.where(temperature > 0, torch.ones_like(temperature)) + noise
    scores = torch.where(temperature > 0, drawn, logits)
    if vocab_size is not None:
        scores = scores.masked_fill(ids[None, :] >= vocab_size, -infinity)
    best = scores.masked_fill(scores.isnan(), infinity).max(dim=1).values
    # torch.max does not promise the first of equals.
    first = torch.where(scores == best[:, None], ids[None, :], torch.iinfo(torch.int64).max).min(dim=1).values
    return best, torch.where(best.abs() < infinity, first, NOT_FINITE)
