"""Temperature and Gumbel-max sampling over one rank's slice of the vocabulary.

The noise depends on (row keys, token id) alone, so every rank, batch composition and device draws the same token.
All arithmetic is on uint32 and wraps:

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    h      = mix(mix(id * 0x9E3779B9 + k0) ^ k1)          id is the global token id, (k0, k1) the row's keys
    w      = (float32(h) + 0.5) * 2^-32                   in float32, at most 1 - 2^-24
    gumbel = -log(-log1p(-w))
    score  = logit / temperature + gumbel                 temperature 0: score = logit

The winner is the highest score, the lowest id among equals. The hash is exact everywhere; the two logarithms agree
between devices to a few units in the last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpctl.kernels.launch import launch_options, next_power_of_2

_BLOCK = 2048
_MAX_W = 1.0 - 2.0**-24


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _block_winner_kernel(
    logits_ptr,
    temperatures_ptr,
    keys_ptr,
    best_ptr,
    id_ptr,
    logits_stride,
    width,
    vocab_start,
    vocab_size,
    num_blocks,
    MAX_W: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    local = block * BLOCK + tl.arange(0, BLOCK)
    token = vocab_start + local
    live = (local < width) & (token < vocab_size)
    logit = tl.load(logits_ptr + row * logits_stride + local, mask=live, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    score = logit
    if temperature > 0.0:
        key0 = tl.load(keys_ptr + row * 2).to(tl.uint32)
        key1 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32)
        hashed = _mix(_mix(token.to(tl.uint32) * 0x9E3779B9 + key0) ^ key1)
        w = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, MAX_W)
        # 1 - w would lose a small w's digits: the series keeps them.
        series = w * (1.0 + w * (0.5 + w * (0.33333334 + w * (0.25 + w * 0.2))))
        exponential = tl.where(w < 0.015625, series, -tl.log(1.0 - w))
        # A division rounded correctly, by one refinement of the product with the reciprocal.
        inverse = 1.0 / temperature
        quotient = logit * inverse
        quotient += (logit - quotient * temperature) * inverse
        score = quotient - tl.log(exponential)
    best = tl.max(score, 0)
    winner = tl.min(tl.where((score == best) & live, token, 2147483647), 0)
    tl.store(best_ptr + row * num_blocks + block, best)
    tl.store(id_ptr + row * num_blocks + block, winner)


@triton.jit
def _row_winner_kernel(
    best_ptr, id_ptr, out_score_ptr, out_id_ptr, num_blocks, vocab_start, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    cols = tl.arange(0, BLOCK)
    mask = cols < num_blocks
    score = tl.load(best_ptr + row * num_blocks + cols, mask=mask, other=float("-inf"))
    token = tl.load(id_ptr + row * num_blocks + cols, mask=mask, other=2147483647)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, token, 2147483647), 0)
    # Nothing to choose (a slice of padding alone, or NaN logits): an id that is still in range.
    winner = tl.where(winner == 2147483647, vocab_start, winner)
    tl.store(out_score_ptr + row, best)
    tl.store(out_id_ptr + row, winner.to(tl.int64))


def sample(
    logits_TV: torch.Tensor,
    temperatures_T: torch.Tensor,
    keys_T2: torch.Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's best (score, token id) for every row; the definition is this module's docstring.

    logits_TV: [T, V_rank], any float dtype, columns contiguous. temperatures_T: float32 [T], 0 for greedy. keys_T2: int64
    [T, 2] of uint32 values. vocab_start: the global id of column 0. vocab_size: ids at or above it are padding and never
    win (default: vocab_start + V_rank). Returns scores float32 [T] and ids int64 [T]; a row without any finite candidate
    scores -inf.
    """
    rows, width = logits_TV.shape
    if out is None:
        out = (
            logits_TV.new_empty(rows, dtype=torch.float32),
            logits_TV.new_empty(rows, dtype=torch.int64),
        )
    scores_T, ids_T = out
    if rows == 0:
        return out
    num_blocks = triton.cdiv(width, _BLOCK)
    best = logits_TV.new_empty((rows, num_blocks), dtype=torch.float32)
    ids = logits_TV.new_empty((rows, num_blocks), dtype=torch.int32)
    _block_winner_kernel[(num_blocks, rows)](
        logits_TV,
        temperatures_T,
        keys_T2,
        best,
        ids,
        logits_TV.stride(0),
        width,
        vocab_start,
        vocab_start + width if vocab_size is None else vocab_size,
        num_blocks,
        MAX_W=_MAX_W,
        BLOCK=_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    _row_winner_kernel[(rows,)](
        best,
        ids,
        scores_T,
        ids_T,
        num_blocks,
        vocab_start,
        BLOCK=next_power_of_2(num_blocks),
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out


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
    w = ((hashed.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=_MAX_W)
    return -torch.log(-torch.log1p(-w))


def sample_reference(
    logits_TV: torch.Tensor,
    temperatures_T: torch.Tensor,
    keys_T2: torch.Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` in plain torch, on any device."""
    width = logits_TV.shape[1]
    ids = torch.arange(vocab_start, vocab_start + width, device=logits_TV.device)
    logits = logits_TV.float()
    noise = gumbel_reference(noise_hash_reference(ids[None, :], keys_T2[:, :1], keys_T2[:, 1:]))
    temperature = temperatures_T.float()[:, None]
    drawn = logits / temperature.where(temperature > 0, torch.ones_like(temperature)) + noise
    scores = torch.where(temperature > 0, drawn, logits)
    if vocab_size is not None:
        scores = scores.masked_fill(ids[None, :] >= vocab_size, float("-inf"))
    best = scores.max(dim=1).values
    # torch.max does not promise the first of equals.
    first = torch.where(scores == best[:, None], ids[None, :], torch.iinfo(torch.int64).max).min(dim=1).values
    return best, torch.where(best > float("-inf"), first, torch.full_like(first, vocab_start))
