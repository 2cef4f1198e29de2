"""The kinds of weights in a shard folder: layers whose weights are cut alike are one kind, drawn once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from tpctl.partition.split import EACH, Rule
from tpctl.sharding.showing.bands import Band, bands
from tpctl.sharding.showing.report import InspectReport, TensorReport


@dataclass(frozen=True)
class SourcePicture:
    """A source tensor as the ranks share it; where there are experts, one of them, that of the first group of ranks.

    Attributes:
        name: with ``N`` for the layer's number, and ``{}`` for an expert's.
        label: what it is inside a fused weight ("q", "gate"), or empty.
        shape: of the whole tensor, or of the block of a fused source that ``label`` names.
        bands: along the cut axis, in order, without gap. One band that all ranks hold: a replicated tensor. A
            band without ranks: held by ranks that the folder lacks.
    """

    name: str
    label: str
    shape: tuple[int, ...]
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Kind:
    """A stored weight that several layers have in the same form.

    Attributes:
        name: of the stored tensor, with ``N`` for the layer's number.
        weight: the name that it shares with the tensors ``beside`` it, likewise; empty for what is no linear's.
        format: how that weight is stored.
        holds: what one entry stands for; empty: one value.
        axes: what there is an entry for along each axis of one expert's, as far as it is known.
        dim: the cut axis, of one expert's.
        layers: the layers' numbers; empty for a weight outside the layers.
        experts: the bands of the axis of experts; empty: there are none.
        ranks: those that the folder holds, to which the following fields belong in order.
        shapes: of the stored tensor, experts included; ``nbytes`` and ``padding`` (elements that are zero) likewise.
        held: the experts that a rank has.
        pieces: each piece as (label, start, stop) along the cut axis of its source.
        beside: the other tensors of the same weight: scales, zero points.
    """

    name: str
    weight: str
    format: str
    holds: str
    axes: tuple[str, ...]
    rule: str
    dim: int
    dtype: str
    layers: tuple[int, ...]
    experts: tuple[Band, ...]
    ranks: tuple[int, ...]
    sources: tuple[SourcePicture, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    padding: tuple[int, ...]
    held: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[tuple[str, int, int], ...], ...]
    beside: tuple[Kind, ...] = ()

    @property
    def title(self) -> str:
        """The name without its prefix and suffix: ``self_attn.qkv_proj``."""
        return (self.weight or self.short).removeprefix("model.").removeprefix("layers.N.").removesuffix(".weight")

    @property
    def short(self) -> str:
        """The name without the layer: ``self_attn.qkv_proj.weight``."""
        return self.name.removeprefix("model.").removeprefix("layers.N.")

    @property
    def count(self) -> int:
        """How many experts it is of; 0: of none."""
        return self.experts[-1].stop if self.experts else 0

    @property
    def dealt(self) -> bool:
        """Whether experts are on some ranks only."""
        return len(self.experts) > 1

    @property
    def cut(self) -> bool:
        """Whether a tensor (of one expert) is divided among ranks."""
        return any(len(source.bands) > 1 for source in self.sources)

    @property
    def copies(self) -> int:
        """The most ranks that hold one element."""
        return max(len(band.ranks) for source in self.sources for band in source.bands)

    @property
    def copied(self) -> bool:
        """Whether ranks hold copies where the rule divides."""
        return self.rule not in (Rule.REPLICATED, Rule.EXPERTS) and self.copies > 1

    @property
    def shared(self) -> tuple[int, int]:
        """How many entries of the cut axis are on more than one rank, of how many; of scales beside a border."""
        found = [band for source in self.sources for band in source.bands]
        return sum(len(band) for band in found if len(band.ranks) > 1), sum(map(len, found))

    @property
    def uneven(self) -> bool:
        return len(set(self.shapes)) > 1

    @property
    def axis(self) -> str:
        """What lies along the cut axis, seen as a matrix."""
        return "rows" if self.dim == 0 else "columns"

    @property
    def turned(self) -> bool:
        """Whether it is stored [inputs, outputs]."""
        return len(self.axes) > 1 and self.axes[0].endswith("inputs")

    @property
    def inner(self) -> tuple[tuple[int, ...], ...]:
        """``shapes``, of one expert."""
        return tuple(shape[bool(self.experts) :] for shape in self.shapes)

    def ranges(self, index: int) -> str:
        """What the ``index``-th of ``ranks`` holds, as text: ``q 0:384, k 0:128``."""
        parts, axis = [], ""
        if self.dealt:
            parts, axis = [f"experts {self.held[index][0]}:{self.held[index][1]}"], self.axis
        return ", ".join([*parts, *(f"{label or axis} {a}:{b}".lstrip() for label, a, b in self.pieces[index])])

    def padded_rows(self, index: int) -> int:
        """Rows of zeros at the end of what the ``index``-th of ``ranks`` stores."""
        return self.padding[index] * self.shapes[index][0] // max(1, prod(self.shapes[index]))


def kinds(report: InspectReport) -> tuple[Kind, ...]:
    """The kinds of ``report``, in the order in which a forward pass meets them.

    Constants that another engine wants (``compat``) are made of no source and left out.
    """
    ranks = tuple(rank.rank for rank in report.ranks)
    groups: dict[tuple[object, ...], list[Sequence[int]]] = {}
    first = report.ranks[0].tensors
    for weight in _weights(report):
        key = tuple(
            part
            for index in weight
            for part in (
                *(pattern(first[index].name), first[index].rule, first[index].dtype),
                *(_form(rank.tensors[index]) for rank in report.ranks),
            )
        )
        groups.setdefault(key, []).append(weight)
    found = []
    for members in groups.values():
        layers = tuple(layer for one in members if (layer := layer_of(first[one[0]].name)) is not None)
        alike = [
            _kind([rank.tensors[index] for rank in report.ranks], ranks, layers, report.source_shapes)
            for index in members[0]
        ]
        found.append(replace(alike[0], beside=tuple(alike[1:])))
    return tuple(found)


def flat(found: Iterable[Kind]) -> Iterator[Kind]:
    """Every kind, and those beside it."""
    for kind in found:
        yield kind
        yield from kind.beside


def _weights(report: InspectReport) -> Iterator[Sequence[int]]:
    """The places of each weight's tensors, the values first."""
    first = report.ranks[0].tensors
    filled = [n for n in range(len(first)) if any(rank.tensors[n].pieces for rank in report.ranks)]
    beside: dict[str, list[int]] = {}
    values = {first[index].weight for index in filled if first[index].values}
    for index in filled:
        if not first[index].values and first[index].weight in values:
            beside.setdefault(first[index].weight, []).append(index)
    apart = {index for indices in beside.values() for index in indices}
    for index in filled:
        if index not in apart:
            yield [index, *(beside.get(first[index].weight, ()) if first[index].weight else ())]


def pattern(name: str) -> str:
    """``name`` with ``N`` for the layer's number."""
    return re.sub(r"\.\d+\.", ".N.", name)


def layer_of(name: str) -> int | None:
    """The layer's number in ``name``, if it has one."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def count(layers: Sequence[int]) -> str:
    """``"layers 0-31"``, ``"layer 3"``, ``"31 layers"`` where they are not in a row, or nothing."""
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"{len(layers)} layers"


def _form(tensor: TensorReport) -> tuple[object, ...]:
    return tensor.shape, tuple((pattern(p.source), p.label, p.ranges) for p in tensor.pieces)


def _kind(
    held: Sequence[TensorReport],
    ranks: tuple[int, ...],
    layers: tuple[int, ...],
    source_shapes: Mapping[str, tuple[int, ...]],
) -> Kind:
    one = held[0]
    experts = tuple(tensor.pieces[0].ranges[0] if tensor.stacked and tensor.pieces else (0, 0) for tensor in held)
    found: tuple[Band, ...] = ()
    if one.stacked:
        owners: dict[tuple[int, int], list[int]] = {}
        for rank, own in zip(ranks, experts, strict=True):
            owners.setdefault(own, []).append(rank)
        found = bands(owners, 0, _experts(one.pieces[0].source, source_shapes))
    return Kind(
        name=pattern(one.name),
        weight=pattern(one.weight),
        format=one.format,
        holds=one.holds,
        axes=one.axes[one.stacked :],
        rule=one.rule,
        dim=one.dim - one.stacked,
        dtype=one.dtype,
        layers=layers,
        experts=found,
        ranks=ranks,
        sources=_sources(held, ranks, source_shapes),
        shapes=tuple(tensor.shape for tensor in held),
        nbytes=tuple(tensor.nbytes for tensor in held),
        padding=tuple(tensor.padding for tensor in held),
        held=experts,
        pieces=tuple(tuple((p.label, *(p.ranges[t.dim] if p.ranges else (0, 1))) for p in t.pieces) for t in held),
    )


def _experts(source: str, source_shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many experts there are, of whom ``source`` is."""
    if EACH not in source:
        return source_shapes[source][0]
    count = 0
    while source.replace(EACH, str(count)) in source_shapes:
        count += 1
    return count


def _sources(
    held: Sequence[TensorReport], ranks: Sequence[int], source_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[SourcePicture, ...]:
    """Each source (or labelled block of a fused one), with who holds which entries of it."""
    dim, stacked = held[0].dim, held[0].stacked
    group = min(tensor.pieces[0].ranges[0] for tensor in held if tensor.pieces) if stacked else None
    owners: dict[tuple[str, str], dict[tuple[int, int], list[int]]] = {}
    for rank, tensor in zip(ranks, held, strict=True):
        for piece in tensor.pieces:
            if group in (None, piece.ranges[0]):
                along = piece.ranges[dim] if piece.ranges else (0, 1)
                owners.setdefault((piece.source, piece.label), {}).setdefault(along, []).append(rank)
    blocks = [source for source, _ in owners]
    found = []
    for (name, label), ranges in owners.items():
        shape = [*source_shapes[name.replace(EACH, "0")]]
        shape = (shape[1:] if stacked and EACH not in name else shape) or [1]
        axis, first, last = dim - stacked, min(ranges)[0], max(stop for _, stop in ranges)
        if blocks.count(name) == 1:  # not a block of a fused source: the whole of it
            first, last = 0, shape[axis]
        shape[axis] = last - first
        found.append(SourcePicture(pattern(name), label, tuple(shape), bands(ranges, first, last)))
    return tuple(found)
