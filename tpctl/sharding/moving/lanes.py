"""Which logical tensors have to be moved together, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tpctl.partition.cuts import Range
from tpctl.sharding.moving.layout import Stored, Strip

Place = tuple[Stored, Strip]


@dataclass(frozen=True)
class Move:
    """Stored tensors to read and to write. Reads with a known digest are checked against it; written bytes
    are digested where ``digest`` says so."""

    reads: tuple[Stored, ...]
    writes: tuple[Stored, ...]
    digest: bool = True

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.writes)


@dataclass(frozen=True)
class Lane:
    """Logical tensors whose rows pass together, since a stored tensor has them beside each other; mostly it is one.

    Attributes:
        sources: their names.
        reads, writes: the strips of stored tensors that are made of them.
    """

    sources: tuple[str, ...]
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each logical tensor, as far as they are read."""
        found = dict.fromkeys(self.sources, (0, 0))
        for _, strip in self.reads:
            for region in strip.regions:
                rows, cols = found[region.source]
                found[region.source] = max(rows, region.rows.stop), max(cols, region.cols.stop)
        return found

    def holding(self, frame: int) -> Lane:
        """The same, less the tensors that do not hold the expert ``frame``."""
        reads, writes = (
            tuple(place for place in places if place[0].frames.start <= frame < place[0].frames.stop)
            for places in (self.reads, self.writes)
        )
        return replace(self, reads=reads, writes=writes)

    @property
    def is_read_whole(self) -> bool:
        """Whether what is read holds all that is written."""
        for source in self.sources:
            read, written = (
                [region for _, strip in places for region in strip.regions if region.source == source]
                for places in (self.reads, self.writes)
            )
            for axis in ("rows", "cols"):
                held = union(getattr(region, axis) for region in read)
                for one in (getattr(region, axis) for region in written):
                    if not any(run.start <= one.start and one.stop <= run.stop for run in held):
                        return False
        return True

    def wanted_rows(self) -> list[Range]:
        """The runs of rows to read, ascending: those that are written, and all whose digest is to be checked."""
        runs = [strip.rows for stored, strip in self.reads if stored.digest is not None]
        for one in union(strip.rows for _, strip in self.reads):
            runs += [overlap(one, other) for other in union(strip.rows for _, strip in self.writes)]
        return union(run for run in runs if len(run))


def lanes(move: Move) -> Iterator[Lane]:
    """The lanes of ``move``, in the order in which the strips of each stored tensor lie: what passes is in the order of
    its bytes, and can be hashed. What is read and neither written nor checked is in none."""
    reads, writes = _by_source(move.reads), _by_source(move.writes)
    checked = (stored for stored in move.reads if stored.digest is not None)
    done: set[str] = set()
    for stored in (*checked, *move.writes):
        for strip in stored.strips:
            for region in strip.regions:
                if region.source not in done:
                    sources = _together(region.source, reads, writes)
                    done |= sources.keys()
                    lane = Lane(tuple(sources), _places(sources, reads), _places(sources, writes))
                    if lane.reads:
                        yield lane


def segments(move: Move) -> list[Range]:
    """Runs of experts, ascending, that the same stored tensors hold; ``ONE`` where there are none."""
    held = [stored.frames for stored in (*move.reads, *move.writes)]
    borders = sorted({edge for frames in held for edge in (frames.start, frames.stop)})
    return [Range(first, stop) for first, stop in pairwise(borders)]


def overlap(one: Range, other: Range) -> Range:
    start = max(one.start, other.start)
    return Range(start, max(start, min(one.stop, other.stop)))


def union(ranges: Iterable[Range]) -> list[Range]:
    """Runs, ascending and apart, that together are ``ranges``."""
    found: list[Range] = []
    for rng in sorted(ranges, key=lambda rng: (rng.start, rng.stop)):
        if found and rng.start <= found[-1].stop:
            found[-1] = Range(found[-1].start, max(found[-1].stop, rng.stop))
        else:
            found.append(rng)
    return found


def _by_source(tensors: Sequence[Stored]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for stored in tensors:
        for strip in stored.strips:
            # Once for each source, of which it may have several regions: q, k and v of one tensor.
            for source in dict.fromkeys(region.source for region in strip.regions):
                found.setdefault(source, []).append((stored, strip))
    return found


def _together(source: str, *tables: dict[str, list[Place]]) -> dict[str, None]:
    """``source`` and all that lies beside it somewhere, or beside such a one."""
    found, left = {source: None}, [source]
    while left:
        one = left.pop()
        for table in tables:
            for _, strip in table.get(one, ()):
                if len(strip.regions) > 1:
                    new = [region.source for region in strip.regions if region.source not in found]
                    found |= dict.fromkeys(new)
                    left += new
    return found


def _places(sources: dict[str, None], table: dict[str, list[Place]]) -> tuple[Place, ...]:
    if len(sources) == 1:
        return tuple(place for source in sources for place in table.get(source, ()))
    return tuple({id(strip): (stored, strip) for source in sources for stored, strip in table.get(source, ())}.values())
