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
from tpctl.wire.sampling import SamplingParams

CANDIDATES = 256
"""How many of its largest logits a rank offers for a top-p set before whole rows are gathered."""


def nucleus_floor(scaled_RV: Tensor, params: Sequence[SamplingParams], group: TPGroup, widest: int) -> Tensor:
    """Floors [R] of top-k, then top-p over what top-k leaves (Holtzman et al., 2019).

    Args:
        scaled_RV: this rank's logits divided by the temperature, float32.
        widest: the largest V over the ranks.
    """
    device = scaled_RV.device
    wanted = min(max([CANDIDATES, *(p.top_k for p in params)]), widest)
    values = _gather_largest(scaled_RV, wanted, group)
    if wanted < widest:  # beyond this many, a rank may hold values that it did not offer
        values = values[:, :wanted]
    total = group.all_gather(scaled_RV.logsumexp(-1)).logsumexp(0)
    top_k = torch.tensor([p.top_k for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    floors, reached = _floors(values, total, top_k, top_p)
    flat = (~reached).nonzero().flatten()
    if len(flat) and wanted < widest:
        whole = _gather_largest(scaled_RV[flat], widest, group)
        floors[flat] = _floors(whole, total[flat], top_k[flat], top_p[flat])[0]
    return floors


def min_p_floor(scaled_RV: Tensor, params: Sequence[SamplingParams], group: TPGroup) -> Tensor:
    """Floors [R] of min-p: the largest logit plus log(min_p), or -inf where unset (Nguyen et al., 2024)."""
    largest = group.all_reduce_max(scaled_RV.max(-1).values)
    offset = [math.log(p.min_p) if p.min_p and not p.greedy else float("-inf") for p in params]
    return largest + torch.tensor(offset, device=largest.device)


def _floors(descending_RC: Tensor, total_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's floor from its largest values, and whether they reach far enough to hold its set; -inf if not.

    ``total_R`` is the log of the sum of exponentials over the whole row.
    """
    count = descending_RC.shape[1]
    limited = top_k_R > 0
    k = torch.where(limited, top_k_R.clamp(max=count), count).unsqueeze(1)
    values = descending_RC.double()
    kept = torch.arange(count, device=values.device) < k
    values = values.where(kept, float("-inf"))
    mass = torch.where(limited, values.logsumexp(-1), total_R.double()).unsqueeze(1)
    enough = kept & (torch.cumsum((values - mass).exp(), -1) >= top_p_R.unsqueeze(1)) & (top_p_R < 1).unsqueeze(1)
    ends = enough.any(-1)
    # With top-k the sum can end a rounding error below 1; without it, the set goes on beyond these values.
    at = torch.where(ends, enough.int().argmax(-1), k.squeeze(1) - 1).unsqueeze(1)
    floors = descending_RC.gather(1, at).squeeze(1)
    reached = ends | limited
    return floors.where(reached, float("-inf")), reached


def _gather_largest(scaled: Tensor, count: int, group: TPGroup) -> Tensor:
    """The ``count`` largest values of each row and rank (-inf where a rank has fewer), together, descending."""
    mine = torch.full((scaled.shape[0], count), float("-inf"), device=scaled.device)
    held = min(count, scaled.shape[1])
    mine[:, :held] = scaled.topk(held, dim=-1).values
    return group.all_gather(mine).transpose(0, 1).flatten(1).sort(dim=-1, descending=True).values
