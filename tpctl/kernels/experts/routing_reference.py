"""Routing in plain torch, on any device (no triton needed): what CPUs run, and the reference of the kernel.

Shape suffixes: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

import torch

from tpctl.arch.routing import Routing


def route(
    logits_TE: torch.Tensor, routing: Routing, per_token: int, correction_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token, best first, and their weights (``arch.routing`` has the definition).

    logits_TE: [T, E] of any float dtype, the bias of the router's linear included. correction_E: added to the scores
    for the choice alone. Computed in float32. Returns ids int32 [T, K] and weights float32 [T, K].
    """
    logits = logits_TE.float()
    if routing.scores == "softmax":
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() if routing.scores == "sigmoid" else logits
    choice = scores if correction_E is None else scores + correction_E.float()
    if routing.top_groups < routing.groups:
        choice = _within_groups(choice, routing.groups, routing.top_groups)
    ids = _best(choice, per_token)
    weights = scores.gather(-1, ids)
    if routing.scores == "softmax of chosen":
        weights = weights.softmax(-1)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + routing.epsilon)
    return ids.int(), weights * routing.scale


def _within_groups(choice_TE: torch.Tensor, groups: int, top_groups: int) -> torch.Tensor:
    """``choice_TE`` with -inf for the experts of all but the best groups."""
    grouped = choice_TE.unflatten(-1, (groups, -1))
    totals = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, _best(totals, top_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest are, equal ones in order; ``torch.topk`` does not promise that."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
