"""Moves tensors between layouts: bands of rows, read once, through small buffers, on several threads.

A ``Move`` names stored tensors to read and stored tensors to write that share logical tensors. It is worked off in
the order in which the stored tensors' bytes lie, so that the digest of every one is computed from the bytes as they
pass:

    read                       band of the logical tensor            write
    whole rows      ------->   +--------------------------+  ----->  whole rows
    some columns    --copy->   |  rows r0..r1, all columns|  -copy-> some columns
                               +--------------------------+

The memory used is a few bands a thread, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tpctl.checkpoint.cast import cast, check_range
from tpctl.errors import ShardFolderError
from tpctl.partition.cuts import Range
from tpctl.sharding.moving.files import ByteCounter, Bytes, Files, in_parallel
from tpctl.sharding.moving.frames import LaneFrames, dtypes, placed
from tpctl.sharding.moving.lanes import Lane, Move, Place, lanes, overlap, segments
from tpctl.sharding.moving.layout import Stored, Strip, expert_name, item_size
from tpctl.sharding.moving.output import Output
from tpctl.sharding.moving.space import Space

BAND_BYTES = 1 << 20
"""Size of a band: small enough to stay in a core's cache between reading, hashing and writing."""


def move_all(
    moves: Sequence[Move], files: Files, tally: ByteCounter, *, compare: bool = False, may_overflow: bool = True
) -> dict[tuple[int | None, str], str]:
    """Carry out ``moves`` and return the BLAKE3 digest of every written tensor, by rank and name.

    Args:
        compare: read what the writes say is there and compare, instead of writing.
        may_overflow: let a cast make values infinite that are not.

    Raises:
        ShardFolderError: bytes that were read do not have the expected digest, or differ when comparing.
        CheckpointError: a file ends early.
        OverflowedError: a value is beyond the range of the dtype that it is cast to.
        OSError: reading or writing failed.
    """
    for move in moves:
        for stored in (*move.reads, *move.writes):
            for path in stored.paths:
                files.open(path)
    digests: dict[tuple[int | None, str], str] = {}
    # The largest first, so that no thread is left alone with a large one at the end.
    ordered = sorted(moves, key=lambda move: -move.nbytes)

    def task(move: Move) -> None:
        digests.update(_Mover(files, tally, compare, may_overflow).run(move))

    in_parallel([partial(task, move) for move in ordered], tally)
    return digests


def are_small(tensors: Sequence[Stored]) -> bool:
    """Whether a pass over ``tensors``, of one stored tensor, costs more in steps than in bytes."""
    return all(stored.frame_bytes < BAND_BYTES for stored in tensors)


def hash_all(tensors: Sequence[Stored], files: Files, tally: ByteCounter) -> None:
    """Read every byte of ``tensors`` and compare the digests.

    Raises:
        ShardFolderError: a digest differs; the message names tensor and rank.
        CheckpointError: a file ends early.
    """
    for stored in tensors:
        files.open(stored.path)
    ordered = sorted(tensors, key=lambda stored: -stored.nbytes)
    in_parallel([partial(_hash, stored, files, tally) for stored in ordered], tally)


def _hash(stored: Stored, files: Files, tally: ByteCounter) -> None:
    from blake3 import blake3

    digest, buffer = blake3(), np.empty(min(BAND_BYTES, stored.nbytes), np.uint8)
    for first in range(0, stored.nbytes, BAND_BYTES):
        tally.check()
        data = buffer[: stored.nbytes - first]
        files.read(stored.path, data, stored.offset + first)
        digest.update(data.data)
        tally.add(data.nbytes)
    check_digest(stored, digest.hexdigest())


class _Mover:
    """One thread's buffers and digests for one move."""

    def __init__(self, files: Files, tally: ByteCounter, compare: bool, may_overflow: bool) -> None:
        self.files, self.tally, self.compare, self.may_overflow = files, tally, compare, may_overflow
        self.space = Space.of_thread()
        self.read_hashes: dict[tuple[int | None, str], Any] = {}
        self.outputs: dict[tuple[int | None, str], Output] = {}

    def run(self, move: Move) -> dict[tuple[int | None, str], str]:
        from blake3 import blake3

        self.read_hashes = {_key(s): blake3() for s in move.reads if s.digest is not None}
        if not self.compare:
            self.outputs = {_key(s): Output(s, self.files, blake3() if move.digest else None) for s in move.writes}
        every = list(lanes(move))
        for frames in segments(move):
            held = [lane.holding(frames.start) for lane in every]
            self._move_frames([lane for lane in held if lane.reads], frames)
        for stored in move.reads:
            if stored.digest is not None:
                self._check_tail(stored)
        for stored in move.writes:
            self._write_tail(stored)
        for output in self.outputs.values():
            output.flush()
        return {key: out.digest.hexdigest() for key, out in self.outputs.items() if out.digest is not None}

    def _move_frames(self, held: Sequence[Lane], frames: Range) -> None:
        """Move experts that the same tensors hold: many at once where they are small, else one by one, in bands."""
        read = list(_distinct(lane.reads for lane in held))
        written = list(_distinct(lane.writes for lane in held))
        sizes = {id(one): one.frame_size for one in (*read, *written)}
        largest = max((rows * line for rows, line in sizes.values()), default=0)
        step = min(BAND_BYTES // max(1, largest), len(frames))
        if step > 1 and all(lane.is_read_whole for lane in held):
            every = [LaneFrames(lane) for lane in held]
            for first in range(frames.start, frames.stop, step):
                self.tally.check()
                self.space.free(0)
                some = Range(first, min(first + step, frames.stop))
                arrays = {one: self.space.take(len(some), *size) for one, size in sizes.items()}
                self._read_frames(read, some, arrays)
                self._move_together(every, some, arrays)
                for stored in written:
                    self._put_frames(stored, some, arrays[id(stored)])
            return
        for frame in range(frames.start, frames.stop):
            for lane in held:
                self._move_lane(lane, frame)

    def _move_together(self, held: Sequence[LaneFrames], frames: Range, arrays: Mapping[int, Bytes]) -> None:
        """Make whole frames of what is written of those that were read."""
        for lane in held:
            views = lane.gathered(arrays, self.space)
            for source, view in views.items():
                views[source] = cast(view, *lane.dtypes)
                if not self.may_overflow and lane.dtypes[0] != lane.dtypes[1]:
                    for at, frame in enumerate(range(frames.start, frames.stop)):
                        name = expert_name(source, frame, lane.lane.reads[0][0].frames)
                        check_range(view[at], views[source][at], *lane.dtypes, name)
            lane.dealt(views, arrays)

    def _read_frames(self, tensors: Sequence[Stored], frames: Range, arrays: Mapping[int, Bytes]) -> None:
        """Fill the arrays of ``tensors``; what lies beside each other is read at once."""
        pieces: dict[Path, list[tuple[int, Bytes]]] = {}
        for stored in tensors:
            data = arrays[id(stored)]
            if stored.places:
                first = frames.start - stored.frames.start
                for (path, offset), out in zip(stored.places[first : first + len(frames)], data, strict=True):
                    pieces.setdefault(path, []).append((offset, out))
            else:
                path, offset = stored.place(frames.start)
                pieces.setdefault(path, []).append((offset, data))
        for path, some in pieces.items():
            self.files.read_pieces(path, some)
        for stored in tensors:
            if stored.digest is not None:
                self.read_hashes[_key(stored)].update(arrays[id(stored)].data)

    def _put_frames(self, stored: Stored, frames: Range, data: Bytes) -> None:
        if self.compare:
            for at, frame in enumerate(range(frames.start, frames.stop)):
                first = 0
                for strip in stored.strips:
                    rows = data[at, first : first + len(strip.rows)]
                    self._compare(stored, strip, strip.rows, rows, frame)
                    first += len(strip.rows)
        elif stored.places:
            for at, frame in enumerate(range(frames.start, frames.stop)):
                path, offset = stored.place(frame)
                self.files.write(path, data[at], offset)
        else:
            self.outputs[_key(stored)].write(data, (frames.start - stored.frames.start) * data[0].nbytes)
        self.tally.add(data.nbytes)

    def _move_lane(self, lane: Lane, frame: int) -> None:
        (dtype_in, dtype_out), (size_in, size_out) = dtypes(lane)
        widths = {source: width for source, (_, width) in lane.sizes().items()}
        runs = lane.wanted_rows()
        step = max(1, BAND_BYTES // max(1, sum(widths.values()) * max(size_in, size_out)))
        step = min(step, max((len(run) for run in runs), default=1))
        self.space.free(0)
        held = {source: self.space.take(step, width * size_in) for source, width in widths.items()}
        kept = self.space.used
        for rows in runs:
            for first in range(rows.start, rows.stop, step):
                self.tally.check()
                self.space.free(kept)
                band = Range(first, min(first + step, rows.stop))
                views = {source: buffer[: len(band)] for source, buffer in held.items()}
                for stored, strip in lane.reads:
                    self._read(stored, strip, band, views, frame)
                outs = {source: cast(view, dtype_in, dtype_out) for source, view in views.items()}
                if not self.may_overflow:
                    for source, view in views.items():
                        name = expert_name(source, frame, lane.reads[0][0].frames)
                        check_range(view, outs[source], dtype_in, dtype_out, name)
                for stored, strip in lane.writes:
                    self._write(stored, strip, band, outs, frame)

    def _read(self, stored: Stored, strip: Strip, band: Range, views: Mapping[str, Bytes], frame: int) -> None:
        rows = overlap(strip.rows, band)
        if not len(rows):
            return
        inside = slice(rows.start - band.start, rows.stop - band.start)
        line, size = stored.line, item_size(stored.dtype, stored.name)
        target = views[strip.regions[0].source][inside]
        straight = len(strip.regions) == 1 and line == target.shape[1]
        data = target if straight else self.space.take(len(rows), line)
        path, offset = stored.place(frame)
        self.files.read(path, data, offset + (strip.at + rows.start - strip.rows.start) * line)
        if not straight:
            for region, _, left in placed(strip, size):
                cols = region.cols.scaled(size)
                views[region.source][inside, cols.start : cols.stop] = data[:, left]
        if stored.digest is not None:
            self.read_hashes[_key(stored)].update(data.data)

    def _write(self, stored: Stored, strip: Strip, band: Range, views: Mapping[str, Bytes], frame: int) -> None:
        rows = overlap(strip.rows, band)
        if not len(rows):
            return
        inside = slice(rows.start - band.start, rows.stop - band.start)
        size = item_size(stored.dtype, stored.name)
        found = [
            views[region.source][inside, region.cols.start * size : region.cols.stop * size] for region in strip.regions
        ]
        data = found[0]
        if len(found) > 1 or not data.flags.c_contiguous:
            data = self.space.take(len(rows), stored.line)
            np.concatenate(found, axis=1, out=data)
        at = (strip.at + rows.start - strip.rows.start) * stored.line
        if self.compare:
            self._compare(stored, strip, rows, data, frame)
        elif stored.places:
            path, offset = stored.place(frame)
            self.files.write(path, data, offset + at)
        else:
            self.outputs[_key(stored)].write(data, (frame - stored.frames.start) * stored.frame_bytes + at)
        self.tally.add(data.nbytes)

    def _compare(self, stored: Stored, strip: Strip, rows: Range, data: Bytes, frame: int) -> None:
        found, size = np.empty_like(data), item_size(stored.dtype, stored.name)
        path, offset = stored.place(frame)
        self.files.read(path, found, offset + (strip.at + rows.start - strip.rows.start) * stored.line)
        if np.array_equal(found, data):
            return
        row, byte = (int(place) for place in np.argwhere(found != data)[0])
        for region, _, left in placed(strip, size):
            if left.start <= byte < left.stop:
                place = f"row {rows.start + row}, column {region.cols.start + (byte - left.start) // size}"
                source = expert_name(region.source, frame, stored.frames)
                raise ShardFolderError(f"{stored.label} differs from its source {source} at the source's {place}")

    def _write_tail(self, stored: Stored) -> None:
        """Write (zeros: leave as holes) and hash what no strip covers, or compare it."""
        for first in range(stored.covered, stored.nbytes, BAND_BYTES):
            data = _filler(stored, min(BAND_BYTES, stored.nbytes - first))
            if self.compare:
                self._compare_filler(stored, data, first)
            else:
                self.outputs[_key(stored)].write(data, first, hole=not stored.fill)
            self.tally.add(data.nbytes)

    def _compare_filler(self, stored: Stored, data: Bytes, first: int) -> None:
        found = np.empty_like(data)
        self.files.read(stored.path, found, stored.offset + first)
        if not np.array_equal(found, data):
            at = (first + int(np.argmax(found != data))) // item_size(stored.dtype, stored.name)
            raise ShardFolderError(
                f"{stored.label} holds something other than {stored.fill} at its element {at}, "
                "which is made of no source tensor"
            )

    def _check_tail(self, stored: Stored) -> None:
        """Hash what no strip covers, and compare the digest."""
        for first in range(stored.covered, stored.nbytes, BAND_BYTES):
            data = np.empty(min(BAND_BYTES, stored.nbytes - first), np.uint8)
            self.files.read(stored.path, data, stored.offset + first)
            self.read_hashes[_key(stored)].update(data.data)
        check_digest(stored, self.read_hashes[_key(stored)].hexdigest())


def _distinct(places: Iterable[Sequence[Place]]) -> Iterable[Stored]:
    return {id(stored): stored for held in places for stored, _ in held}.values()


def check_digest(stored: Stored, found: str) -> None:
    """Raise ``ShardFolderError`` unless ``found`` is the digest that ``stored`` should have."""
    if stored.digest is not None and found != stored.digest:
        raise ShardFolderError(
            f"{stored.label} is damaged: its bytes in {stored.path.name} hash to {found[:16]}, "
            f"the manifest says {stored.digest[:16]}; shard the model again, or copy the file again"
        )


def _key(stored: Stored) -> tuple[int | None, str]:
    return stored.rank, stored.name


def _filler(stored: Stored, nbytes: int) -> Bytes:
    if not stored.fill:
        return np.zeros(nbytes, np.uint8)
    ones = np.ones(nbytes // item_size("F32", stored.name), "<f4").view(np.uint8)
    return cast(ones, "F32", stored.dtype)
