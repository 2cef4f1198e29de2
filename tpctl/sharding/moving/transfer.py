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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tpctl.checkpoint.cast import cast, check_range
from tpctl.errors import ShardFolderError
from tpctl.partition.split import Range
from tpctl.sharding.moving.files import ByteCounter, Bytes, Files, in_parallel
from tpctl.sharding.moving.layout import Region, Stored, item_size

BAND_BYTES = 1 << 20
"""Size of a band: small enough to stay in a core's cache between reading, hashing and writing."""


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
    for stored in {s.path: s for move in moves for s in (*move.reads, *move.writes)}.values():
        files.open(stored.path)
    digests: dict[tuple[int | None, str], str] = {}
    # The largest first, so that no thread is left alone with a large one at the end.
    ordered = sorted(moves, key=lambda move: -move.nbytes)

    def task(move: Move) -> None:
        digests.update(_Mover(files, tally, compare, may_overflow).run(move))

    in_parallel([partial(task, move) for move in ordered], tally)
    return digests


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
        self.read_hashes: dict[tuple[int | None, str], Any] = {}
        self.write_hashes: dict[tuple[int | None, str], Any] = {}

    def run(self, move: Move) -> dict[tuple[int | None, str], str]:
        from blake3 import blake3

        self.read_hashes = {_key(s): blake3() for s in move.reads if s.digest is not None}
        self.write_hashes = {_key(s): blake3() for s in move.writes if move.digest and not self.compare}
        checked = (s for s in move.reads if s.digest is not None)
        for source in dict.fromkeys(r.source for s in (*checked, *move.writes) for r in s.regions):
            self._move_source(move, source)
        for stored in move.reads:
            if stored.digest is not None:
                self._check_tail(stored)
        for stored in move.writes:
            self._write_tail(stored)
        return {key: digest.hexdigest() for key, digest in self.write_hashes.items()}

    def _move_source(self, move: Move, source: str) -> None:
        reads = [(s, r) for s in move.reads for r in s.regions if r.source == source]
        writes = [(s, r) for s in move.writes for r in s.regions if r.source == source]
        if not reads:
            return
        line = max(r.cols.stop for _, r in reads)
        dtype_in = reads[0][0].dtype
        dtype_out = writes[0][0].dtype if writes else dtype_in
        size_in, size_out = item_size(dtype_in, source), item_size(dtype_out, source)
        step = max(1, BAND_BYTES // max(1, line * max(size_in, size_out)))
        held = np.empty((step, line * size_in), np.uint8)
        for rows in _wanted_rows(reads, writes):
            for first in range(rows.start, rows.stop, step):
                self.tally.check()
                band = Range(first, min(first + step, rows.stop))
                view = held[: len(band)]
                for stored, region in reads:
                    self._read(stored, region, band, view, size_in)
                out = cast(view, dtype_in, dtype_out)
                if not self.may_overflow:
                    check_range(view, out, dtype_in, dtype_out, source)
                for stored, region in writes:
                    self._write(stored, region, band, out, size_out)

    def _read(self, stored: Stored, region: Region, band: Range, view: Bytes, size: int) -> None:
        rows = _overlap(region.rows, band)
        if not len(rows):
            return
        line = len(region.cols) * size
        target = view[rows.start - band.start : rows.stop - band.start]
        straight = line == view.shape[1]
        data = target if straight else np.empty((len(rows), line), np.uint8)
        self.files.read(stored.path, data, region.offset + (rows.start - region.rows.start) * line)
        if not straight:
            target[:, region.cols.start * size : region.cols.stop * size] = data
        if stored.digest is not None:
            self.read_hashes[_key(stored)].update(data.data)

    def _write(self, stored: Stored, region: Region, band: Range, view: Bytes, size: int) -> None:
        rows = _overlap(region.rows, band)
        if not len(rows):
            return
        line = len(region.cols) * size
        data = np.ascontiguousarray(
            view[
                rows.start - band.start : rows.stop - band.start,
                region.cols.start * size : region.cols.stop * size,
            ]
        )
        offset = region.offset + (rows.start - region.rows.start) * line
        if self.compare:
            self._compare(stored, region, rows, data, offset, size)
        else:
            if (digest := self.write_hashes.get(_key(stored))) is not None:
                digest.update(data.data)
            self.files.write(stored.path, data, offset)
        self.tally.add(data.nbytes)

    def _compare(self, stored: Stored, region: Region, rows: Range, data: Bytes, offset: int, size: int) -> None:
        found = np.empty_like(data)
        self.files.read(stored.path, found, offset)
        if np.array_equal(found, data):
            return
        row, byte = np.argwhere(found != data)[0]
        place = f"row {rows.start + int(row)}, column {region.cols.start + int(byte) // size}"
        raise ShardFolderError(f"{stored.label} differs from its source {region.source} at the source's {place}")

    def _write_tail(self, stored: Stored) -> None:
        """Write (zeros: leave as holes) and hash what no region covers, or compare it."""
        for first in range(_covered(stored), stored.nbytes, BAND_BYTES):
            data = _filler(stored, min(BAND_BYTES, stored.nbytes - first))
            if self.compare:
                self._compare_filler(stored, data, first)
                continue
            if (digest := self.write_hashes.get(_key(stored))) is not None:
                digest.update(data.data)
            if stored.fill:
                self.files.write(stored.path, data, stored.offset + first)
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
        self.tally.add(data.nbytes)

    def _check_tail(self, stored: Stored) -> None:
        """Hash what no region covers, and compare the digest."""
        for first in range(_covered(stored), stored.nbytes, BAND_BYTES):
            data = np.empty(min(BAND_BYTES, stored.nbytes - first), np.uint8)
            self.files.read(stored.path, data, stored.offset + first)
            self.read_hashes[_key(stored)].update(data.data)
        check_digest(stored, self.read_hashes[_key(stored)].hexdigest())


def check_digest(stored: Stored, found: str) -> None:
    """Raise ``ShardFolderError`` unless ``found`` is the digest that ``stored`` should have."""
    if stored.digest is not None and found != stored.digest:
        raise ShardFolderError(
            f"{stored.label} is damaged: its bytes in {stored.path.name} hash to {found[:16]}, "
            f"the manifest says {stored.digest[:16]}; shard the model again, or copy the file again"
        )


def _key(stored: Stored) -> tuple[int | None, str]:
    return stored.rank, stored.name


def _covered(stored: Stored) -> int:
    size = item_size(stored.dtype, stored.name)
    return sum(len(region.rows) * len(region.cols) * size for region in stored.regions)


def _filler(stored: Stored, nbytes: int) -> Bytes:
    if not stored.fill:
        return np.zeros(nbytes, np.uint8)
    ones = np.ones(nbytes // item_size("F32", stored.name), "<f4").view(np.uint8)
    return cast(ones, "F32", stored.dtype)


def _overlap(one: Range, other: Range) -> Range:
    start = max(one.start, other.start)
    return Range(start, max(start, min(one.stop, other.stop)))


def _wanted_rows(reads: Sequence[tuple[Stored, Region]], writes: Sequence[tuple[Stored, Region]]) -> list[Range]:
    """The runs of rows to read, ascending: those that are written, and all whose digest is to be checked."""
    runs = [region.rows for stored, region in reads if stored.digest is not None]
    for one in _union(region.rows for _, region in reads):
        runs += [_overlap(one, other) for other in _union(region.rows for _, region in writes)]
    return _union(run for run in runs if len(run))


def _union(ranges: Iterable[Range]) -> list[Range]:
    found: list[Range] = []
    for rng in sorted(ranges, key=lambda rng: (rng.start, rng.stop)):
        if found and rng.start <= found[-1].stop:
            found[-1] = Range(found[-1].start, max(found[-1].stop, rng.stop))
        else:
            found.append(rng)
    return found
