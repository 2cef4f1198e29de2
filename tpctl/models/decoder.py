"""The decoder that every supported family is an instance of, built from ``ModelConfig`` and the partition plan.

One block, with its two all-reduces (column-parallel in, row-parallel out, twice):

    residual ─┬───────────────────────────────────(+)─┬──────────────────────────────────(+)──
              └ norm ─ qkv_proj ─ attention ─ o_proj ─┘└ norm ─ gate_up ─ silu*up ─ down_proj ┘
                       column      heads      row  all-reduce   column             row    all-reduce

In code each all-reduce sits in the norm that follows it (``RMSNorm.reduce_add``), since reducing, adding to the
residual and normalising are one pass over the same rows. A block therefore takes and returns partial sums.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tpctl.arch.config import ModelConfig
from tpctl.distributed import TPGroup
from tpctl.layers.attention.attention import Attention
from tpctl.layers.attention.base import AttentionBackend, HeadShape, LayerKV
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tpctl.layers.linear import GatedParallelLinear, ReplicatedLinear, RowParallelLinear
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable
from tpctl.partition.plan import PartitionPlan


def head_shape(config: ModelConfig, plan: PartitionPlan, rank: int) -> HeadShape:
    """The attention heads that ``rank`` holds."""
    share = plan.heads[rank]
    return HeadShape(len(share.query), len(share.kv), config.head_dim, config.head_dim**-0.5)


class MLP(nn.Module):
    """Gated MLP: merged gate and up (column-parallel), SiLU, down (row-parallel)."""

    def __init__(
        self, hidden_size: int, width: int, group: TPGroup, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.gate_up_proj = GatedParallelLinear(hidden_size, width, bias, dtype)
        self.down_proj = RowParallelLinear(width, hidden_size, group, bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> this rank's partial sum [T, H]."""
        return self.down_proj.partial(self.gate_up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms; takes and returns partial sums, and updates the residual in place."""

    def __init__(
        self,
        config: ModelConfig,
        plan: PartitionPlan,
        layer: int,
        backend: AttentionBackend,
        rotary: RotaryTable,
        group: TPGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        width = plan.shape(group.rank, f"model.layers.{layer}.mlp.down_proj.weight")[1]
        self.input_layernorm = RMSNorm(hidden, eps, group, dtype)
        self.self_attn = Attention(
            hidden,
            backend,
            rotary,
            group,
            window=config.windows[layer],
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm_eps=eps if config.family.qk_norm else None,
            dtype=dtype,
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps, group, dtype)
        self.mlp = MLP(hidden, width, group, config.mlp_bias, dtype)

    def forward(
        self,
        partial: Tensor | None,
        residual: Tensor,
        kv: LayerKV,
        batch: ForwardBatch,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This block's sums, not yet reduced, and the residual that they belong to.

        Args:
            partial: the previous block's sums, [T, H]; ``None`` in the first block.
            residual: [T, H], which ``partial`` is added to in place.
            rows: int64 [R], the only rows of T that are still wanted; ``None``: all. The keys and values of the
                others are stored all the same.

        Returns:
            Two times [R, H].
        """
        norm = self.input_layernorm
        x = norm(residual) if partial is None else norm.reduce_add(partial, residual)
        partial = self.self_attn(x, kv, batch, rows)
        if rows is not None:
            residual = residual[rows]
        x = self.post_attention_layernorm.reduce_add(partial, residual)
        return self.mlp(x), residual


class Backbone(nn.Module):
    """Embedding, blocks and the last norm; named ``model`` in a checkpoint."""

    layers: list[DecoderLayer]

    def __init__(self, embedding: VocabParallelEmbedding, layers: Iterable[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = norm


class Decoder(nn.Module):
    """A decoder-only transformer; parameter names are those of the shard folder."""

    def __init__(
        self,
        config: ModelConfig,
        plan: PartitionPlan,
        backend: AttentionBackend,
        rotary: RotaryTable,
        group: TPGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        vocab = plan.vocab_slices[group.rank]
        self.model = Backbone(
            VocabParallelEmbedding(vocab, config.hidden_size, group, dtype),
            (DecoderLayer(config, plan, layer, backend, rotary, group, dtype) for layer in range(config.num_layers)),
            RMSNorm(config.hidden_size, config.rms_norm_eps, group, dtype),
        )
        self.lm_head = ParallelLMHead(vocab, config.hidden_size, dtype)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Let the embedding read the head's parameter: the shard stores the tied weight once, as ``lm_head``."""
        self.model.embed_tokens.weight = self.lm_head.weight

    def forward(self, batch: ForwardBatch, kv: list[LayerKV], rows: Tensor | None = None) -> Tensor:
        """Final hidden states, normed, the same on every rank.

        Args:
            rows: int64 [R], the only rows of T that are wanted; the last block then spares the others what follows
                its attention. ``None``: all.

        Returns:
            [T, H] or [R, H].
        """
        residual: Tensor = self.model.embed_tokens(batch.input_ids)
        partial: Tensor | None = None
        last = len(kv) - 1
        for index, (layer, layer_kv) in enumerate(zip(self.model.layers, kv, strict=True)):
            partial, residual = layer(partial, residual, layer_kv, batch, rows if index == last else None)
        assert partial is not None
        return self.model.norm.reduce_add(partial, residual)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, H] -> this rank's slice of the logits [R, V], in the model's dtype."""
        return self.lm_head(hidden_RH)  # type: ignore[no-any-return]

    def optimize(self) -> None:
        """Once, after loading: pack weights for the device."""
        for module in self.modules():
            if isinstance(module, ReplicatedLinear | ParallelLMHead):
                module.optimize()
