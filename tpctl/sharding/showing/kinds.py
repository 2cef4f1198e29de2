"""The kinds of weights in a shard folder: layers whose weights are cut alike are one kind, drawn once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tpctl.partition.split import Rule
from tpctl.sharding.showing.inspect import InspectReport, TensorReport


@dataclass(frozen=True)
class Band:
    """Entries ``start`` to ``stop`` of a source's cut axis, and the ranks that hold them."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class SourcePicture:
    """A source tensor as the ranks share it.

    Attributes:
        name: with ``N`` for the layer's number.
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
        layers: the layers' numbers; empty for a weight outside the layers.
        ranks: those that the folder holds, to which the following fields belong in order.
        shapes: of the stored tensor; ``nbytes`` and ``padding`` (elements that are zero) likewise.
        pieces: each piece as (label, start, stop) along the cut axis of its source.
    """

    name: str
    rule: str
    dim: int
    dtype: str
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    sources: tuple[SourcePicture, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    padding: tuple[int, ...]
    pieces: tuple[tuple[tuple[str, int, int], ...], ...]

    @property
    def title(self) -> str:
        """The name without its prefix and suffix: ``self_attn.qkv_proj``."""
        return self.name.removeprefix("model.").removeprefix("layers.N.").removesuffix(".weight")

    @property
    def copies(self) -> int:
        """The most ranks that hold one element."""
        return max(len(band.ranks) for source in self.sources for band in source.bands)

    @property
    def copied(self) -> bool:
        """Whether ranks hold copies where the rule divides."""
        return self.rule != Rule.REPLICATED and self.copies > 1

    @property
    def uneven(self) -> bool:
        return len(set(self.shapes)) > 1

    def ranges(self, index: int) -> str:
        """What the ``index``-th of ``ranks`` holds, as text: ``q 0:384, k 0:128``."""
        return ", ".join(f"{label} {a}:{b}".lstrip() for label, a, b in self.pieces[index])

    def padded_rows(self, index: int) -> int:
        """Rows of zeros at the end of what the ``index``-th of ``ranks`` stores."""
        return self.padding[index] * self.shapes[index][0] // max(1, prod(self.shapes[index]))


def kinds(report: InspectReport) -> tuple[Kind, ...]:
    """The kinds of ``report``, in the order in which a forward pass meets them.

    Constants that another engine wants (``compat``) are made of no source and left out.
    """
    ranks = tuple(rank.rank for rank in report.ranks)
    groups: dict[tuple[object, ...], list[int]] = {}
    first = report.ranks[0].tensors
    for index, tensor in enumerate(first):
        held = [rank.tensors[index] for rank in report.ranks]
        if not any(one.pieces for one in held):
            continue
        key = (pattern(tensor.name), tensor.rule, tensor.dtype, *(_form(one) for one in held))
        groups.setdefault(key, []).append(index)
    found = []
    for members in groups.values():
        held = [rank.tensors[members[0]] for rank in report.ranks]
        names = [first[index].name for index in members]
        layers = tuple(layer for name in names if (layer := layer_of(name)) is not None)
        found.append(_kind(held, ranks, layers, report.source_shapes))
    return tuple(found)


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
    return Kind(
        name=pattern(one.name),
        rule=one.rule,
        dim=one.dim,
        dtype=one.dtype,
        layers=layers,
        ranks=ranks,
        sources=_sources(held, ranks, source_shapes),
        shapes=tuple(tensor.shape for tensor in held),
        nbytes=tuple(tensor.nbytes for tensor in held),
        padding=tuple(tensor.padding for tensor in held),
        pieces=tuple(tuple((p.label, *p.ranges[t.dim]) for p in t.pieces) for t in held),
    )


def _sources(
    held: Sequence[TensorReport], ranks: Sequence[int], source_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[SourcePicture, ...]:
    """Each source (or labelled block of a fused one), with who holds which entries of it."""
    dim = held[0].dim
    owners: dict[tuple[str, str], dict[tuple[int, int], list[int]]] = {}
    for rank, tensor in zip(ranks, held, strict=True):
        for piece in tensor.pieces:
            owners.setdefault((piece.source, piece.label), {}).setdefault(piece.ranges[dim], []).append(rank)
    blocks = [source for source, _ in owners]
    found = []
    for (name, label), ranges in owners.items():
        shape = list(source_shapes[name])
        first, last = min(ranges)[0], max(stop for _, stop in ranges)
        if blocks.count(name) == 1:  # not a block of a fused source: the whole of it
            first, last = 0, shape[dim]
        shape[dim] = last - first
        found.append(SourcePicture(pattern(name), label, tuple(shape), _bands(ranges, first, last)))
    return tuple(found)


def _bands(ranges: Mapping[tuple[int, int], Sequence[int]], first: int, last: int) -> tuple[Band, ...]:
    """``ranges`` in order, with a band of no rank wherever there is a gap between ``first`` and ``last``."""
    bands, reach = [], first
    for (start, stop), ranks in sorted(ranges.items()):
        if start > reach:
            bands.append(Band(reach, start, ()))
        bands.append(Band(start, stop, tuple(ranks)))
        reach = stop
    if reach < last:
        bands.append(Band(reach, last, ()))
    return tuple(bands)
