"""Log-probabilities of the model's own distribution (before temperature, penalties and filters)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.wire.report import TokenLogprob


def report_logprobs(
    logits_RV: Tensor, chosen_R: Tensor, first: int, widest: int, wanted_R: Sequence[int | None], group: TPGroup
) -> list[TokenLogprob | None]:
    """One entry a row, with so many likeliest tokens as ``wanted_R`` says; ``None`` for one that wants none.

    Args:
        logits_RV: this rank's raw logits, float32, for the tokens from ``first`` on.
        chosen_R: the chosen token ids, global.
        widest: the largest V over the ranks.
    """
    total = _normalizer(logits_RV, group)
    local = chosen_R - first
    held = (local >= 0) & (local < logits_RV.shape[1])
    mine = logits_RV.gather(-1, local.clamp(0, logits_RV.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    chosen = group.all_reduce_max(torch.where(held, mine, float("-inf"))).double() - total

    wanted = max(number or 0 for number in wanted_R)
    count = min(wanted, widest)
    chances: list[float] = chosen.tolist()
    tops: list[list[list[float]]] = [[]] * len(wanted_R)
    if count:
        mine = torch.full((len(wanted_R), count, 2), float("-inf"), dtype=torch.float64, device=logits_RV.device)
        values, ids = logits_RV.topk(min(count, logits_RV.shape[1]), dim=-1)
        mine[:, : values.shape[1], 0] = values.double()
        mine[:, : values.shape[1], 1] = (ids + first).double()
        pairs = group.all_gather(mine)
        merged = pairs.permute(1, 0, 2, 3).flatten(1, 2)  # [R, ranks * count, 2], lower ids first among equals
        order = merged[..., 0].sort(dim=-1, descending=True, stable=True).indices[:, :wanted]
        best = merged.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
        best[..., 0] -= total.unsqueeze(-1)
        tops = best.tolist()
    return [
        None
        if number is None
        else TokenLogprob(chance, [(int(id), value) for value, id in top[:number] if value > float("-inf")])
        for chance, top, number in zip(chances, tops, wanted_R, strict=True)
    ]


def _normalizer(logits_RV: Tensor, group: TPGroup) -> Tensor:
    """The log of the sum of exponentials over all ranks, float64 [R].

    Added to the largest logit in float64: rounded to float32, as ``logsumexp`` does, it would be off by 1e-6 where
    logits are about 20, of every token of a text to the same side.
    """
    largest = logits_RV.amax(-1)
    base = torch.where(largest.isfinite(), largest, 0.0)
    sums = (logits_RV - base.unsqueeze(-1)).exp_().sum(-1)
    parts = group.all_gather(torch.stack((largest, sums))).double()  # [ranks, 2, R]
    top = parts[:, 0].amax(0)
    return top + ((parts[:, 0] - top).exp() * parts[:, 1]).sum(0).log()
