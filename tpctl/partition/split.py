"""How the tensors of a checkpoint become those of a shard, as data.

    column-parallel   W [out, in] cut along ``out``; the ranks' outputs concatenate to the whole output
    row-parallel      W [out, in] cut along ``in``; the ranks' outputs are partial sums of the whole output
    merged column     gate and up, each cut along ``out``, stacked so that one GEMM gives both
    QKV               q, k and v cut along ``out`` in whole heads, stacked likewise
    vocabulary        embedding rows, padded to a multiple of 64
    experts           weights of a mixture's experts, stacked along a new first axis: each expert is cut as any linear,
                      or whole experts are dealt to the ranks, or both
    replicated        the whole weight on every rank

Which rank gets which range of the cut axis is said by a ``Cut`` (``partition.cuts``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tpctl.partition.cuts import Cut

EACH = "{}"
"""In a source's name: the number of an expert."""


class Rule(StrEnum):
    """How a stored tensor is cut; the names of the layers that hold it."""

    REPLICATED = "replicated"
    COLUMN = "column"
    MERGED_COLUMN = "merged-column"
    QKV = "qkv"
    ROW = "row"
    EXPERTS = "experts"
    VOCAB = "vocab"


@dataclass(frozen=True, slots=True)
class Part:
    """``length`` consecutive entries of a source tensor's cut axis, from ``offset``, dealt to the ranks by ``cut``.

    A fused source (Phi-3's ``qkv_proj``) is several parts of one tensor; ``label`` says which this is ("q", "gate").
    """

    source: str
    length: int
    cut: Cut
    offset: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of a layer: the new first axis, of ``count`` entries, along which their weights are stacked.

    A source whose name has ``{}`` in it stands for one tensor an expert, with its number there; any other is stacked
    in the checkpoint already.
    """

    count: int
    cut: Cut


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """One stored tensor: its parts are cut along ``dim`` and each rank's pieces stacked, in order, along ``dim``.

    Attributes:
        dim: of one expert's tensor, where there is a ``stack``.
        others: the lengths of the axes that are not cut, in order, without that of the stack.
        stack: the experts, whose tensors these are.
        dtypes: safetensors dtypes that the sources may have, which no cast changes; ``None``: floats.
        optional: a checkpoint may lack it.
    """

    name: str
    rule: Rule
    parts: tuple[Part, ...]
    dim: int = 0
    others: tuple[int, ...] = ()
    stack: Stack | None = None
    dtypes: tuple[str, ...] | None = None
    optional: bool = False

    def shape(self, along: int) -> tuple[int, ...]:
        """The shape of a tensor of this kind (of one expert) that has ``along`` entries on the cut axis."""
        return (*self.others[: self.dim], along, *self.others[self.dim :])

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of all ranks' shards put together, copies and padding apart."""
        shape = self.shape(sum(part.length for part in self.parts))
        return shape if self.stack is None else (self.stack.count, *shape)

    @property
    def by_rows(self) -> bool:
        """Whether ranks differ in rows of the sources, seen as matrices (see ``sharding.moving.layout``)."""
        return self.dim == 0 and self.rule is not Rule.REPLICATED

    @property
    def sources(self) -> Iterator[str]:
        """The names of the tensors that it is made of."""
        for source in dict.fromkeys(part.source for part in self.parts):
            yield from tensor_names(source, 0 if self.stack is None else self.stack.count)


def tensor_names(source: str, stop: int, start: int = 0) -> Iterable[str]:
    """The checkpoint's tensors that ``source`` of a ``TensorSplit`` stands for: one, or one for each expert."""
    if EACH not in source:
        return (source,)
    return map(partial(source.replace, EACH), map(str, range(start, stop)))


def source_shapes(splits: Iterable[TensorSplit]) -> dict[str, tuple[int, ...]]:
    """The shape that each source tensor must have for ``splits`` to read it whole."""
    lengths: dict[str, int] = {}
    of: dict[str, TensorSplit] = {}
    for split in splits:
        for part in split.parts:
            lengths[part.source] = max(part.offset + part.length, lengths.get(part.source, 0))
            of[part.source] = split
    shapes: dict[str, tuple[int, ...]] = {}
    for source, along in lengths.items():
        split = of[source]
        shape, stack = split.shape(along), split.stack
        if stack is not None and EACH not in source:
            shape = (stack.count, *shape)
        shapes |= dict.fromkeys(tensor_names(source, 0 if stack is None else stack.count), shape)
    return shapes
