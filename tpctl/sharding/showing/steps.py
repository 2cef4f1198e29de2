"""The way of a token's vector through a layer, as steps: what each rank does, and where they wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tpctl.arch.block import Attention, Experts, Gated, Layer, LayerPart, Mixer
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.linear import Linear, Norm, Vector
from tpctl.partition.split import Rule
from tpctl.sharding.showing.kinds import Kind, pattern
from tpctl.sharding.showing.meaning import features

Content = Callable[[int], tuple[str, str]]
"""What a rank's step is: from the rank's index, a title and a detail."""


@dataclass(frozen=True)
class Bar:
    """A state that all ranks have, or (``reduce``) an exchange that gives it to them."""

    style: Literal["bar", "reduce"]
    title: str
    detail: str = ""


@dataclass(frozen=True)
class Lanes:
    """What the ranks do, each a title and a detail, beside each other."""

    style: Literal["step", "weight"]
    cells: tuple[tuple[str, str], ...]
    note: str = ""


Step = Bar | Lanes

_ACTIVATIONS = {"silu": "SiLU", "gelu_tanh": "GELU"}
_NORM = ("RMSNorm", "the whole vector")
_CENTRED = "LayerNorm"


def steps(blueprint: Blueprint, number: int, found: Mapping[str, Kind], tp_size: int) -> tuple[Step, ...]:
    """The steps of layer ``number``; ``found``: the kinds of its weights, by their names (``weight`` where they have
    one)."""
    return tuple(_Way(blueprint, blueprint.layers[number], found, tp_size).steps())


class _Way:
    def __init__(self, blueprint: Blueprint, layer: Layer, found: Mapping[str, Kind], tp_size: int) -> None:
        self._blueprint, self._layer, self._found, self._tp_size = blueprint, layer, found, tp_size
        self._ranks = next(iter(found.values())).ranks
        self._sums = 0

    def steps(self) -> Iterator[Step]:
        """Norms stand before the part that reads what they give, or behind one whose sum they change: of those between
        two parts the last is before the second, if the layer begins with a norm; the others are behind the first."""
        hidden = self._blueprint.hidden_size
        yield Bar("bar", "hidden state", f"{hidden:,} numbers a token, the same on every rank")
        stages = _stages(self._layer)
        first = self._layer.parts[0]
        before = isinstance(first, Norm)
        if isinstance(first, Norm):
            norm = (_CENTRED if first.centred else _NORM[0], _NORM[1])
            yield self._each("step", lambda i: norm, "Cheap, so every rank does it.")
        for place, (part, norms) in enumerate(stages):
            following = stages[place + 1][0] if place + 1 < len(stages) else None
            behind = norms - (before and norms > 0 and following is not None and _is_partial(following))
            yield from self._part(part)
            if isinstance(part, Vector) or (following is not None and not norms and not isinstance(following, Vector)):
                if following is not None and _is_partial(part) and _is_partial(following):
                    yield Bar("bar", "beside that, from the same normed vector")
                continue  # scaled in place, or what comes next is added together with it
            if _is_partial(part):
                yield self._sum(_of(part))
            if following is not None and _is_mlp(part) and _is_mlp(following):
                yield Bar("bar", "kept, to be added to the next", _through(behind))
            else:
                onwards = ", on to the next block" if following is None else ""
                yield Bar("bar", f"added to the hidden state{onwards}", _through(behind))
            if behind < norms:
                yield self._each("step", lambda i: _NORM)
        if isinstance(stages[-1][0], Vector):
            yield Bar("bar", "on to the next block")

    def _sum(self, of: str) -> Bar:
        self._sums += 1
        total = f"{self._blueprint.hidden_size:,} partial sums a token, added over the ranks; all get the total"
        return Bar("reduce", f"all-reduce {self._sums}{of}", total)

    def _each(self, style: Literal["step", "weight"], content: Content, note: str = "") -> Lanes:
        return Lanes(style, tuple(content(index) for index in range(len(self._ranks))), note)

    def _part(self, part: LayerPart) -> Iterator[Step]:
        match part:
            case Attention():
                yield from self._attention(part)
            case Mixer():
                yield from self._mixer(part)
            case Gated():
                yield from self._mlp(part)
            case Experts():
                yield from self._experts(part)
            case Linear():
                whole = part.rule is Rule.REPLICATED
                yield self._each("weight", self._weight(part), _RULES[part.rule] if whole else "")
            case Vector():
                yield self._each("step", lambda i: ("scaled", f"by {part.name.rpartition('.')[2]}"))

    def _attention(self, attention: Attention) -> Iterator[Step]:
        gated = " with its gate" if attention.gate else ""
        held = f"q{gated}{', k, v'[: 3 * (len(attention.held) - 1)]}"
        yield self._each("weight", self._weight(attention.qkv), f"Column-parallel: own heads' {held}.")
        if any(norm is not None and norm.cut is not None for norm in (attention.q_norm, attention.k_norm)):
            self._sums += 1
            of = "q and k are normed over all heads: one number each, added"
            yield Bar("reduce", f"all-reduce {self._sums}, of squares", of)
        copied = self._kind(attention.qkv).copies > 1
        note = "Who needs a KV head has a copy." if copied else "A head needs no other."
        if attention.window is None:
            note = f"No exchange: {note[:1].lower()}{note[1:]}"
        else:
            note = f"Over {attention.window:,} tokens. {note}"
        if attention.reads is not None:
            note = f"To the keys and values of layer {attention.reads}. {note}"
        yield self._each("step", lambda i: ("attention", self._heads(attention, i)), note)
        yield self._each("weight", self._weight(attention.out, "o"), "Row-parallel: inputs are own heads.")

    def _mixer(self, mixer: Mixer) -> Iterator[Step]:
        """Its linears in order; the mixing itself is before the one whose outputs are partial sums."""
        small = [
            split.name.removesuffix(".weight").rpartition(".")[2]
            for one in mixer.parts
            if not isinstance(one, Linear)
            for split in one.splits()
            if split.rule is not Rule.REPLICATED
        ]
        short = len(mixer.kind) < 20
        title = mixer.kind if short else "heads mixed"
        note = "" if short else f"{mixer.kind[:1].upper()}{mixer.kind[1:]}. "
        note += "A head needs no other." + (f" By head too: {', '.join(small)}." if small else "")
        for one in mixer.parts:
            if not isinstance(one, Linear):
                continue
            if one.rule is Rule.ROW:
                yield self._each("step", lambda i: (title, self._heads(mixer, i)), note)
            yield self._each("weight", self._weight(one), _RULES.get(one.rule, "Column-parallel: own heads."))

    def _heads(self, mixer: Attention | Mixer, index: int) -> str:
        share = mixer.shares(self._tp_size)[self._ranks[index]]
        if not keeps_by_head(mixer):
            return f"{len(share.query)} head{'s' if len(share.query) > 1 else ''}"
        return f"{len(share.query)} query, {len(share.kv)} KV head{'s' if len(share.kv) > 1 else ''}"

    def _mlp(self, mlp: Gated, whose: str = "") -> Iterator[Step]:
        name = _ACTIVATIONS[mlp.activation]
        down = self._kind(mlp.down)
        yield self._each("weight", self._weight(mlp.gate_up, whose=whose), "Column-parallel: own share of the width.")
        yield self._each(
            "step",
            lambda i: (f"{name}(gate) · up", f"{features(mlp.down, down.shapes[i])[1]:,} numbers"),
            "Entry by entry, no exchange.",
        )
        yield self._each("weight", self._weight(mlp.down, "down", whose=whose), "Row-parallel: inputs are own share.")

    def _experts(self, experts: Experts) -> Iterator[Step]:
        taken, count = experts.per_token, experts.count
        w13, w2 = self._kind(experts.gate_up), self._kind(experts.down)
        yield self._each(
            "weight", lambda i: ("router", f"best {taken} of {count}"), "Whole on every rank, so that all choose alike."
        )
        if w13.dealt:
            yield self._each(
                "step", lambda i: (_run(w13.held[i]), "those chosen, if any"), "Each of them is on these alone."
            )
            notes = (
                "Of each chosen one a part: its group divides it." if w13.cut else "Of each chosen one, whole.",
                "Row-parallel: inputs are own share." if w13.cut else "",
                "Entry by entry.",
            )
        else:
            notes = (
                f"A part of every expert; of {count}, the {taken} chosen are read.",
                "Row-parallel: inputs are own share.",
                "Entry by entry, in each of the chosen experts.",
            )
        yield self._each("weight", self._weight(experts.gate_up), notes[0])
        yield self._each(
            "step",
            lambda i: ("act(gate) · up", f"{features(experts.down, w2.shapes[i])[1]:,} numbers each"),
            notes[2],
        )
        yield self._each("weight", self._weight(experts.down), notes[1])
        scores = "times the router's scores"
        yield self._each(
            "step", lambda i: ("sum of experts", "each times its score"), f"The chosen that are here, {scores}."
        )
        if experts.shared is not None:
            yield from self._mlp(experts.shared, "shared ")
            if experts.shared_gate is not None:
                yield self._each(
                    "step", lambda i: ("times its gate", "one number a token"), "How much the shared expert counts."
                )
            yield self._each(
                "step", lambda i: ("experts + shared", "partial sums"), "Added here, so that one exchange does."
            )

    def _weight(self, linear: Linear, short: str = "", *, whose: str = "") -> Content:
        """A weight by its features, whatever words it is stored in."""
        kind = self._kind(linear)
        name = linear.name.rpartition(".")[2]
        short = short or _SHORT.get(name, name.removesuffix("_proj"))
        title = f"{whose}{short}" if whose or len(short) > 12 else f"{short} weight"

        def content(index: int) -> tuple[str, str]:
            sizes = " × ".join(f"{size:,}" for size in features(linear, kind.shapes[index]))
            if not kind.experts:
                return title, sizes
            return f"{short} of an expert", sizes

        return content

    def _kind(self, linear: Linear) -> Kind:
        return self._found[linear.name]


_RULES = {Rule.REPLICATED: "Whole on every rank.", Rule.ROW: "Row-parallel: inputs are own heads."}


_SHORT = {"gate_up_proj": "gate, up"}


def keeps_by_head(mixer: Attention | Mixer) -> bool:
    """Whether it has KV heads, which keep something of every token."""
    if isinstance(mixer, Attention):
        return mixer.reads is None
    return mixer.num_kv_heads > 0 and mixer.kept > 0


def _run(experts: tuple[int, int]) -> str:
    first, stop = experts
    return f"experts {first} to {stop - 1}" if stop > first + 1 else f"expert {first}"


def _through(norms: int) -> str:
    """What is done with a sum before it is added."""
    return "" if not norms else f"after {'one more RMSNorm' if norms == 1 else f'{norms} more RMSNorms'}, on every rank"


def _of(part: LayerPart) -> str:
    return ", of experts and the shared one" if isinstance(part, Experts) and part.shared is not None else ""


def _is_partial(part: LayerPart) -> bool:
    """Whether what ranks get from it are partial sums."""
    if isinstance(part, Linear):
        return part.rule is Rule.ROW
    return not isinstance(part, Vector)


def _is_mlp(part: LayerPart) -> bool:
    return isinstance(part, Gated | Experts)


def _stages(layer: Layer) -> Sequence[tuple[LayerPart, int]]:
    """The parts of ``layer`` that are no norms, each with how many norms follow it."""
    found: list[tuple[LayerPart, int]] = []
    for part in layer.parts:
        if not isinstance(part, Norm):
            found.append((part, 0))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return found


def kinds_in(blueprint: Blueprint, number: int, found: Sequence[Kind]) -> Mapping[str, Kind]:
    """The kinds of layer ``number``'s weights, by their names less the layer's prefix."""
    prefix = pattern(blueprint.prefix.format(number))
    return {(kind.weight or kind.name).removeprefix(prefix): kind for kind in found if number in kind.layers}
