"""The partition plan: for every rank and stored tensor, which rectangle of which source tensor lands where.

The sharder, the loader, merge, reshard, verify, the inspector, the memory planner and the layers' local shapes all
read this one object. Nothing else computes an offset, divides a head count or pads a vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from tpctl.errors import CheckpointError, PartitionError
from tpctl.partition.cuts import Cut, DividedWord, Range, TooFewUnits, Units
from tpctl.partition.split import EACH, Part, Rule, TensorSplit, source_shapes, tensor_names

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a source tensor and its place in the stored one.

    ``start`` is the rectangle's first index in the source, ``at`` its first index in the stored tensor; both and
    ``shape`` have the stored tensor's rank. A source with ``{}`` in its name is one tensor for each index of the first
    axis, seen as if they were stacked.
    """

    source: str
    start: Shape
    shape: Shape
    at: Shape
    label: str = ""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def tensors(self) -> Iterable[str]:
        """The names of the source tensors that it is of."""
        first = self.start[0] if self.start else 0
        return tensor_names(self.source, first + (self.shape[0] if self.shape else 1), first)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of one rank's shard: the disjoint ``pieces`` that fill it; what no piece covers is zero.

    ``dim`` is the axis along which they were cut and lie; ``stacked``: the first axis is one of experts.
    """

    name: str
    rule: Rule
    dim: int
    shape: Shape
    pieces: tuple[Piece, ...]
    stacked: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def by_rows(self) -> bool:
        """As of ``TensorSplit``."""
        return self.dim == self.stacked and self.rule is not Rule.REPLICATED

    @property
    def padding(self) -> int:
        """How many elements no piece covers."""
        return self.numel - sum(piece.numel for piece in self.pieces)


@dataclass(frozen=True)
class PartitionPlan:
    """How one model is cut into ``tp_size`` shards. Build it with ``PartitionPlan.build``."""

    tp_size: int
    splits: tuple[TensorSplit, ...]
    shards: tuple[Mapping[str, PlannedTensor], ...]

    @classmethod
    def build(cls, splits: Sequence[TensorSplit], tp_size: int) -> PartitionPlan:
        """Cut every tensor of ``splits`` over ``tp_size`` ranks and check the result (see ``check``).

        Raises:
            PartitionError: the model cannot be cut into ``tp_size`` shards.
        """
        shards: tuple[dict[str, PlannedTensor], ...] = tuple({} for _ in range(tp_size))
        cuts: dict[tuple[Cut, int], tuple[Range, ...]] = {}  # layers are cut alike

        def ranges(cut: Cut, length: int) -> tuple[Range, ...]:
            if (cut, length) not in cuts:
                cuts[cut, length] = cut.ranges(length, tp_size)
            return cuts[cut, length]

        for split in splits:
            try:
                held = [ranges(part.cut, part.length) for part in split.parts]
            except DividedWord as error:
                fits = ", ".join(str(size) for size in range(1, tp_size) if _fits(splits, size))
                advice = f"use --tp {fits}" if fits else "no smaller one fits"
                raise PartitionError(f"{split.name}: {error}; {advice}") from None
            except TooFewUnits as error:
                raise TooFewUnits(f"{split.name}: {error}") from None
            experts = None if split.stack is None else ranges(split.stack.cut, split.stack.count)
            for rank, stored in enumerate(_cut(split, held, experts, tp_size)):
                shards[rank][split.name] = stored
        plan = cls(tp_size, tuple(splits), shards)
        plan.check()
        return plan

    def shape(self, rank: int, name: str) -> Shape:
        """The shape of stored tensor ``name`` on ``rank``."""
        return self.shards[rank][name].shape

    @cached_property
    def source_shapes(self) -> Mapping[str, Shape]:
        """The shape that each tensor of the checkpoint must have."""
        return source_shapes(self.splits)

    @cached_property
    def stacks(self) -> frozenset[str]:
        """Source tensors whose first axis is of experts."""
        stacked = (split for split in self.splits if split.stack is not None)
        return frozenset(part.source for split in stacked for part in split.parts if EACH not in part.source)

    @property
    def vocab_slices(self) -> tuple[Range, ...]:
        """The rows of the padded vocabulary that each rank holds."""
        part = next(split.parts[0] for split in reversed(self.splits) if split.rule is Rule.VOCAB)  # the head
        return part.cut.ranges(part.length, self.tp_size)

    def pieces(self) -> Iterator[tuple[int, PlannedTensor, Piece]]:
        """Every piece of the plan as (rank, stored tensor, piece)."""
        for rank, shard in enumerate(self.shards):
            for stored in shard.values():
                for piece in stored.pieces:
                    yield rank, stored, piece

    def check(self) -> None:
        """Check that the ranks together hold every source element, and that no rank holds one twice.

        Parts of one source may have a scale in common, of a block in which the first ends; a rank has it for each.

        Raises:
            PartitionError: an element is lost or doubled, or parts are not below each other;
                a defect of the rules, never of a checkpoint.
        """
        for split in self.splits:
            held: dict[tuple[str, str], list[tuple[int, Piece]]] = {}
            for rank, shard in enumerate(self.shards):
                for piece in shard[split.name].pieces:
                    held.setdefault((piece.source, piece.label), []).append((rank, piece))
            ends: dict[str, int] = {}
            for part in split.parts:
                shared = int(isinstance(part.cut, Units) and part.cut.before > 0)
                if part.offset != ends.get(part.source, 0) - shared:
                    raise PartitionError(
                        f"{split.name}: {part.label or 'its part'} begins at entry {part.offset} of {part.source}, "
                        f"but what is before it ends at {ends.get(part.source, 0)}"
                    )
                ends[part.source] = part.offset + part.length
                _check_part(split, part, held.get((part.source, part.label), []))

    def check_source(self, shapes: Mapping[str, Shape], ignored: Collection[str] = ()) -> None:
        """Check a checkpoint's tensor shapes against the plan before a byte of data is read.

        Args:
            shapes: the checkpoint's tensors, from its headers.
            ignored: names of tensors that the model is known not to need.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is one the plan does not know.
        """
        for name, expected in self.source_shapes.items():
            found = shapes.get(name)
            if found is None:
                raise CheckpointError(
                    f"the checkpoint has no tensor {name} ({_dims(expected)} expected from config.json); "
                    "it is incomplete or its config.json belongs to another model"
                )
            if tuple(found) != expected and not (found == () and expected == (1,)):  # a scalar is one entry
                raise CheckpointError(
                    f"tensor {name} is {_dims(found)} in the checkpoint but {_dims(expected)} by config.json; "
                    "the two do not belong together"
                )
        if unknown := sorted(shapes.keys() - self.source_shapes.keys() - set(ignored)):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"the checkpoint holds a tensor that this architecture does not use: {unknown[0]}{more}; "
                "tpctl refuses to drop weights silently"
            )


def _fits(splits: Sequence[TensorSplit], tp_size: int) -> bool:
    """Whether all of ``splits`` can be cut into so many."""
    try:
        for cut, length in {(part.cut, part.length) for split in splits for part in split.parts}:
            cut.ranges(length, tp_size)
    except PartitionError:
        return False
    return True


def _cut(
    split: TensorSplit, cuts: Sequence[Sequence[Range]], experts: Sequence[Range] | None, tp_size: int
) -> Iterator[PlannedTensor]:
    """Each rank's stored tensor for ``split``, in rank order.

    Args:
        cuts: the ranks' ranges of each part.
        experts: the ranks' ranges of the stack.
    """
    stacked = experts is not None
    dim = split.dim + stacked
    for rank in range(tp_size):
        lead = () if experts is None else (len(experts[rank]),)
        first = () if experts is None else (experts[rank].start,)
        pieces, along = [], 0
        for part, ranges in zip(split.parts, cuts, strict=True):
            held = ranges[rank]
            real = held.clipped(part.length)
            if len(real) and 0 not in lead:
                shape = split.shape(len(real))
                start, at = [0] * len(shape), [0] * len(shape)
                start[split.dim], at[split.dim] = part.offset + real.start, along
                place = (*first, *start), (*lead, *shape), (*(0 for _ in lead), *at)
                pieces.append(Piece(part.source, *place, part.label))
            along += len(held)
        yield PlannedTensor(split.name, split.rule, dim, (*lead, *split.shape(along)), tuple(pieces), stacked)


def _check_part(split: TensorSplit, part: Part, held: Sequence[tuple[int, Piece]]) -> None:
    """Raise unless ``held`` (rank, piece) covers ``part``, of every expert, with no rank holding a place twice."""
    dim = split.dim + (split.stack is not None)
    wanted = Range(part.offset, part.offset + part.length)
    along = [(rank, Range(piece.start[dim], piece.start[dim] + piece.shape[dim])) for rank, piece in held]
    if split.stack is None:
        _check_cover(split.name, part.source, wanted, along)
        return
    experts = [Range(piece.start[0], piece.start[0] + piece.shape[0]) for _, piece in held]
    borders = sorted({0, split.stack.count, *(edge for one in experts for edge in (one.start, one.stop))})
    for first in borders[:-1]:
        among = [one for one, held_by in zip(along, experts, strict=True) if held_by.start <= first < held_by.stop]
        _check_cover(split.name, part.source.replace(EACH, str(first)), wanted, among)


def _check_cover(name: str, source: str, wanted: Range, held: Sequence[tuple[int, Range]]) -> None:
    """Raise unless ``held`` (rank, range of the source axis) covers ``wanted`` with no rank holding a place twice."""
    inside = sorted(
        (rng.start, rng.stop, rank) for rank, rng in held if rng.start >= wanted.start and rng.stop <= wanted.stop
    )
    reach, last_stop = wanted.start, dict[int, int]()
    for start, stop, rank in inside:
        if start > reach:
            raise PartitionError(f"{name}: entries {reach}-{start} of {source} are held by no rank")
        if start < last_stop.get(rank, start):
            raise PartitionError(f"{name}: rank {rank} holds entries {start}-{last_stop[rank]} of {source} twice")
        last_stop[rank] = stop
        reach = max(reach, stop)
    if reach < wanted.stop:
        raise PartitionError(f"{name}: entries {reach}-{wanted.stop} of {source} are held by no rank")


def _dims(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape) or "a scalar"


def check_ranks(ranks: Sequence[int] | None, tp_size: int) -> tuple[int, ...]:
    """``ranks`` in order without repetition; all of them by default. Raises ``PartitionError`` for one too large."""
    if ranks is None:
        return tuple(range(tp_size))
    for rank in ranks:
        if not 0 <= rank < tp_size:
            raise PartitionError(f"rank {rank} does not exist at tp {tp_size}; ranks are 0 to {tp_size - 1}")
    return tuple(sorted(set(ranks)))
