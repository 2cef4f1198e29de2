"""Cuts: rules that deal one axis of a weight to the ranks of a tensor-parallel group.

Given the length of an axis and the number of ranks, a ``Cut`` names each rank's half-open range of that axis. Ranges
are in elements of the axis unless a name says heads. A weight may be stored as several tensors (packed values, scales);
each has one entry for every so many elements of an axis, and follows the cut of that axis (``Units``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Protocol

from tpctl.errors import PartitionError

VOCAB_MULTIPLE = 64
"""Vocabularies are padded to a multiple of this many rows, as serving engines do."""

ALIGNMENT = 16
"""Uneven cuts fall on multiples of this many elements where the axis allows, so that GEMM rows stay aligned."""


@dataclass(frozen=True, slots=True)
class Range:
    """A half-open range ``[start, stop)``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Range:
        """The same range in units ``factor`` times finer (heads to elements)."""
        return Range(self.start * factor, self.stop * factor)

    def clipped(self, limit: int) -> Range:
        """The part of the range below ``limit``; empty if there is none."""
        return Range(min(self.start, limit), min(self.stop, limit))


@dataclass(frozen=True, slots=True)
class HeadShare:
    """One rank's attention heads: ``query`` and ``kv`` are ranges of head indices.

    Query head ``h`` of a model with ``group`` query heads per KV head reads KV head ``h // group``; every query head
    of a share reads a KV head of the same share.
    """

    query: Range
    kv: Range


def split_evenly(total: int, parts: int, granularity: int = 1) -> tuple[Range, ...]:
    """Cut ``[0, total)`` into ``parts`` consecutive ranges whose lengths are multiples of ``granularity``.

    The remainder, in granules, goes to the first ranges; a last partial granule belongs to the last range that
    holds anything.

    Raises:
        TooFewUnits: there are fewer granules than parts, so a rank would hold nothing.
    """
    granules = -(-total // granularity)
    if granules < parts:
        raise TooFewUnits(
            f"cannot cut {total} elements into {parts} parts of whole multiples of {granularity}: "
            f"only {granules} exist; use a tensor-parallel size of at most {granules}"
        )
    share, rest = divmod(granules, parts)
    ranges, start = [], 0
    for part in range(parts):
        stop = start + (share + (part < rest)) * granularity
        ranges.append(Range(start, min(stop, total)))
        start = stop
    return tuple(ranges)


def split_aligned(total: int, parts: int) -> tuple[Range, ...]:
    """Cut ``[0, total)`` exactly evenly if ``parts`` divides it, else in steps of ``ALIGNMENT`` where possible."""
    if total % parts == 0 or total % ALIGNMENT or total // ALIGNMENT < parts:
        return split_evenly(total, parts)
    return split_evenly(total, parts, ALIGNMENT)


def split_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> tuple[HeadShare, ...]:
    """Deal attention heads to ranks, in whole heads, for any ``tp_size`` from 1 to ``num_heads``.

    With ``tp_size <= num_kv_heads`` each rank gets a run of KV heads together with their query groups. With more
    ranks than KV heads, each KV head is held by several ranks that divide its query group, and every rank holds
    exactly one KV head. Remainders go to the first ranks, or to the ranks of the first KV heads:

        9 query / 3 KV heads    tp 2:  q 0-5 kv 0-1 | q 6-8 kv 2
                                tp 5:  q 0-1 kv 0 | q 2 kv 0 | q 3-4 kv 1 | q 5 kv 1 | q 6-8 kv 2

    Raises:
        PartitionError: ``tp_size`` is not between 1 and ``num_heads``, or the heads do not form equal groups.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise PartitionError(
            f"{num_heads} query heads do not form equal groups over {num_kv_heads} KV heads; check config.json"
        )
    if not 1 <= tp_size <= num_heads:
        raise PartitionError(
            f"tensor-parallel size {tp_size} does not fit {num_heads} query heads; use --tp 1 to {num_heads}"
        )
    group = num_heads // num_kv_heads
    if tp_size <= num_kv_heads:
        return tuple(HeadShare(kv.scaled(group), kv) for kv in split_evenly(num_kv_heads, tp_size))
    shares = []
    for kv_head, ranks in enumerate(split_evenly(tp_size, num_kv_heads)):
        for query in split_evenly(group, len(ranks)):
            first = kv_head * group
            shares.append(HeadShare(Range(first + query.start, first + query.stop), Range(kv_head, kv_head + 1)))
    return tuple(shares)


def pad_vocab(vocab_size: int) -> int:
    """The number of vocabulary rows that are stored: ``vocab_size`` rounded up to a multiple of 64."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class TooFewUnits(PartitionError):
    """A rank would hold nothing."""


class DividedWord(PartitionError):
    """A border would be inside of a packed word."""


class Cut(Protocol):
    """Gives every rank its range of an axis of ``length`` elements. Ranges may overlap where ranks hold copies,
    and may reach beyond ``length`` where the stored axis is padded with zeros."""

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Every rank holds the whole axis."""

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        return (Range(0, length),) * tp_size


@dataclass(frozen=True, slots=True)
class Even:
    """As even as possible; ``granularity`` above 1 keeps whole blocks (of a quantised weight, say) together."""

    granularity: int = 1

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        if self.granularity == 1:
            return split_aligned(length, tp_size)
        return split_evenly(length, tp_size, self.granularity)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Borders on multiples of ``unit`` elements (a block that has one scale), as even as whole units allow.

    Where ranks outnumber the units, or where ``even`` asks for it, borders are on multiples of ``fine`` elements
    instead, as even as possible, and a unit that a border divides is needed on both sides.
    """

    unit: int
    fine: int = 1
    even: bool = False

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        units = -(-length // self.unit)
        divides = units % tp_size == 0 and length % self.unit == 0
        if units >= tp_size and (divides or not self.even):
            return split_evenly(length, tp_size, self.unit)
        aligned = lcm(self.fine, ALIGNMENT)
        if length % (tp_size * self.fine) == 0 or -(-length // aligned) < tp_size:
            aligned = self.fine
        return split_evenly(length, tp_size, aligned)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Runs of ``factor`` elements that stay together (a gate beside its up), dealt by ``cut``."""

    cut: Cut
    factor: int

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        assert length % self.factor == 0, (length, self)
        return tuple(held.scaled(self.factor) for held in self.cut.ranges(length // self.factor, tp_size))


@dataclass(frozen=True, slots=True)
class Units:
    """Entries of a tensor that has one for every ``unit`` elements of an axis of ``elements``, which ``cut`` deals.

    An entry whose elements are on two ranks is on both: a copied scale. With ``packed`` it holds values themselves, and
    a border inside of it is refused. The axis may begin ``before`` elements behind the start of the first entry, whose
    first ones belong to what is stored before it; nothing that is packed does.
    """

    cut: Cut
    unit: int
    elements: int
    packed: bool = False
    before: int = 0

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        assert length == -(-(self.before + self.elements) // self.unit), (length, self)
        assert self.before < self.unit and not (self.packed and self.before), self
        found = self.cut.ranges(self.elements, tp_size)
        if self.packed:
            for held in found:
                if held.start % self.unit and len(held):
                    raise DividedWord(
                        f"at tp {tp_size} a border would fall on element {held.start}, inside of a word that packs "
                        f"{self.unit} values"
                    )
        return tuple(self._entries(held) if len(held) else Range(0, 0) for held in found)

    def divides(self, element: int) -> bool:
        """Whether a border before ``element`` of the axis is inside of an entry."""
        return (self.before + element) % self.unit > 0

    def _entries(self, held: Range) -> Range:
        return Range((self.before + held.start) // self.unit, -(-(self.before + held.stop) // self.unit))


@dataclass(frozen=True, slots=True)
class Dealt:
    """Whole experts, dealt to ``groups`` of consecutive ranks; the ranks of a group hold the same ones."""

    groups: int

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        size = _group_size(tp_size, self.groups)
        return tuple(held for held in split_evenly(length, self.groups) for _ in range(size))


@dataclass(frozen=True, slots=True)
class Within:
    """``cut`` among the ranks of each of ``groups`` groups, alike in all of them."""

    cut: Cut
    groups: int

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        return self.cut.ranges(length, _group_size(tp_size, self.groups)) * self.groups


def _group_size(tp_size: int, groups: int) -> int:
    if tp_size % groups:
        sizes = ", ".join(str(size) for size in range(1, tp_size + 1) if tp_size % size == 0)
        ranks = "1 rank does" if tp_size == 1 else f"{tp_size} ranks do"
        raise PartitionError(f"{ranks} not form {groups} equal groups; use --ep {sizes}")
    return tp_size // groups


@dataclass(frozen=True, slots=True)
class QueryHeads:
    """Whole query heads of ``head_dim`` elements each, by ``split_heads``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        assert length == self.num_heads * self.head_dim, (length, self)
        shares = split_heads(self.num_heads, self.num_kv_heads, tp_size)
        return tuple(share.query.scaled(self.head_dim) for share in shares)


@dataclass(frozen=True, slots=True)
class KVHeads:
    """Whole KV heads of ``head_dim`` elements each, by ``split_heads``; copies where ranks outnumber them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        assert length == self.num_kv_heads * self.head_dim, (length, self)
        shares = split_heads(self.num_heads, self.num_kv_heads, tp_size)
        return tuple(share.kv.scaled(self.head_dim) for share in shares)


@dataclass(frozen=True, slots=True)
class Vocab:
    """Rows of the padded vocabulary; the last ranks' ranges may reach beyond the real one."""

    def ranges(self, length: int, tp_size: int) -> tuple[Range, ...]:
        return split_aligned(pad_vocab(length), tp_size)
