"""What a model is made of, layer by layer: the one description that all else is derived from.

The sharder takes from it which tensors there are and how they are cut, the decoder which modules to build, the planner
how many bytes everything takes, the page what to draw. A ``Block`` is

    residual ─┬────────────────────────────────(+)─┬───────────────────────────────(+)──
              └ norm ─ qkv ─ attention ─ out ─ [norm] ┘└ norm ─ gate_up ─ act·up ─ down ─ [norm] ┘

where a norm in brackets is one that only some families have. Blocks need not be alike. Names within a block leave out
``model.layers.N.``, so that blocks that are cut alike compare equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from tpctl.arch.rope import RopeConfig
from tpctl.partition.split import Cut, HeadShare, Part, Rule, TensorSplit, Vocab, Whole, split_heads

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP; the second is GELU by its approximation with tanh."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Norm:
    """RMSNorm of ``size`` elements; with ``unit_offset`` (Gemma) the factor is 1 + weight."""

    name: str
    size: int
    eps: float
    unit_offset: bool = False

    def splits(self) -> Iterator[TensorSplit]:
        yield _replicated(f"{self.name}.weight", self.size)


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b``, with W [out, in] stored as one tensor.

    Attributes:
        name: of the stored tensors, less ``.weight`` or ``.bias``.
        rule: what its output means to the ranks.
        parts: the output features, in the order in which they are stored; ``source`` less ``.weight`` or ``.bias``.
        inputs: input features, dealt to the ranks by ``input_cut``: ``Whole`` but for row-parallel linears.
    """

    name: str
    rule: Rule
    parts: tuple[Part, ...]
    inputs: int
    input_cut: Cut = Whole()  # noqa: RUF009 (it is frozen)
    bias: bool = False

    @property
    def outputs(self) -> int:
        """Output features of all ranks together."""
        return sum(part.length for part in self.parts)

    def splits(self) -> Iterator[TensorSplit]:
        weight, bias = f"{self.name}.weight", f"{self.name}.bias"
        if self.rule is Rule.ROW:
            (part,) = self.parts
            columns = Part(f"{part.source}.weight", self.inputs, self.input_cut)
            yield TensorSplit(weight, Rule.ROW, (columns,), dim=1, other=part.length)
            if self.bias:  # whole on every rank, and added by rank 0 alone
                yield _replicated(bias, part.length)
            return
        for kind, name, other in (("weight", weight, self.inputs), ("bias", bias, None)):
            if kind == "weight" or self.bias:
                parts = tuple(replace(part, source=f"{part.source}.{kind}") for part in self.parts)
                yield TensorSplit(name, self.rule, parts, other=other)


@dataclass(frozen=True)
class Attention:
    """Attention of one block.

    Attributes:
        qkv: queries, keys and values below each other, in whole heads.
        window: how many tokens a token sees, itself included; ``None``: all before it.
        scale: of the scores, before ``softcap`` and softmax.
        softcap: a score s becomes softcap * tanh(s / softcap); ``None``: it stays.
        q_norm, k_norm: over each head, before ``rope``.
    """

    qkv: Linear
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def shares(self, tp_size: int) -> tuple[HeadShare, ...]:
        """The heads of each rank. Raises ``PartitionError`` if they cannot be dealt to so many."""
        return split_heads(self.num_heads, self.num_kv_heads, tp_size)

    def splits(self) -> Iterator[TensorSplit]:
        yield from self.qkv.splits()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.splits()
        yield from self.out.splits()


@dataclass(frozen=True)
class Gated:
    """``down(activation(gate(x)) * up(x))``; gate and up are below each other in ``gate_up``."""

    gate_up: Linear
    down: Linear
    activation: Activation = "silu"

    def splits(self) -> Iterator[TensorSplit]:
        yield from self.gate_up.splits()
        yield from self.down.splits()


@dataclass(frozen=True)
class Block:
    """One layer. ``after_attention`` and ``after_mlp`` norm what is added to the residual (Gemma's sandwich)."""

    before_attention: Norm
    attention: Attention
    before_mlp: Norm
    mlp: Gated
    after_attention: Norm | None = None
    after_mlp: Norm | None = None

    @cached_property
    def splits(self) -> tuple[TensorSplit, ...]:
        """The split of every stored tensor, in the order in which a forward pass meets them."""
        parts = (
            *(self.before_attention, self.attention, self.after_attention),
            *(self.before_mlp, self.mlp, self.after_mlp),
        )
        return tuple(split for part in parts if part is not None for split in part.splits())


@dataclass(frozen=True)
class Blueprint:
    """A decoder-only model.

    Attributes:
        norm: the last one.
        tied: the head is the embedding's tensor, stored once, as ``head``.
        embedding_scale: what looked up rows are multiplied by.
        logit_softcap: as of ``Attention``, for the logits.
        prefix: of a layer's names, with its number in place of ``{}``.
        unused: names, less the layer's prefix, that a checkpoint may hold in any layer and nobody reads.
    """

    vocab_size: int
    hidden_size: int
    blocks: tuple[Block, ...]
    norm: Norm
    tied: bool
    embedding: str = EMBEDDING
    head: str = LM_HEAD
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    prefix: str = "model.layers.{}."
    unused: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    def splits(self) -> Iterator[TensorSplit]:
        """The split of every stored tensor, in the order in which a forward pass meets them."""
        vocab = Part(self.embedding, self.vocab_size, Vocab())
        if not self.tied:
            yield TensorSplit(self.embedding, Rule.VOCAB, (vocab,), other=self.hidden_size)
        for layer, block in enumerate(self.blocks):
            for split in block.splits:
                yield _prefixed(split, self.prefix.format(layer))
        yield from self.norm.splits()
        head = vocab if self.tied else replace(vocab, source=self.head)
        yield TensorSplit(self.head, Rule.VOCAB, (head,), other=self.hidden_size)

    def ignored(self) -> tuple[str, ...]:
        """Names that a checkpoint may hold and nobody reads: RoPE's tables, a tied head's second copy."""
        found = [self.prefix.format(layer) + name for layer in range(len(self.blocks)) for name in self.unused]
        return (*found, self.head) if self.tied else tuple(found)

    @cached_property
    def alike(self) -> Mapping[int, Sequence[int]]:
        """The layers that are cut alike, by the first of them."""
        first: dict[tuple[TensorSplit, ...], int] = {}
        found: dict[int, list[int]] = {}
        for layer, block in enumerate(self.blocks):
            found.setdefault(first.setdefault(block.splits, layer), []).append(layer)
        return found

    @property
    def max_tp(self) -> int:
        """The most ranks that attention can be dealt to; other cuts may allow fewer."""
        return min(block.attention.num_heads for block in self.blocks)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window."""
        return tuple(block.attention.window for block in self.blocks)


def _prefixed(split: TensorSplit, prefix: str) -> TensorSplit:
    parts = tuple(replace(part, source=prefix + part.source) for part in split.parts)
    return replace(split, name=prefix + split.name, parts=parts)


def _replicated(name: str, length: int) -> TensorSplit:
    return TensorSplit(name, Rule.REPLICATED, (Part(name, length, Whole()),))
