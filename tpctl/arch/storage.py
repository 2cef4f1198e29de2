"""How a weight W [out, in] is stored: in one tensor, or in several, as data.

A cut is made in features of the weight. Every tensor it is stored as has one entry for every so many features (an
element, 8 packed values, a block of 128), and follows. What each format's tensors are named and mean is said in
``arch.formats``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import Literal

from tpctl.partition.cuts import Cut, Units, Whole

ALL = 2**31 - 1
"""A unit that no linear has as many features as: one entry for all of them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Dimension ``dim`` of a tensor runs along the features, with one entry for every ``unit`` of them.

    ``packed``: an entry holds the values of that many features, so that a border inside of it would divide a word;
    otherwise it says something about them (a scale), which both sides can have. Without ``dealt`` all entries are
    needed for any of the features, so that every rank has them.
    """

    dim: int
    unit: int = 1
    packed: bool = False
    dealt: bool = True

    def entries(self, features: int) -> int:
        return -(-features // self.unit)

    def cut(self, cut: Cut, features: int, before: int = 0) -> Cut:
        """The cut of this dimension where ``cut`` is that of the features, which begin ``before`` features behind the
        start of their first entry."""
        if not self.dealt:
            return Whole()
        return cut if self.unit == 1 else Units(cut, self.unit, features, self.packed, before)


Role = Literal["values", "scales", "zeros", "order", "divisor", "factor", "inputs", "shape", "bias"]
"""What a tensor says: codes of the weights themselves; what multiplies them; the codes that stand for zero; the group
of each input; what all scales are divided by, or multiplied by; what an engine may know of the linear's inputs; the
weight's shape; what is added."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How codes of quantised weights are packed, and what they stand for.

    Attributes:
        kind: floats of 8 bits (``e4m3``) or 4 (``e2m1``), or integers of ``bits``; those of ``uint`` have no sign.
        zero: the code that stands for zero, where no tensor says it.
        above: what is added to a stored zero.
        order: of the codes of a word of 32 bits, from the lowest on; empty: as they come.
        rounds: inputs are rounded to the same kind of numbers before they are multiplied.
    """

    kind: Literal["e4m3", "e2m1", "int", "uint"]
    bits: int = 8
    zero: int = 0
    above: int = 0
    order: tuple[int, ...] = ()
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a stored weight.

    Attributes:
        suffix: of its name in a checkpoint, behind that of the linear: ``".weight_scale"``; of fused experts it may be
            ``"_scales"`` or nothing.
        name: of the tensor in a shard, behind that of the linear and its joiner.
        dtypes: the safetensors dtypes that it may have; ``None``: those of floats, which can be cast.
        out, inp: the dimensions along the output and input features; ``None``: it does not vary along them.
        tail: lengths of further dimensions, behind those.
        optional: a checkpoint may lack it.
        role: what it says.
        last: of the weights that are stored below each other, that one's alone whose name is the last.
    """

    suffix: str
    name: str
    dtypes: tuple[str, ...] | None
    out: Axis | None = None
    inp: Axis | None = None
    tail: tuple[int, ...] = ()
    optional: bool = False
    role: Role = "values"
    last: bool = False

    def shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """Of the weight of a linear of so many output and input features. A scalar is one entry."""
        lengths = [(axis.dim, axis.entries(n)) for axis, n in ((self.out, outputs), (self.inp, inputs)) if axis]
        shape = tuple(length for _, length in sorted(lengths)) + self.tail
        return shape or (1,)

    @property
    def weights(self) -> float:
        """How many weights one element is: several of packed values, none of scales."""
        if self.out is None or self.inp is None or any(a.unit > 1 and not a.packed for a in (self.out, self.inp)):
            return 0
        return self.out.unit * self.inp.unit / prod(self.tail)


@dataclass(frozen=True)
class Storage:
    """A format, for one linear.

    Attributes:
        format: what people call it.
        entries: its tensors.
        coding: what the values stand for; ``None``: they are floats.
        constants: suffixes of tensors that hold the weight's shape, [out, in]; no rank needs them.
        unread: suffixes of further ones that no rank needs.
        ordered: suffix of a tensor with the group of each input, and how many inputs a group has, in order: it has to
            say so, for ranks have the scales of the groups that their inputs are in by that.
        others: the same under the names that other checkpoints have; those that one holds tell which it is.
    """

    format: str
    entries: tuple[Entry, ...]
    constants: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    ordered: tuple[str, int] | None = None
    others: tuple[Storage, ...] = ()
    coding: Coding | None = None

    @property
    def out_unit(self) -> int:
        """Borders between output features on multiples of this divide no unit."""
        return _unit(entry.out for entry in self.entries)

    @property
    def inp_unit(self) -> int:
        return _unit(entry.inp for entry in self.entries)

    @property
    def out_word(self) -> int:
        """Borders between output features on multiples of this divide no packed word."""
        return _unit(entry.out for entry in self.entries if entry.out and entry.out.packed)

    @property
    def inp_word(self) -> int:
        return _unit(entry.inp for entry in self.entries if entry.inp and entry.inp.packed)

    @property
    def is_dense(self) -> bool:
        return self.format == DENSE.format

    def growth(self, entry: Entry) -> int:
        """How many times as many bytes as stored the tensor ``entry`` takes while the weight is multiplied by: what is
        packed has codes of 4 bits or of 8 then, and zeros are of a byte each, of 8 bits of two."""
        if self.coding is None or self.coding.kind != "uint":
            return 1
        if entry.role == "zeros":
            return max(2, 8 // self.coding.bits)
        return max(1, 4 // self.coding.bits) if entry.role == "values" else 1

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def held(self, source: str, names: Container[str]) -> Storage:
        """This one or one of ``others``: that of which a checkpoint with tensors ``names`` has most for ``source``."""
        return max((self, *self.others), key=lambda one: sum(source + entry.suffix in names for entry in one))


def _unit(axes: Iterable[Axis | None]) -> int:
    return lcm(*(axis.unit for axis in axes if axis is not None and axis.dealt))


DENSE = Storage("dense", (Entry(".weight", "weight", None, Axis(0), Axis(1)),))
"""One tensor of floats."""

FUSED = Storage("dense", (Entry("", "weight", None, Axis(0), Axis(1)),))
"""The same, named as the linear itself: experts that a checkpoint stacks."""

FUSED_TRANSPOSED = Storage("dense", (Entry("", "weight", None, Axis(1), Axis(0)),))
"""The same, [in, out]."""
