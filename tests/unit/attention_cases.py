"""Attention written out, and batches to hold it against."""

from __future__ import annotations

import torch
from torch import Tensor

from tpctl.layers.attention.base import AttentionSpec

BLOCK = 8

CASES: dict[str, list[tuple[int, int]]] = {  # (new tokens, tokens in all) of each sequence, decodes first
    "decodes of one length": [(1, 30), (1, 31), (1, 29)],
    "decodes of many lengths": [(1, 3), (1, 90), (1, 40), (1, 9)],
    "prompts longer than a block of queries": [(150, 150), (150, 150), (150, 150)],
    "chunks over a cached prefix": [(70, 200), (70, 200), (5, 77)],
    "short runs over prefixes of many lengths": [
        (1, 30),
        (2, 31),
        (16, 99),
        (5, 9),
        (13, 90),
        (3, 33),
        (9, 64),
        (17, 70),
    ],
    "all together": [(1, 60), (1, 1), (130, 130), (64, 65), (2, 120)],
}

SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0, -8.0, 1.0])


def written_out(q_ND: Tensor, k_LKD: Tensor, v_LKD: Tensor, spec: AttentionSpec) -> Tensor:
    """[N, D]: the last token of the L over the keys that it may see, and ``SINKS`` where the spec has some."""
    first = 0 if spec.window is None else max(0, len(k_LKD) - spec.window)
    group = q_ND.shape[0] // k_LKD.shape[1]
    heads = []
    for head, q_D in enumerate(q_ND.double()):
        keys, values = k_LKD[first:, head // group].double(), v_LKD[first:, head // group].double()
        scores = (keys @ q_D) * spec.scale
        scores = scores if spec.softcap is None else (scores / spec.softcap).tanh() * spec.softcap
        weights = scores.exp()
        weights = weights / (weights.sum() + (SINKS[head].double().exp() if spec.sinks else 0))
        heads.append(weights @ values)
    return torch.stack(heads)
