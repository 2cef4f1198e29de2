"""Temperature and Gumbel-max sampling over one rank's slice of the vocabulary; `noise` has the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.noise import MAX_W, NOT_FINITE, sample_reference

__all__ = ["sample", "sample_reference"]

_BLOCK = 2048
_NONE = tl.constexpr(2147483647)  # no token's id
_NOT_FINITE = tl.constexpr(NOT_FINITE)
# Triton's interpreter has no device library.
_FAST = not triton.knobs.runtime.interpret


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _hash(token, key0, key1):
    return _mix(_mix(token.to(tl.uint32) * 0x9E3779B9 + key0) ^ key1)


@triton.jit
def _uniform(token, key0, key1, MAX_W: tl.constexpr):
    return tl.minimum((_hash(token, key0, key1).to(tl.float32) + 0.5) * 2.3283064365386963e-10, MAX_W)


@triton.jit
def _score(logit, token, temperature, key0, key1, MAX_W: tl.constexpr):
    w = _uniform(token, key0, key1, MAX_W)
    # 1 - w would lose a small w's digits: the series keeps them.
    series = w * (1.0 + w * (0.5 + w * (0.33333334 + w * (0.25 + w * 0.2))))
    exponential = tl.where(w < 0.015625, series, -tl.log(1.0 - w))
    # A division rounded correctly, by one refinement of the product with the reciprocal.
    inverse = 1.0 / temperature
    quotient = logit * inverse
    quotient += (logit - quotient * temperature) * inverse
    return quotient - tl.log(exponential)


@triton.jit
def _upper_bound(logit, token, temperature, key0, key1, FAST: tl.constexpr):
    """What `_score` cannot exceed but by rounding (1e-3), and for small w nearly is, at half the cost.

    -log1p(-w) is at least w. The hardware's logarithm is good to about 2^-21; 22.18... is log(2^32).
    """
    hashed = _hash(token, key0, key1).to(tl.float32) + 0.5
    log2 = libdevice.fast_log2f(hashed) if FAST else tl.log2(hashed)
    return logit * (1.0 / temperature) + (22.18070977791825 - 0.6931471805599453 * log2)


@triton.jit
def _best(score, token, live):
    best = tl.max(score, 0)
    return best, tl.min(tl.where((score == best) & live, token, _NONE), 0)


@triton.jit
def _block_winner_kernel(
    logits_ptr,
    temperatures_ptr,
    keys_ptr,
    floors_ptr,
    best_ptr,
    id_ptr,
    logits_stride,
    width,
    vocab_start,
    vocab_size,
    num_blocks,
    MAX_W: tl.constexpr,
    FAST: tl.constexpr,
    FLOORS: tl.constexpr,
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
    logit = tl.where(logit == logit, logit, float("inf"))  # so that it passes every floor and wins
    if FLOORS:
        live &= logit >= tl.load(floors_ptr + row)
        logit = tl.where(live, logit, float("-inf"))
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if temperature > 0.0:
        key0 = tl.load(keys_ptr + row * 2).to(tl.uint32)
        key1 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32)
        # The token with the highest bound wins where no other bound reaches its exact score, which is nearly always.
        bound = _upper_bound(logit, token, temperature, key0, key1, FAST)  # -inf where there is no token
        top = tl.max(bound, 0)
        winner = tl.min(tl.where(bound == top, token, _NONE), 0)
        its_logit = tl.load(logits_ptr + row * logits_stride + winner - vocab_start, mask=winner < _NONE, other=0.0)
        best = _score(its_logit.to(tl.float32), winner, temperature, key0, key1, MAX_W)
        near = tl.sum((bound >= best - (1e-3 + 1e-6 * tl.abs(top))).to(tl.int32), 0)
        if tl.abs(top) == float("inf"):  # no token, or one that is no number
            best = top
            winner = tl.full([], _NONE, tl.int32)
        elif near != 1:
            score = tl.where(live, _score(logit, token, temperature, key0, key1, MAX_W), float("-inf"))
            best, winner = _best(score, token, live)
    else:
        best, winner = _best(logit, token, live)
    tl.store(best_ptr + row * num_blocks + block, best)
    tl.store(id_ptr + row * num_blocks + block, winner)


@triton.jit
def _row_winner_kernel(best_ptr, id_ptr, out_score_ptr, out_id_ptr, num_blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    cols = tl.arange(0, BLOCK)
    mask = cols < num_blocks
    score = tl.load(best_ptr + row * num_blocks + cols, mask=mask, other=float("-inf"))
    token = tl.load(id_ptr + row * num_blocks + cols, mask=mask, other=_NONE)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, token, _NONE), 0)
    winner = tl.where(tl.abs(best) < float("inf"), winner, _NOT_FINITE)
    tl.store(out_score_ptr + row, best)
    tl.store(out_id_ptr + row, winner.to(tl.int64))


def sample(
    logits_TV: torch.Tensor,
    temperatures_T: torch.Tensor,
    keys_T2: torch.Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    floors_T: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's best (score, token id) for every row; `noise` defines the score.

    logits_TV: [T, V_rank], any float dtype, columns contiguous. temperatures_T: float32 [T], 0 for greedy.
    keys_T2: int64 [T, 2] of uint32 values. vocab_start: the global id of column 0. vocab_size: ids at or
    above it are padding and never win (default: vocab_start + V_rank). floors_T: float32 [T], the smallest logits that
    may win (`floors.sampling_floors`). Returns scores float32 [T] and ids int64 [T]; a row without a finite best score
    has the id `NOT_FINITE`.
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
        temperatures_T if floors_T is None else floors_T,
        best,
        ids,
        logits_TV.stride(0),
        width,
        vocab_start,
        vocab_start + width if vocab_size is None else vocab_size,
        num_blocks,
        MAX_W=MAX_W,
        FAST=_FAST,
        FLOORS=floors_T is not None,
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
        BLOCK=next_power_of_2(num_blocks),
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
