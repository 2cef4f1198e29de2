"""The two ends of the model, cut by rows of the (padded) vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.distributed import TPGroup
from tpctl.layers.gemm import Gemm, make_gemm
from tpctl.partition.split import Range


class VocabParallelEmbedding(nn.Module):
    """Looks up the rows this rank holds, gives zeros for the others; the sum over ranks is the embedding.

    Args:
        vocab: this rank's rows of the padded vocabulary.
    """

    def __init__(self, vocab: Range, hidden_size: int, group: TPGroup, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vocab = vocab
        self.group = group
        self.weight = nn.Parameter(torch.empty(len(vocab), hidden_size, dtype=dtype), requires_grad=False)

    def local(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]: this rank's summand."""
        if self.group.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.vocab.start
        held = (local >= 0) & (local < len(self.vocab))
        return F.embedding(local.mul_(held), self.weight).mul_(held.unsqueeze(-1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return self.group.all_reduce(self.local(input_ids))


class ParallelLMHead(nn.Module):
    """The output projection: each rank gives the logits of its rows of the vocabulary.

    ``tied`` shares the embedding's parameter, which the shard then stores once, under this layer's name.
    """

    def __init__(self, vocab: Range, hidden_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vocab = vocab
        self.weight = nn.Parameter(torch.empty(len(vocab), hidden_size, dtype=dtype), requires_grad=False)
        self._gemm: Gemm | None = None

    def optimize(self) -> None:
        """Pack a copy of the weight for the device's fastest GEMM; a tied embedding still needs the plain rows."""
        self._gemm = make_gemm(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[R, H] -> [R, V] in the model's dtype; columns past the real vocabulary are padding."""
        if self._gemm is not None:
            return self._gemm(x, None)
        return F.linear(x, self.weight)
