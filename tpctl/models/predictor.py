"""The layer that predicts the token behind the next one (``arch.predictor``), beside a decoder whose embedding and head
it shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpctl.arch import predictor
from tpctl.arch.held import Hold
from tpctl.distributed import TPGroup
from tpctl.layers.attention.base import AttentionPlan, LayerKV
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute import Compute
from tpctl.layers.linear import RowParallelLinear
from tpctl.layers.module import Layer
from tpctl.layers.norm import RMSNorm


class Predictor(Layer):
    """Norms, projection and a block; named ``mtp`` in a shard.

    The projection is cut along its inputs, so that what enters the block is a sum over the ranks, as embeddings are.

    Args:
        layer: the block, a ``DecoderLayer``.
    """

    def __init__(
        self, made_of: predictor.Predictor, hold: Hold, layer: Layer, group: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = RMSNorm.of(made_of.embedding_norm, dtype)
        self.pre_fc_norm_hidden = RMSNorm.of(made_of.hidden_norm, dtype)
        self.fc = RowParallelLinear(hold(made_of.projection), group, dtype)
        self.layers = nn.ModuleList([layer])
        self.norm = RMSNorm.of(made_of.norm, dtype)

    def forward(
        self,
        embedded_TH: Tensor,
        states_TH: Tensor,
        compute: Compute,
        batch: ForwardBatch,
        kv: LayerKV,
        plan: AttentionPlan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[T, H] or [R, H], normed: what the head makes logits of, and what stands for the state a token further.

        Args:
            embedded_TH: of the tokens that follow, whole on every rank.
            states_TH: of the tokens, normed, or what this has made of those before.
            rows: int64 [R], as of ``DecoderLayer``.
        """
        norms = (embedded_TH, self.pre_fc_norm_embedding), (states_TH, self.pre_fc_norm_hidden)
        joined = torch.cat([compute.normed(*one) for one in norms], dim=-1)
        own = self.fc.held.inputs
        stream = compute.begin(self.fc.local(joined[:, own.start : own.stop].contiguous()), batch)
        self.layers[0](stream, kv, plan, rows)
        if rows is not None and not len(rows):
            return states_TH[:0]
        return compute.normed(*stream.normed(self.norm))
