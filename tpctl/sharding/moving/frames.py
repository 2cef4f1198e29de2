"""Many frames of a lane at once: from what was read of each expert to what is written of it, in as few copies as can
be. Where each piece goes is the same for all of them, and is worked out once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpctl.partition.cuts import Range
from tpctl.sharding.moving.files import Bytes
from tpctl.sharding.moving.lanes import Lane, Place
from tpctl.sharding.moving.layout import Region, Strip, item_size
from tpctl.sharding.moving.space import Space

_SHORT = 128
"""Rows of at most so many bytes are copied as one element each, which takes half of the time or less."""


@dataclass(frozen=True, slots=True)
class _Patch:
    """A rectangle of every frame of ``source``, and its place in those of the stored tensor of that ``id``; bytes."""

    source: str
    stored: int
    inside: tuple[slice, slice, slice]
    at: tuple[slice, slice, slice]


class LaneFrames:
    """How frames of ``lane`` pass that are read and written whole."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.dtypes, (size_in, size_out) = dtypes(lane)
        sizes = lane.sizes()
        self._sizes = {source: (height, width * size_in) for source, (height, width) in sizes.items()}
        self._same = {
            source: id(stored)
            for source, (height, width) in sizes.items()
            for stored, _ in lane.reads
            if stored.strips == (Strip(0, (Region(source, Range(0, height), Range(0, width)),)),)
        }  # which one stored tensor holds just as they are: no copy is needed
        self._reads = [patch for patch in _patches(lane.reads, size_in) if patch.source not in self._same]
        self._writes = _patches(lane.writes, size_out)

    def gathered(self, arrays: Mapping[int, Bytes], space: Space) -> dict[str, Bytes]:
        """The logical tensors, [frame, row, byte], of the ``arrays`` of stored tensors' frames, by ``id``."""
        count = len(next(iter(arrays.values())))
        views = {source: arrays[stored] for source, stored in self._same.items()}
        for source, size in self._sizes.items():
            if source not in views:
                views[source] = space.take(count, *size)
        for patch in self._reads:
            views[patch.source][patch.inside] = arrays[patch.stored][patch.at]
        return views

    def dealt(self, views: Mapping[str, Bytes], arrays: Mapping[int, Bytes]) -> None:
        """Fill the ``arrays`` of what is written from the logical tensors."""
        for patch in self._writes:
            _copy(views[patch.source][patch.inside], arrays[patch.stored][patch.at])


def placed(strip: Strip, size: int) -> Iterator[tuple[Region, slice, slice]]:
    """The regions of ``strip``, each with its rows and its bytes of a row in a frame of the stored tensor."""
    rows, left = slice(strip.at, strip.at + len(strip.rows)), 0
    for region in strip.regions:
        width = len(region.cols) * size
        yield region, rows, slice(left, left + width)
        left += width


def dtypes(lane: Lane) -> tuple[tuple[str, str], tuple[int, int]]:
    """Of what is read and of what is written, and bytes per element of either."""
    read = lane.reads[0][0].dtype
    written = lane.writes[0][0].dtype if lane.writes else read
    return (read, written), (item_size(read, lane.sources[0]), item_size(written, lane.sources[0]))


def _patches(places: Sequence[Place], size: int) -> list[_Patch]:
    found, every = [], slice(None)
    for stored, strip in places:
        for region, rows, left in placed(strip, size):
            cols = region.cols.scaled(size)
            inside = slice(region.rows.start, region.rows.stop), slice(cols.start, cols.stop)
            found.append(_Patch(region.source, id(stored), (every, *inside), (every, rows, left)))
    return found


def _copy(source: Bytes, target: Bytes) -> None:
    """Copy ``source`` to ``target``, [frame, row, byte]."""
    width = source.shape[-1]
    if 0 < width <= _SHORT:
        row = np.dtype((np.void, width))
        target.view(row)[...] = source.view(row)
    else:
        target[...] = source
