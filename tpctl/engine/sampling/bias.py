"""What requests want added to the logits of some tokens (``logit_bias`` of OpenAI's API)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpctl.wire.sampling import SamplingParams


def add_bias(logits_RV: Tensor, params: Sequence[SamplingParams], first: int, real: int) -> None:
    """Add each row's biases in place, before penalties and temperature.

    Args:
        logits_RV: this rank's logits, float32, for the ``real`` tokens from ``first`` on.
    """
    rows: list[int] = []
    counts: list[int] = []
    columns: list[Tensor] = []
    biases: list[Tensor] = []
    for row, wanted in enumerate(params):
        if not wanted.logit_bias:
            continue
        tokens, values = wanted.biases(first, real)
        if tokens:
            rows.append(row)
            counts.append(len(tokens))
            columns.append(torch.frombuffer(tokens, dtype=torch.int64))
            biases.append(torch.frombuffer(values, dtype=torch.float32))
    if rows:
        row_N = torch.tensor(rows).repeat_interleave(torch.tensor(counts))
        at = row_N.to(logits_RV.device), (torch.cat(columns) - first).to(logits_RV.device)
        logits_RV[at] += torch.cat(biases).to(logits_RV)
