"""How many bytes each rank of a size gets, straight from the cuts: for all sizes at once, where a plan for each of them
would be thousands of rectangles.

Splits of a model have few different cuts, so what counts is summed up once for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from tpctl.partition.cuts import Cut, Dealt, Units
from tpctl.partition.split import Stack, TensorSplit


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds of a model's weights, and what of it is read for one token; in bytes.

    ``scales``: how many of them are entries that a border divides, of which the rank before has a copy.
    """

    weights: int
    read: int
    scales: int


class DealtBytes:
    """The bytes of all ranks at any size.

    Args:
        splits: of every sort of tensor.
        bits: of one element of a stored tensor in all layers that it stands for, by name.
        chosen: of stored tensors with experts, how many of them a token takes, by name; all of others.
        unread: names of stored tensors that are looked up, not read.
    """

    def __init__(
        self, splits: Iterable[TensorSplit], bits: Mapping[str, int], chosen: Mapping[str, int], unread: Iterable[str]
    ) -> None:
        self._terms: dict[tuple[Cut, int, Stack | None, int | None], int] = {}
        left = set(unread)
        for split in splits:
            takes = 0 if split.name in left else chosen.get(split.name)
            for part in split.parts:
                key = (part.cut, part.length, split.stack, takes)
                self._terms[key] = self._terms.get(key, 0) + prod(split.others) * bits[split.name]

    def ranks(self, tp_size: int) -> list[RankBytes]:
        """Of each rank. Raises ``PartitionError`` if an axis cannot be cut so."""
        weights, read, scales = [0] * tp_size, [0] * tp_size, [0] * tp_size
        for (cut, length, stack, takes), bits in self._terms.items():
            held = cut.ranges(length, tp_size)
            experts = None if stack is None else stack.cut.ranges(stack.count, tp_size)
            groups = stack.cut.groups if stack is not None and isinstance(stack.cut, Dealt) else 1
            divided = _divided(cut, tp_size)
            for rank in range(tp_size):
                there = 1 if experts is None else len(experts[rank])
                # Of whole experts a token's may lie evenly on all groups at best, which is what a limit is about.
                taken = there if takes is None else min(there, -(-takes // groups))
                weights[rank] += there * len(held[rank]) * bits
                read[rank] += taken * len(held[rank]) * bits
                scales[rank] += there * divided[rank] * bits
        return [RankBytes(*(bits // 8 for bits in found)) for found in zip(weights, read, scales, strict=True)]


def _divided(cut: Cut, tp_size: int) -> list[int]:
    """How many of a rank's entries along an axis the rank before has too: those that its first border divides."""
    if not isinstance(cut, Units) or cut.packed:
        return [0] * tp_size
    elements = cut.cut.ranges(cut.elements, tp_size)
    return [int(len(held) > 0 and held.start > 0 and cut.divides(held.start)) for held in elements]
