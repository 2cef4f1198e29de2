"""A replica's side of the folder: spans of lines are taken by a rename, their rows kept as they come, and handed in.

offers/SPAN ── rename ──► leases/SPAN@ME      taken: of several that try, one finds the file
work/SPAN@ME              a row is appended as it finishes, so that who comes next computes only the rest
finished/SPAN@ME          all rows are there; the coordinator takes them up and removes the lease
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tpctl.batch.folder import JobFolder, Span, load, move, put, spans_in, write_whole
from tpctl.batch.formats.place import Formats, Part, Reader, read_checked
from tpctl.batch.prefixes import order_of
from tpctl.batch.rows import KeptRow, Sums, kept_lines, sums_beside
from tpctl.client.disk import writing
from tpctl.client.jobs import Line
from tpctl.errors import OutputError

FREE, TAKEN = 1 << 20, 1 << 21
"""Ranks of shares that nobody has, and that others have, behind those that a replica has."""


class Lease:
    """A span that this replica answers. Its rows are in its journal; memory has where.

    Attributes:
        lines: those that nobody has answered, in the order in which they should be; ``missing`` of them have no row.
        repeated: indexes of its lines whose id an earlier line has.
        sums: of all rows that are there.
    """

    def __init__(self, span: Span, part: Part, lines: list[Line], kept: Mapping[int, bytes], journal: Path) -> None:
        """Begin with the rows that others left.

        Args:
            lines: of the whole part.

        Raises:
            OutputError: they cannot be written to the journal.
        """
        self.span = span
        self.part = part
        self.sums = Sums()
        self._path = journal
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of a row in the journal
        self._size = 0
        with writing(journal):
            self._file: IO[bytes] = journal.open("w+b")
        before = part.before(span.share)
        places = order_of(lines, part.sharing, span.share)[span.first - before : span.end - before]
        self.repeated = {part.index + place for place in {*places} & {*part.repeated}}
        for place in places:
            if place in kept:
                self._keep(place, KeptRow.parse(kept[place])[1], kept[place])
        self.lines = [lines[place] for place in places if place not in self._places]
        self.missing = len(self.lines)

    @property
    def rows(self) -> int:
        return len(self._places)

    def add(self, line: Line, row: KeptRow) -> None:
        """Keep a row; it is in the journal after the next ``flush``."""
        place = line.index - self.part.index
        self._keep(place, row, row.line(place))
        self.missing -= 1

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    @property
    def whole(self) -> bool:
        """Whether it is all of a part."""
        return self.span.count == self.part.rows

    def in_order(self) -> Iterator[bytes]:
        """The rows in the order of their lines; with their places, if it is not all of a part."""
        whole = self.whole
        for _, (offset, length) in sorted(self._places.items()):
            self._file.seek(offset)
            raw = self._file.read(length)
            yield raw.split(b", ", 2)[2][: -len("]\n")] + b"\n" if whole else raw

    def close(self) -> None:
        with suppress(OSError):  # a full disk, of which was told when it was written to
            self._file.close()

    def _keep(self, place: int, row: KeptRow, raw: bytes) -> None:
        with writing(self._path):
            self._file.write(raw)
        self._places[place] = (self._size, len(raw))
        self._size += len(raw)
        self.sums.count(row.row, row.cached)


class Leases:
    """What one replica has taken. ``lines`` and ``repeated`` are for a thread of their own, ``add`` for another one.

    Attributes:
        sums: of the rows that were answered here.
        closed: no more is taken.
    """

    def __init__(self, folder: JobFolder, formats: Formats, name: str, enough: int = 1) -> None:
        """Begin with none.

        Args:
            enough: lines under way at once that keep the engine busy. With fewer it takes also lines that begin like
                none it has answered.
        """
        self._folder = folder
        self._source, self._sink = formats.source, formats.sink
        self._name = name
        self._enough = enough
        self._held: list[Lease] = []
        self._lock = threading.Lock()  # of it
        self._asked: dict[int, Lease] = {}  # by the index of a line that has no row yet
        self._repeated: set[int] = set()  # indexes of lines
        self._shares: list[int] = []  # those whose beginnings the engine has in its cache, the last one last
        self.sums = Sums()
        self.closed = threading.Event()

    def groups(self, together: int, poll: float, over: Callable[[], object] = lambda: False) -> Iterator[list[Line]]:
        """Lines to answer, at most so many at once, as they are taken; ends once it is ``closed``, or all is ``over``.

        Raises:
            OutputError: the folder cannot be used.
            SourceError: the input cannot be read, or is not what it was.
        """
        with self._source.open() as reader:
            while not self.closed.is_set() and not over():
                if (lease := self._take(reader)) is None:
                    self.closed.wait(poll)
                    continue
                if not lease.missing:  # another one had answered all of it, and did not come to say so
                    self._finish(lease)
                for start in range(0, len(lease.lines), together):
                    if self.closed.is_set():
                        return
                    yield lease.lines[start : start + together]

    def repeated(self, line: Line) -> bool:
        """Whether an earlier line has the id of ``line``."""
        return line.index in self._repeated

    def has(self, line: Line) -> bool:
        """As of ``Results``: those that are there were never given out."""
        return False

    def add(self, line: Line, row: Mapping[str, Any], cached: int = 0) -> None:
        """Keep a finished row, and hand in its span if it was the last; ``flush`` after the last of several.

        Args:
            cached: tokens of its prompt that were in the engine's prefix cache.

        Raises:
            OutputError: it cannot be written.
            RequestError: it holds a number that JSON knows no form of.
        """
        lease = self._asked[line.index]
        lease.add(line, KeptRow(row, cached))
        del self._asked[line.index]
        self.sums.count(row, cached)
        if not lease.missing:
            self._finish(lease)

    def flush(self) -> None:
        """Write down what was added, so that it outlives this process.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            held = list(self._held)
        for lease in held:
            lease.flush()

    @property
    def open_rows(self) -> int:
        """Rows that are there of spans that are not handed in."""
        with self._lock:
            return sum(lease.rows for lease in self._held)

    def close(self) -> None:
        """Give up what is under way; what was answered stays in the folder for who takes the lines next."""
        self.closed.set()
        with self._lock:
            for lease in self._held:
                lease.close()

    def _take(self, reader: Reader) -> Lease | None:
        """The next span, of those that are offered and may be taken now."""
        with self._lock:
            held = [lease.span for lease in self._held]
            open_rows = sum(lease.missing for lease in self._held)
        if any(span.alone for span in held):
            return None
        self._folder.check_there()
        share = (load(self._folder.state) or {}).get("share", 0) if held else 0
        for name, span, adopted in self._wanted(open_rows):
            if any(span.meets(other) for other in held):
                continue
            if held and (span.alone or open_rows + span.count > share):
                continue
            mine = self._folder.leases / span.held_by(self._name)
            if (move(self._folder.offers / name, mine) or mine.exists()) and (part := _part_of(mine)) is not None:
                if adopted:
                    self._shares = [*(share for share in self._shares if share != span.share), span.share]
                return self._begin(reader, span, part)
        return None

    def _wanted(self, open_rows: int) -> list[tuple[str, Span, bool]]:
        """Spans that are offered, the best first: of rows that begin like those which the engine answered last. While
        it is busy no others; then those that nobody else is at; and what another one is at, rather than nothing. Beside
        each whether its share is this replica's from then on: of what it helps another one with it is not."""
        offers = [(name, span) for name, span, _ in spans_in(self._folder.offers)]
        if not any(span.share for _, span in offers):
            return [(name, span, False) for name, span in offers]
        others = {span.share for _, span, holder in spans_in(self._folder.leases) if holder != self._name}

        def rank(span: Span) -> int:
            if not span.share:
                return 0
            if span.share in self._shares:
                return len(self._shares) - self._shares.index(span.share)
            return TAKEN if span.share in others else FREE

        ranked = sorted(((rank(span), span, name) for name, span in offers), key=lambda one: one[:2])
        busy = open_rows >= self._enough
        return [(name, span, 0 < rank <= FREE) for rank, span, name in ranked if rank < FREE or not busy]

    def _begin(self, reader: Reader, span: Span, part: Part) -> Lease:
        kept = kept_lines(self._folder, span.part, span)
        path = self._folder.work / span.held_by(self._name)
        lease = Lease(span, part, read_checked(reader, part), kept, path)
        self._repeated |= lease.repeated
        self._asked.update((line.index, lease) for line in lease.lines)
        with self._lock:
            self._held.append(lease)
        return lease

    def _finish(self, lease: Lease) -> None:
        """Hand in a span: a whole part as it will be given out, or rows with their places."""
        target = self._folder.finished / lease.span.held_by(self._name)
        try:
            put(sums_beside(target), lease.sums.to_dict())
            write_whole(target, lambda out: self._encode(lease, out))
        except OutputError:
            if (self._folder.leases / target.name).exists():
                raise  # otherwise this one was thought dead, another one was faster, and all of this is cleared away
        lease.close()
        with self._lock:
            self._held.remove(lease)
        self._repeated -= lease.repeated

    def _encode(self, lease: Lease, out: IO[bytes]) -> None:
        if lease.whole:
            self._sink.encode(out, lease.part.index, lease.in_order())
        else:
            out.writelines(lease.in_order())


def _part_of(lease: Path) -> Part | None:
    """What a lease is of; ``None``: a coordinator that has all of it has cleared the lease away meanwhile."""
    with writing(lease):
        try:
            return Part.from_json(json.loads(lease.read_bytes()))
        except FileNotFoundError:
            return None


def offer(folder: JobFolder, spans: Iterable[Span], part: Part) -> None:
    """Let replicas take lines of a part.

    Raises:
        OutputError: it cannot be written.
    """
    for span in spans:
        put(folder.offers / span.name, asdict(part))
