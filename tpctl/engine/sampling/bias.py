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
    columns: list[int] = []
    biases: list[float] = []
    for row, wanted in enumerate(params):
        for token, bias in wanted.logit_bias:
            if 0 <= token - first < real:
                rows.append(row)
                columns.append(token - first)
                biases.append(bias)
    if rows:
        at = torch.tensor(rows, device=logits_RV.device), torch.tensor(columns, device=logits_RV.device)
        logits_RV[at] += torch.tensor(biases, dtype=logits_RV.dtype, device=logits_RV.device)
