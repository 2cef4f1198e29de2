"""What the kernels for attention are held against has in common."""

from __future__ import annotations

import torch


def softcap_reference(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores s as softcap * tanh(s / softcap); ``None``: as they are."""
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def softmax_reference(scores_NL: torch.Tensor, sinks_N: torch.Tensor | None) -> torch.Tensor:
    """The weights of scores [N, .., L], whose sums `sinks_N` joins."""
    if sinks_N is None:
        return scores_NL.softmax(-1)
    sinks = sinks_N.to(scores_NL.dtype).view(-1, *(1,) * (scores_NL.dim() - 1)).expand(*scores_NL.shape[:-1], 1)
    return torch.cat([scores_NL, sinks], dim=-1).softmax(-1)[..., :-1]
