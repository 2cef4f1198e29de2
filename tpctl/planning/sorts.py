"""Which layers of a checkpoint are cut alike, so that one of each sort can stand for them all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tpctl.arch.blueprint import Blueprint, renamed
from tpctl.partition.split import TensorSplit


@dataclass(frozen=True)
class Sorts:
    """The sorts of layers that a model has.

    Attributes:
        firsts: the first layer of each sort.
        stands_for: for each stored tensor the one of ``small`` that is cut like it.
        names: of the checkpoint's tensors, those of ``small``; none where there is only a config.
    """

    firsts: tuple[int, ...]
    stands_for: Mapping[str, str]
    names: frozenset[str]

    @classmethod
    def of(cls, blueprint: Blueprint, splits: Sequence[TensorSplit], names: Collection[str]) -> Sorts:
        """Those of a model with ``splits``, whose checkpoint holds tensors ``names``."""
        layers: dict[int, dict[str, TensorSplit]] = defaultdict(dict)
        found, stands_for = _numbered(blueprint.prefix), {}
        for split in splits:
            if match := found.match(split.name):
                layers[int(match[1])][split.name[match.end() :]] = split
            else:
                stands_for[split.name] = split.name
        sorts: dict[tuple[object, ...], int] = {}
        firsts: list[int] = []
        for number, held in layers.items():
            kind = tuple((name, *_cut(split)) for name, split in held.items())
            if kind not in sorts:
                sorts[kind] = len(firsts)
                firsts.append(number)
            first = blueprint.prefix.format(sorts[kind])
            stands_for |= {blueprint.prefix.format(number) + name: first + name for name in held}
        return cls(
            tuple(firsts), {split.name: stands_for[split.name] for split in splits}, _kept(blueprint, names, firsts)
        )

    def small(self, blueprint: Blueprint) -> Blueprint:
        """The model with one layer of each sort."""
        return replace(blueprint, layers=tuple(blueprint.layers[first] for first in self.firsts))


def _kept(blueprint: Blueprint, names: Collection[str], firsts: Sequence[int]) -> frozenset[str]:
    """``names`` that are in no layer or in one of ``firsts``, whose places are the numbers that they then have."""
    prefix = renamed(blueprint.prefix, blueprint.root(names))
    found, place = _numbered(prefix), {str(first): number for number, first in enumerate(firsts)}
    kept = set()
    for name in names:
        if (match := found.match(name)) is None:
            kept.add(name)
        elif match[1] in place:
            kept.add(prefix.format(place[match[1]]) + name[match.end() :])
    return frozenset(kept)


def _numbered(prefix: str) -> re.Pattern[str]:
    """What finds a layer's number in a name."""
    return re.compile(re.escape(prefix).replace(re.escape("{}"), r"(\d+)"))


def _cut(split: TensorSplit) -> tuple[object, ...]:
    """What decides which part of a tensor a rank has."""
    return split.rule, tuple((part.length, part.cut) for part in split.parts), split.dim, split.others, split.stack
