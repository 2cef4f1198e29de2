"""Logits of tokens that came before, lowered.

Repetition (Keskar et al., "CTRL", 2019): of the prompt and the answer, those of tokens seen are divided by the penalty,
or multiplied if negative. Then, of the answer alone, the presence penalty and as many frequency penalties as a token
occurs are taken away, as OpenAI's API defines them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tpctl.engine.scheduling.token_counts import Counted
from tpctl.wire.sampling import SamplingParams


def penalize(
    logits_RV: Tensor, params: Sequence[SamplingParams], counted: Mapping[int, Counted], first: int, real: int
) -> None:
    """Lower logits in place, in the rows of which tokens are ``counted``, with a few operations for all of them.

    Args:
        logits_RV: this rank's logits, float32 and contiguous, for the ``real`` tokens from ``first`` on.
    """
    flat = logits_RV.view(-1)
    repeated = [row for row, one in counted.items() if params[row].repetition_penalty != 1.0 and one.seen]
    if repeated:
        places, held, lengths = _places(repeated, [counted[row].seen for row in repeated], logits_RV, first, real)
        factors = torch.tensor([params[row].repetition_penalty for row in repeated], dtype=flat.dtype)
        factor = factors.repeat_interleave(lengths)[held].to(flat.device)
        values = flat.gather(0, places)
        flat.scatter_(0, places, torch.where(values > 0, values / factor, values * factor))
    lowered = [row for row, one in counted.items() if _lowers(params[row]) and one.answered]
    if lowered:
        places, held, lengths = _places(lowered, [counted[row].answered for row in lowered], logits_RV, first, real)
        ways = [(params[row].frequency_penalty, params[row].presence_penalty) for row in lowered]
        frequency, presence = torch.tensor(ways, dtype=torch.float64).repeat_interleave(lengths, 0).unbind(1)
        minus = (frequency * _joined([counted[row].times for row in lowered]) + presence)[held].to(flat)
        flat.scatter_(0, places, flat.gather(0, places) - minus)


def _lowers(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _places(
    rows: Sequence[int], tokens: Sequence[array[int]], logits_RV: Tensor, first: int, real: int
) -> tuple[Tensor, Tensor | slice, Tensor]:
    """Where the tokens of some rows stand in all logits behind each other, int64, as far as this rank has them; which
    of them all these are; and, int64, how many tokens each row has, with those that other ranks have."""
    lengths = torch.tensor([len(one) for one in tokens])
    columns = _joined(tokens) - first
    begins = torch.tensor(rows) * logits_RV.shape[1]
    own = (columns >= 0) & (columns < real)
    held = slice(None) if own.all() else own
    return (begins.repeat_interleave(lengths) + columns)[held].to(logits_RV.device), held, lengths


def _joined(arrays: Sequence[array[int]]) -> Tensor:
    """A copy, int64: what a tensor is of, an array can put nothing behind."""
    return torch.cat([torch.frombuffer(one, dtype=torch.int64) for one in arrays])
