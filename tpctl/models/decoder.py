"""The decoder that every supported family is an instance of, built from a blueprint and the partition plan.

One block, with its two all-reduces (column-parallel in, row-parallel out, twice):

    residual ─┬───────────────────────────────────(+)─┬─────────────────────────────────(+)──
              └ norm ─ qkv_proj ─ attention ─ o_proj ─┘└ norm ─ gate_up ─ act*up ─ down_proj ┘
                       column      heads      row  all-reduce   column            row    all-reduce

The residual stream takes each all-reduce together with the addition and the norm around it, and the linears multiply
as their device does best (``layers.compute``): this is the only forward pass there is, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpctl.arch import block as blocks
from tpctl.arch import delta_net, latent, linear
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.held import HeldLinear, Hold
from tpctl.arch.predictor import BLOCK, PREFIX
from tpctl.distributed import TPGroup
from tpctl.layers.attention.attention import Attention
from tpctl.layers.attention.base import AttentionBackend, AttentionPlan, LayerKV
from tpctl.layers.attention.latent import LatentAttention, LatentBackend
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute import Compute
from tpctl.layers.delta_net.layer import DeltaNet
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tpctl.layers.experts import BesideMLP, Mixture, Stacks
from tpctl.layers.layer_inputs import LayerInput, LayerInputs
from tpctl.layers.linear import ReplicatedLinear
from tpctl.layers.mlp import MLP
from tpctl.layers.module import Layer, attach
from tpctl.layers.norm import RMSNorm
from tpctl.layers.rotary import RotaryTable
from tpctl.layers.stream import ResidualStream, Rows, Together
from tpctl.models.predictor import Predictor
from tpctl.partition.plan import PartitionPlan


class _Norms(NamedTuple):
    """A block's norms, by their places; their names as modules are those of the checkpoint."""

    before_attention: RMSNorm | None
    after_attention: RMSNorm | None
    before_mlp: RMSNorm | None
    after_mlp: RMSNorm | None


class DecoderLayer(Layer):
    """Attention and MLP with their norms, each added to the residual stream."""

    layer_scalar: nn.Parameter

    def __init__(
        self,
        made_of: blocks.Block,
        hold: Hold,
        backend: AttentionBackend[Any],
        rotary: RotaryTable | None,
        group: TPGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.residual_scale, self.beside = made_of.residual_scale, made_of.beside
        norms = (made_of.before_attention, made_of.after_attention, made_of.before_mlp, made_of.after_mlp)
        self.norms = _Norms(*(self._norm(norm, dtype) for norm in norms))
        self._mixer = (self._mixing(made_of.attention, hold, backend, rotary, group, dtype),)
        mlp = self._made(made_of.mlp, hold, group, dtype)
        self._mlp = (mlp,)  # under the names that a shard has it by
        self._experts: BesideMLP | None = None
        self._input: LayerInput | None = None
        if made_of.experts is not None:
            assert isinstance(mlp, MLP)
            self._experts = BesideMLP(made_of.experts, mlp, hold, group, self, dtype)
        if made_of.input is not None:
            self._input = LayerInput(made_of.input, hold, self, dtype)
        self._scaled = made_of.scalar is not None
        if made_of.scalar is not None:
            attach(self, made_of.scalar.name, nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False))

    def _mixing(
        self,
        mixer: blocks.Attention | blocks.Mixer,
        hold: Hold,
        backend: AttentionBackend[Any],
        rotary: RotaryTable | None,
        group: TPGroup,
        dtype: torch.dtype,
    ) -> Attention | DeltaNet | LatentAttention:
        if isinstance(mixer, blocks.Attention):
            self.self_attn = Attention(mixer, hold, backend, rotary, group, dtype)
            return self.self_attn
        if isinstance(mixer, latent.LatentAttention):
            assert isinstance(backend, LatentBackend) and rotary is not None
            return LatentAttention(mixer, hold, backend, rotary, group, self, dtype)
        assert isinstance(mixer, delta_net.DeltaNet), mixer
        self.linear_attn = DeltaNet(mixer, hold, group, dtype)
        return self.linear_attn

    def _made(
        self, mlp: blocks.Gated | blocks.Experts, hold: Hold, group: TPGroup, dtype: torch.dtype
    ) -> MLP | Mixture:
        if isinstance(mlp, blocks.Experts):
            return Mixture(mlp, hold, group, self, dtype)
        made = MLP(mlp, hold, group, dtype)
        attach(self, mlp.down.name.rpartition(".")[0], made)
        return made

    def _norm(self, made_of: linear.Norm | None, dtype: torch.dtype) -> RMSNorm | None:
        if made_of is None:
            return None
        norm = RMSNorm.of(made_of, dtype)
        self.add_module(made_of.name, norm)
        return norm

    def use(self, compute: Compute) -> None:
        """Once, when the linears are as ``compute`` multiplies them."""
        if compute.merges and isinstance(self._mixer[0], LatentAttention):
            self._mixer[0].merge(compute)

    def forward(
        self,
        stream: ResidualStream,
        kv: LayerKV | LayerState,
        plan: AttentionPlan,
        rows: Tensor | None = None,
        inputs_TP: Tensor | None = None,
    ) -> None:
        """Add this block's two sums to ``stream``.

        Args:
            rows: int64 [R], the only rows of T that are still wanted behind attention; ``None``: all. The keys and
                values of the others are stored all the same.
            inputs_TP: a layer's own embeddings of the tokens.
        """
        norms, scale = self.norms, self.residual_scale
        read = stream.normed(norms.before_attention)
        mixer = self._mixer[0]
        attended = mixer(read, kv, plan)
        if rows is not None:
            stream.keep(rows)
            attended, read = attended[rows], read._replace(x=read.x[rows])
            if not len(rows):
                return
        if self.beside:
            self._add_together(stream, attended, read)
            return
        stream.add(mixer.o_proj, attended, norms.after_attention, scale)
        read = stream.normed(norms.before_mlp)
        if self._experts is not None:
            stream.join(self._experts(read, stream.normed(None).x), norms.after_mlp)
        else:
            summand, x = self._mlp[0].summand(read)
            stream.add(summand, x, norms.after_mlp, scale)
        if self._input is not None or self._scaled:
            self._end(stream, inputs_TP if inputs_TP is None or rows is None else inputs_TP[rows])

    def _add_together(self, stream: ResidualStream, attended: Tensor, read: Rows) -> None:
        """Add what attention and the MLP make of the same rows, which one sum over the ranks serves."""
        summand, x = self._mlp[0].summand(read)
        o_proj = self._mixer[0].o_proj
        stream.add(Together(o_proj, summand, o_proj.group), (attended, x), None, self.residual_scale)

    def _end(self, stream: ResidualStream, inputs_TP: Tensor | None) -> None:
        """What a layer does behind its MLP: add its own embeddings, and scale the sum."""
        if self._input is not None:
            assert inputs_TP is not None
            stream.join(self._input(stream.normed(None).x, inputs_TP))
        if self._scaled:
            stream.scale(self.layer_scalar)


class Backbone(Layer):
    """Embedding, blocks and the last norm; named ``model`` in a checkpoint."""

    layers: list[DecoderLayer]

    def __init__(self, embedding: VocabParallelEmbedding, layers: Iterable[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = norm


class Decoder(Layer):
    """A decoder-only transformer; parameter names are those of the shard folder.

    Args:
        rotaries: each layer's table, and the predictor's behind them; layers that rotate alike share one.
        held: the names of the tensors that the rank's shard holds; ``None``: all of the plan.
        predicting: the predictor's own backend, where there is a predictor: its steps are others than the layers'.

    Attributes:
        held: what the rank has of every linear.
    """

    def __init__(
        self,
        made_of: Blueprint,
        plan: PartitionPlan,
        backend: AttentionBackend[Any],
        rotaries: Sequence[RotaryTable | None],
        group: TPGroup,
        dtype: torch.dtype,
        held: Collection[str] | None = None,
        predicting: AttentionBackend[Any] | None = None,
    ) -> None:
        super().__init__()
        self.made_of = made_of
        self.backend, self.predicting = backend, predicting
        self.compute = Compute(group)
        self.held: list[HeldLinear] = []

        def hold(prefix: str, one: linear.Linear) -> HeldLinear:
            self.held.append(HeldLinear.of(one, plan, group.rank, prefix, held))
            return self.held[-1]

        vocab, hidden = plan.vocab_slices[group.rank], made_of.hidden_size
        layers = []
        own, of_predictor = rotaries[: len(made_of.layers)], rotaries[len(made_of.layers) :]
        for layer, (block, rotary) in enumerate(zip(made_of.blocks, own, strict=True)):
            of_layer = partial(hold, made_of.prefix.format(layer))
            layers.append(DecoderLayer(block, of_layer, backend, rotary, group, dtype))
        self.model = Backbone(
            VocabParallelEmbedding(
                vocab, hidden, group, dtype, scale=made_of.embedding_scale, rounded=made_of.rounds_scale
            ),
            layers,
            RMSNorm.of(made_of.norm, dtype),
        )
        self.lm_head = ParallelLMHead(
            hold("", made_of.output), dtype, scale=made_of.logit_scale, softcap=made_of.logit_softcap
        )
        if made_of.tied:
            self.tie()
        self.mtp: Predictor | None = None
        if (predictor := made_of.predictor) is not None:
            assert predicting is not None
            inner = DecoderLayer(predictor.block, partial(hold, BLOCK), predicting, of_predictor[0], group, dtype)
            self.mtp = Predictor(predictor, partial(hold, PREFIX), inner, group, dtype)
        self._inputs = LayerInputs(made_of, partial(hold, ""), group, self, dtype) if made_of.beside else None

    def tie(self) -> None:
        """Let the embedding read the head's parameter: the shard stores the tied weight once, as ``lm_head``."""
        self.model.embed_tokens.weight = self.lm_head.weight

    def use(self, compute: Compute) -> None:
        """Once, after loading: compute as ``compute`` does, with the weights in its own form."""
        self.compute = compute
        for module in self.modules():
            if isinstance(module, ReplicatedLinear | Stacks | DeltaNet):
                module.use(compute)
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.use(compute)

    def forward(self, batch: ForwardBatch, kv: Sequence[LayerKV | LayerState], rows: Tensor | None = None) -> Tensor:
        """This rank's slice of the logits, in the model's dtype.

        Args:
            rows: int64 [R], rows of T whose logits are wanted; ``None``: all. Fewer than T of them spare the last block
                what follows its attention for the others.

        Returns:
            [T, V] or [R, V].
        """
        final = self.final(batch, kv, rows)
        if final is None:
            return self.lm_head.weight.new_empty(0, self.lm_head.out_features)
        return self.lm_head(*final)  # type: ignore[no-any-return]

    def final(self, batch: ForwardBatch, kv: Sequence[LayerKV | LayerState], rows: Tensor | None = None) -> Rows | None:
        """What the head makes the logits of ``forward`` of; ``None`` where no rows are wanted."""
        plan = self.backend.begin(batch)
        stream = self.compute.begin(self.model.embed_tokens(batch.input_ids), batch)
        early = rows is not None and len(rows) < batch.num_tokens
        inputs_TLP = None if self._inputs is None else self._inputs(batch.input_ids, stream.normed(None).x)
        last = len(kv) - 1
        for index, (layer, layer_kv) in enumerate(zip(self.model.layers, kv, strict=True)):
            inputs = None if inputs_TLP is None else inputs_TLP[:, index]
            layer(stream, layer_kv, plan, rows if early and index == last else None, inputs)
        if rows is not None and not len(rows):
            return None
        final = stream.normed(self.model.norm)
        return final if rows is None or early else final._replace(x=final.x[rows])

    def predict(self, states_TH: Tensor, batch: ForwardBatch, kv: LayerKV, rows: Tensor | None = None) -> Tensor:
        """What the predictor makes of the last states of a step's tokens (see ``Predictor.forward``).

        Args:
            states_TH: as ``final`` gives them.
            batch: where these tokens are; its ``input_ids`` are those behind each of them.
        """
        assert self.mtp is not None and self.predicting is not None
        embedded = self.compute.begin(self.model.embed_tokens(batch.input_ids), batch).normed(None).x
        plan = self.predicting.begin(batch)
        return self.mtp(embedded, states_TH, self.compute, batch, kv, plan, rows)  # type: ignore[no-any-return]
