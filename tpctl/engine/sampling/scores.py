"""Scores of a prompt's own tokens over a divided vocabulary, and whole distributions kept in, or read from, a file.

No rank ever has a whole row: each writes and reads its own columns of the file, and what travels between ranks are one
or two numbers a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tpctl.engine.sampling.sampler import Sampler
from tpctl.wire.scoring import Scoring, TokenScore

ELEMENTS = 1 << 22
"""Of a rank's logits that are looked at together: some 150 MB of float64 and float32."""


def rows_together(widest: int) -> int:
    """Rows of logits that are computed and looked at together, of which no rank has more than ``widest`` columns."""
    return max(1, ELEMENTS // widest)


def score_rows(
    logits_RV: Tensor, targets_R: Tensor, sampler: Sampler, vocab_size: int, scoring: Scoring, place: int
) -> list[TokenScore]:
    """One entry a row, the same on every rank (collective).

    Args:
        logits_RV: this rank's logits in any float dtype, padding columns included.
        targets_R: int64, the tokens that did come, global ids.
        place: that of the first one in its prompt.
    """
    row = scoring.row + place - scoring.first
    group, first, real = sampler.group, sampler.first, sampler.real
    logits = logits_RV[:, : max(real, 1)].double()
    if real == 0:
        logits = torch.full_like(logits, float("-inf"))
    total = group.all_gather(logits.logsumexp(-1)).logsumexp(0)
    # Rounded as they are kept, so that a model does not differ from itself.
    logprobs_RV = (logits - total.unsqueeze(-1)).float()
    local = targets_R - first
    held = (local >= 0) & (local < real)
    mine = logprobs_RV.gather(-1, local.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    chosen: list[float] = group.all_gather(mine.masked_fill(~held, float("-inf"))).amax(0).tolist()
    if scoring.keep is not None and real:
        _columns(scoring.keep, "r+", scoring.rows, vocab_size, row, len(chosen), first, real)[:] = (
            logprobs_RV.cpu().numpy()
        )
    if scoring.against is None:
        return [TokenScore(value) for value in chosen]
    kept_RV = torch.full_like(logprobs_RV, float("-inf"))
    if real:
        kept = _columns(scoring.against, "r", scoring.rows, vocab_size, row, len(chosen), first, real)
        kept_RV = torch.from_numpy(np.array(kept)).to(logprobs_RV.device)
    divergences = group.all_gather(_partial_divergence(kept_RV, logprobs_RV)).sum(0).tolist()
    same = (_likeliest(kept_RV, sampler) == _likeliest(logprobs_RV, sampler)).tolist()
    return [TokenScore(*values) for values in zip(chosen, divergences, same, strict=True)]


def _partial_divergence(kept_RV: Tensor, own_RV: Tensor) -> Tensor:
    """This rank's part of the sum over the vocabulary, float64 [R]."""
    kept, own = kept_RV.double(), own_RV.double()
    return torch.where(kept > float("-inf"), kept.exp() * (kept - own), 0.0).sum(-1)


def _likeliest(logprobs_RV: Tensor, sampler: Sampler) -> Tensor:
    """The likeliest token of each row over all ranks, int64 [R]; of several the lowest id."""
    best = logprobs_RV.max(-1, keepdim=True).values
    # The first one, which argmax does not promise.
    places = torch.arange(logprobs_RV.shape[1], device=logprobs_RV.device).expand_as(logprobs_RV)
    index = places.masked_fill(logprobs_RV < best, logprobs_RV.shape[1]).amin(-1)
    return sampler.agree(best.squeeze(-1), index + sampler.first)


def _columns(
    file: str, mode: str, rows: int, vocab_size: int, row: int, count: int, first: int, real: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A rank's columns of ``count`` rows of a file. Mapped anew each time: what stays mapped counts as memory."""
    whole = np.memmap(file, dtype=np.float32, mode=mode, shape=(rows, vocab_size))  # type: ignore[call-overload]
    return whole[row : row + count, first : first + real]  # type: ignore[no-any-return]
