"""A layer of a model, as data: a ``Block`` is

    residual ─┬────────────────────────────────(+)─┬───────────────────────────────(+)──
              └ norm ─ qkv ─ attention ─ out ─ [norm] ┘└ norm ─ gate_up ─ act·up ─ down ─ [norm] ┘

where a norm in brackets is one that only some families have, and OLMo has no other. Names leave out
``model.layers.N.``, so that layers that are cut alike compare equal. A ``CutBlock`` is one of which no more is known
than what it is made of and how it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from tpctl.arch.linear import Linear, Norm, Vector, Weight
from tpctl.arch.rope import RopeConfig
from tpctl.arch.routing import Routing
from tpctl.errors import PartitionError
from tpctl.partition.cuts import HeadShare, split_heads
from tpctl.partition.split import TensorSplit

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP; the second is GELU by its approximation with tanh."""


@dataclass(frozen=True)
class Attention:
    """Attention of one block.

    Attributes:
        qkv: queries, keys and values below each other, in whole heads.
        window: how many tokens a token sees, itself included; ``None``: all before it.
        rope: ``None``: heads are not rotated (NoPE).
        scale: of the scores, before ``softcap`` and softmax.
        softcap: a score s becomes softcap * tanh(s / softcap); ``None``: it stays.
        q_norm, k_norm: before ``rope``; over each head, or, where they have a ``cut``, over all heads at once.
        sinks: a score for each query head that joins its softmax and that no value goes with.
        gate: behind each query head ``qkv`` has as many rows more, by whose sigmoid its output counts (Qwen3-Next).
        value_eps: values are normed, by this epsilon and without weights (Gemma 4).
        reads: an earlier layer, to whose keys and values it attends, having queries alone.
        shared: later layers read its keys and values.
    """

    kind: ClassVar[str] = "attention"
    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    qkv: Linear
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Vector | None = None
    gate: bool = False
    value_eps: float | None = None
    reads: int | None = None
    shared: bool = False

    @property
    def held(self) -> str:
        """What it makes of its input, of queries, keys and values: ``"qk"`` where keys serve as values."""
        return "".join(part.label for part in self.qkv.parts)

    @property
    def rotates_part(self) -> bool:
        """Whether it rotates some of a head's dimensions, and leaves others as they are."""
        return self.rope is not None and self.rope.rotary_dim != self.head_dim

    def shares(self, tp_size: int) -> tuple[HeadShare, ...]:
        """The heads of each rank. Raises ``PartitionError`` if they cannot be dealt to so many."""
        return split_heads(self.num_heads, self.num_kv_heads, tp_size)

    def splits(self) -> Iterator[TensorSplit]:
        yield from self.qkv.splits()
        for part in (self.q_norm, self.k_norm, self.sinks):
            if part is not None:
                yield from part.splits()
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
class Clamped:
    """gpt-oss' gated activation, (up + 1) * gate * sigmoid(alpha * gate), with a gate of at most ``limit`` and an up of
    -limit to limit."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture of ``count`` gated MLPs, of which each token takes ``per_token``, and what chooses them.

    Attributes:
        gate_up, down: of every expert, stacked. Rows of gate and up alternate where ``gate_up`` is one part.
        router: what chooses, whole on every rank: the gate, and its biases.
        shared: an MLP that every token takes, whose sum over the ranks is that of the experts.
        shared_gate: a linear of one output, by whose sigmoid the shared MLP counts.
        forms: the same ``gate_up``, ``down`` and ``router`` as other checkpoints hold them: the names tell which one
            it is.
        routing: how they are chosen; ``None``: in a way that tpctl does not know, which it cuts and does not run.
        router_eps: ``router`` is a scale of each input, the gate, and a factor of each expert's weight (Gemma 4): what
            it reads is not what experts do but the residual, normed by this epsilon, times the scale.
    """

    count: int
    per_token: int
    gate_up: Linear
    down: Linear
    router: tuple[Linear | Vector, ...]
    shared: Gated | None = None
    shared_gate: Linear | None = None
    forms: tuple[tuple[Linear, Linear, tuple[Linear | Vector, ...]], ...] = ()
    routing: Routing | None = None
    activation: Activation | Clamped = "silu"
    router_eps: float | None = None

    @property
    def interleaved(self) -> bool:
        """Whether rows of gate and up alternate."""
        return len(self.gate_up.parts) == 1

    def splits(self) -> Iterator[TensorSplit]:
        for part in (*self.router, self.gate_up, self.down, self.shared_gate, self.shared):
            if part is not None:
                yield from part.splits()


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens otherwise than ``Attention``: its weights, in order. One of which no more is known is cut and
    not run; a kind that runs is a class of its own.

    Attributes:
        runs_on: the devices that tpctl runs it on.
        kind: what people call it.
        num_heads: the most ranks that it can be dealt to.
        num_kv_heads: how many heads keep something of every token (KV heads); 0: all ranks keep the same.
        kept: how many values one of them keeps of a token, keys and values together; 0: none, as a recurrent one, or
            one that reads another layer's.
        recurrent: whether it keeps a state of constant size for each sequence.
    """

    runs_on: ClassVar[tuple[str, ...]] = ()

    kind: str
    parts: tuple[Linear | Norm | Vector, ...]
    num_heads: int
    num_kv_heads: int
    kept: int
    recurrent: bool = False

    def shares(self, tp_size: int) -> tuple[HeadShare, ...]:
        """As of ``Attention``."""
        if tp_size > self.num_heads:
            raise PartitionError(
                f"tensor-parallel size {tp_size} does not fit {self.kind} of {self.num_heads} heads; "
                f"use --tp 1 to {self.num_heads}"
            )
        return split_heads(self.num_heads, self.num_kv_heads or 1, tp_size)

    def splits(self) -> Iterator[TensorSplit]:
        for part in self.parts:
            yield from part.splits()


@dataclass(frozen=True)
class BesideMLP:
    """Experts beside a dense MLP (Gemma 4): they read the residual, and each of the two sums has a norm of its own."""

    after_mlp: Norm
    before: Norm
    experts: Experts
    after: Norm


@dataclass(frozen=True)
class LayerInput:
    """What a layer makes of its own embedding of a token, [P], and adds at its end (Gemma 4):
    ``norm(projection(gelu_tanh(gate(residual)) * embedding))``. Whole on every rank."""

    gate: Linear
    projection: Linear
    norm: Norm


@dataclass(frozen=True)
class Block:
    """One layer.

    Attributes:
        before_attention, before_mlp: norm what is read from the residual; ``None`` only where there is one behind, or
            where attention and MLP are ``beside`` each other.
        after_attention, after_mlp: norm what is added to it (Gemma's sandwich).
        residual_scale: what is added to it is multiplied by.
        beside: the MLP reads what attention reads, by the norm before that, and both are added at once (Cohere).
        experts: their sum is added to that of ``mlp``, before ``after_mlp``.
        input: a layer's own embeddings.
        scalar: one number that its result, residual included, is multiplied by.
    """

    before_attention: Norm | None
    attention: Attention | Mixer
    before_mlp: Norm | None
    mlp: Gated | Experts
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    residual_scale: float = 1.0
    beside: bool = False
    experts: BesideMLP | None = None
    input: LayerInput | None = None
    scalar: Vector | None = None

    @property
    def parts(self) -> tuple[LayerPart, ...]:
        """In the order in which a forward pass meets them."""
        more, own = self.experts, self.input
        found = (
            *(self.before_attention, self.attention, self.after_attention, self.before_mlp, self.mlp),
            *(() if more is None else (more.after_mlp, more.before, more.experts, more.after)),
            self.after_mlp,
            *(() if own is None else (own.gate, own.projection, own.norm)),
            self.scalar,
        )
        return tuple(part for part in found if part is not None)

    @property
    def mixer(self) -> Attention | Mixer:
        return self.attention

    @cached_property
    def splits(self) -> tuple[TensorSplit, ...]:
        """The split of every stored tensor, in that order."""
        return tuple(split for part in self.parts for split in part.splits())


@dataclass(frozen=True)
class CutBlock:
    """A layer that tpctl cuts and does not run: its ``parts`` in order, the ``mixer`` one of them."""

    mixer: Attention | Mixer
    parts: tuple[LayerPart, ...]

    @cached_property
    def splits(self) -> tuple[TensorSplit, ...]:
        """As of ``Block``."""
        return tuple(split for part in self.parts for split in part.splits())


LayerPart = Attention | Mixer | Gated | Experts | Linear | Norm | Vector
Layer = Block | CutBlock


def linears(part: LayerPart) -> Iterator[Linear]:
    """The linears that ``part`` of a layer is made of."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, Attention):
        yield from (part.qkv, part.out)
    elif isinstance(part, Mixer):
        yield from (one for one in part.parts if isinstance(one, Linear))
    elif isinstance(part, Gated):
        yield from (part.gate_up, part.down)
    elif isinstance(part, Experts):
        yield from (one for one in part.router if isinstance(one, Linear))
        yield from (part.gate_up, part.down)
        for more in (part.shared_gate, part.shared):
            yield from () if more is None else linears(more)


def with_weights(part: LayerPart, change: Callable[[Weight], Weight]) -> LayerPart:
    """``part`` with every linear, norm and vector changed, each into one of its own kind."""

    def linear(one: Linear) -> Linear:
        new = change(one)
        assert isinstance(new, Linear)
        return new

    def norm(one: Norm | None) -> Norm | None:
        new = None if one is None else change(one)
        assert new is None or isinstance(new, Norm)
        return new

    def vector(one: Vector | None) -> Vector | None:
        new = None if one is None else change(one)
        assert new is None or isinstance(new, Vector)
        return new

    def router(weights: tuple[Linear | Vector, ...]) -> tuple[Linear | Vector, ...]:
        return tuple(new for one in weights if not isinstance(new := change(one), Norm))

    if isinstance(part, Linear | Norm | Vector):
        return change(part)
    if isinstance(part, Attention):
        q_norm, k_norm, sinks = norm(part.q_norm), norm(part.k_norm), vector(part.sinks)
        return replace(part, qkv=linear(part.qkv), out=linear(part.out), q_norm=q_norm, k_norm=k_norm, sinks=sinks)
    if isinstance(part, Mixer):
        return replace(part, parts=tuple(change(one) for one in part.parts))
    if isinstance(part, Gated):
        return replace(part, gate_up=linear(part.gate_up), down=linear(part.down))
    shared = None if part.shared is None else with_weights(part.shared, change)
    assert shared is None or isinstance(shared, Gated)
    return replace(
        part,
        gate_up=linear(part.gate_up),
        down=linear(part.down),
        router=router(part.router),
        shared=shared,
        shared_gate=None if part.shared_gate is None else linear(part.shared_gate),
        forms=tuple((linear(gate_up), linear(down), router(chosen)) for gate_up, down, chosen in part.forms),
    )
