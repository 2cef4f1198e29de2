"""Top-k, top-p and min-p as floors: the smallest scaled logit of a row that may still be sampled.

A floor can be found from the ranks' largest logits alone, and applied by each rank to its own slice. Tokens that tie
with the last one kept are kept too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.engine.sampling_params import SamplingParams

CANDIDATES = 256
"""How many of its largest logits a rank offers for a top-p set before whole rows are gathered."""


def nucleus_floor(scaled_RV: Tensor, params: Sequence[SamplingParams], group: TPGroup, widest: int) -> Tensor:
    """Floors [R] of top-k, then top-p over what top-k leaves (Holtzman et al., 2019).

    Args:
        scaled_RV: this rank's logits divided by the temperature, float32.
        widest: the largest V over the ranks.
    """
    wanted = min(max([CANDIDATES, *(p.top_k for p in params)]), widest)
    values = _gather_largest(scaled_RV, wanted, group)
    if wanted < widest:  # beyond this many, a rank may hold values that it did not offer
        values = values[:, :wanted]
    total = group.all_gather(scaled_RV.logsumexp(-1)).logsumexp(0)
    floors = [_floor(values[row], total[row], p) for row, p in enumerate(params)]
    flat = [row for row, floor in enumerate(floors) if floor is None]
    if flat and wanted < widest:
        whole = _gather_largest(scaled_RV[flat], widest, group)
        for index, row in enumerate(flat):
            floors[row] = _floor(whole[index], total[row], params[row])
    return torch.stack([total.new_tensor(float("-inf")) if floor is None else floor for floor in floors])


def min_p_floor(scaled_RV: Tensor, params: Sequence[SamplingParams], group: TPGroup) -> Tensor:
    """Floors [R] of min-p: the largest logit plus log(min_p), or -inf where unset (Nguyen et al., 2024)."""
    largest = group.all_reduce_max(scaled_RV.max(-1).values)
    offset = [math.log(p.min_p) if p.min_p and not p.greedy else float("-inf") for p in params]
    return largest + torch.tensor(offset, device=largest.device)


def _floor(descending: Tensor, total: Tensor, params: SamplingParams) -> Tensor | None:
    """The floor of one row from its largest values; ``None`` if they do not reach far enough to hold the top-p set.

    ``total`` is the log of the sum of exponentials over the whole row.
    """
    k = min(params.top_k or len(descending), len(descending))
    kept = descending[:k]
    if params.top_p >= 1.0:
        return kept[-1] if params.top_k else None
    mass = kept.double().logsumexp(0) if params.top_k else total.double()
    reached = torch.cumsum((kept.double() - mass).exp(), 0)
    enough = (reached >= params.top_p).nonzero()
    if len(enough):
        return kept[enough[0, 0]]
    # With top-k the sum can end a rounding error below 1; without it, the set goes on beyond these values.
    return kept[-1] if params.top_k else None


def _gather_largest(scaled: Tensor, count: int, group: TPGroup) -> Tensor:
    """The ``count`` largest values of each row and rank (-inf where a rank has fewer), together, descending."""
    mine = torch.full((scaled.shape[0], count), float("-inf"), device=scaled.device)
    held = min(count, scaled.shape[1])
    mine[:, :held] = scaled.topk(held, dim=-1).values
    return group.all_gather(mine).transpose(0, 1).flatten(1).sort(dim=-1, descending=True).values
