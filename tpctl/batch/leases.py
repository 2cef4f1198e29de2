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

from tpctl.batch.folder import JobFolder, Span, load, move, put, spans_in
from tpctl.batch.plan import Part, read_part
from tpctl.batch.rows import Sums, json_row, kept_lines, write_rows
from tpctl.client.disk import writing
from tpctl.client.jobs import Line
from tpctl.errors import OutputError, SourceError


class Lease:
    """A span that this replica answers. Its rows are in its journal; memory has where.

    Attributes:
        lines: those that nobody has answered; ``missing`` of them have no row yet.
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
        for place in range(span.first, span.first + span.count):
            if place in kept:
                self._keep(place, json.loads(kept[place])[1], kept[place])
        mine = lines[span.first : span.first + span.count]
        self.lines = [line for line in mine if line.index - part.index not in self._places]
        self.missing = len(self.lines)

    @property
    def rows(self) -> int:
        return len(self._places)

    def add(self, line: Line, row: Mapping[str, Any]) -> None:
        """Keep a row; it is in the journal after the next ``flush``."""
        place = line.index - self.part.index
        self._keep(place, row, json_row([place, row]))
        self.missing -= 1

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def given_out(self) -> Iterator[bytes]:
        """The rows in order: a whole part's as users have them, otherwise with their places."""
        whole = self.span.count == self.part.rows
        for place, (offset, length) in sorted(self._places.items()):
            self._file.seek(offset)
            raw = self._file.read(length)
            yield raw[len(f"[{place}, ") : -len("]\n")] + b"\n" if whole else raw

    def close(self) -> None:
        with suppress(OSError):  # a full disk, of which was told when it was written to
            self._file.close()

    def _keep(self, place: int, row: Mapping[str, Any], raw: bytes) -> None:
        with writing(self._path):
            self._file.write(raw)
        self._places[place] = (self._size, len(raw))
        self._size += len(raw)
        self.sums.count(row)


class Leases:
    """What one replica has taken. ``lines`` and ``repeated`` are for a thread of their own, ``add`` for another one.

    Attributes:
        sums: of the rows that were answered here.
        closed: no more is taken.
    """

    def __init__(self, folder: JobFolder, prompts: Path, name: str) -> None:
        self._folder = folder
        self._prompts = prompts
        self._name = name
        self._held: dict[int, Lease] = {}  # by part
        self._lock = threading.Lock()  # of it
        self._repeated: set[int] = set()  # indexes of lines
        self.sums = Sums()
        self.closed = threading.Event()

    def groups(self, together: int, poll: float, over: Callable[[], object] = lambda: False) -> Iterator[list[Line]]:
        """Lines to answer, at most so many at once, as they are taken; ends once it is ``closed``, or all is ``over``.

        Raises:
            OutputError: the folder cannot be used.
            SourceError: the input is not what it was.
        """
        try:
            stream = self._prompts.open("rb")
        except OSError as error:
            raise SourceError(f"cannot read {self._prompts}: {error.strerror}") from None
        with stream:
            while not self.closed.is_set() and not over():
                if (lease := self._take(stream)) is None:
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

    def add(self, line: Line, row: Mapping[str, Any]) -> None:
        """Keep a finished row, and hand in its span if it was the last; ``flush`` after the last of several.

        Raises:
            OutputError: it cannot be written.
            RequestError: it holds a number that JSON knows no form of.
        """
        with self._lock:
            lease = next(lease for lease in self._held.values() if 0 <= line.index - lease.part.index < lease.part.rows)
        lease.add(line, row)
        self.sums.count(row)
        if not lease.missing:
            self._finish(lease)

    def flush(self) -> None:
        """Write down what was added, so that it outlives this process.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            lease.flush()

    @property
    def open_rows(self) -> int:
        """Rows that are there of spans that are not handed in."""
        with self._lock:
            return sum(lease.rows for lease in self._held.values())

    def close(self) -> None:
        """Give up what is under way; what was answered stays in the folder for who takes the lines next."""
        self.closed.set()
        with self._lock:
            for lease in self._held.values():
                lease.close()

    def _take(self, stream: IO[bytes]) -> Lease | None:
        """The first span that is offered and may be taken now."""
        with self._lock:
            held = {part: lease.span.alone for part, lease in self._held.items()}
            open_rows = sum(lease.missing for lease in self._held.values())
        if any(held.values()):
            return None
        self._folder.check_there()
        share = (load(self._folder.state) or {}).get("share", 0) if held else 0
        for name, span, _ in spans_in(self._folder.offers):
            if span.part in held or (held and (span.alone or open_rows + span.count > share)):
                continue
            mine = self._folder.leases / span.held_by(self._name)
            if not (move(self._folder.offers / name, mine) or mine.exists()):
                continue
            with writing(mine):
                part = Part.from_json(json.loads(mine.read_bytes()))
            kept = kept_lines(self._folder, span.part)
            journal = self._folder.work / mine.name
            lease = Lease(span, part, read_part(stream, part, str(self._prompts)), kept, journal)
            self._repeated.update(part.index + place for place in part.repeated)
            with self._lock:
                self._held[span.part] = lease
            return lease
        return None

    def _finish(self, lease: Lease) -> None:
        """Hand in a span: a whole part as it will be given out, or rows with their places."""
        target = self._folder.finished / lease.span.held_by(self._name)
        try:
            put(target.with_name(f"{target.name}.sums"), lease.sums.to_dict())
            write_rows(target, lease.given_out())
        except OutputError:
            if (self._folder.leases / target.name).exists():
                raise  # otherwise this one was thought dead, another one was faster, and all of this is cleared away
        lease.close()
        with self._lock:
            del self._held[lease.span.part]
        first = lease.part.index
        self._repeated.difference_update(range(first, first + lease.part.rows))


def offer(folder: JobFolder, spans: Iterable[Span], part: Part) -> None:
    """Let replicas take lines of a part.

    Raises:
        OutputError: it cannot be written.
    """
    for span in spans:
        put(folder.offers / span.name, asdict(part))
