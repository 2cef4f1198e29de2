"""The two ends of the model, cut by rows of the (padded) vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.arch.held import HeldLinear
from tpctl.distributed import TPGroup
from tpctl.layers.linear import ColumnParallelLinear
from tpctl.layers.module import Layer
from tpctl.layers.norm import RMSNorm
from tpctl.partition.cuts import Range


class VocabParallelEmbedding(Layer):
    """Looks up the rows this rank holds, gives zeros for the others; the sum over ranks is the embedding.

    Args:
        vocab: this rank's rows of the padded vocabulary.
        scale: what a row is multiplied by; ``rounded``: to the weight's dtype first (Gemma's root of the hidden size).
    """

    def __init__(
        self,
        vocab: Range,
        hidden_size: int,
        group: TPGroup,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.group = group
        self.scale = float(torch.tensor(scale, dtype=dtype, device="cpu")) if rounded else scale
        self.weight = nn.Parameter(torch.empty(len(vocab), hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]: this rank's summand."""
        if self.group.size == 1:
            rows = F.embedding(input_ids, self.weight)
        else:
            local = input_ids - self.vocab.start
            held = (local >= 0) & (local < len(self.vocab))
            rows = F.embedding(local.mul_(held), self.weight).mul_(held.unsqueeze(-1))
        return rows if self.scale == 1.0 else rows.mul_(self.scale)


class ParallelLMHead(ColumnParallelLinear):
    """The output projection: each rank gives the logits of its rows of the vocabulary, [R, V] in the model's dtype;
    columns past the real vocabulary are padding.

    Args:
        scale: what logits are multiplied by.
        softcap: a logit l then becomes softcap * tanh(l / softcap).
    """

    def __init__(
        self,
        held: HeldLinear,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(held, dtype)
        self.scale = scale
        self.softcap = softcap

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[R, H] -> [R, V]."""
        logits = super().forward(x, norm)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
