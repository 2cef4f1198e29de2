"""A replica's side of the folder: spans of lines are taken by a rename, their rows kept as they come, and handed in.

offers/SPAN ── rename ──► leases/SPAN@ME      taken: of several that try, one finds the file
work/SPAN@ME              a row is appended as it finishes, so that who comes next computes only the rest
finished/SPAN@ME          all rows are there; the coordinator takes them up and removes the lease
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from tpctl.batch.folder import JobFolder, Span, json_lines, load, move, names, put, spans_in
from tpctl.batch.plan import Part, read_part
from tpctl.client.disk import writing
from tpctl.client.jobs import Line
from tpctl.errors import OutputError, RequestError, SourceError


@dataclass
class Sums:
    """What rows come to. ``tokens`` of prompts and answers; ``cut``: answers that ended with the context."""

    rows: int = 0
    errors: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        self.errors += "error" in row
        self.cut += "note" in row
        self.prompt_tokens += row.get("prompt_tokens", 0)
        self.completion_tokens += row.get("completion_tokens", 0)

    def add(self, other: Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def less(self, other: Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) - getattr(other, field.name))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def kept_rows(folder: JobFolder, part: int) -> dict[int, dict[str, Any]]:
    """Rows of a part that were saved from replicas which did not finish it, by their line's place in the part."""
    rows: dict[int, dict[str, Any]] = {}
    for name in sorted(names(folder.kept)):
        if name.startswith(f"{part:05d}."):
            for place, row in json_lines(folder.kept / name):
                rows.setdefault(place, row)
    return rows


def write_part(path: Path, rows: Mapping[int, Mapping[str, Any]], *, places: bool) -> Sums:
    """Write rows in the order of their lines, through to the disk; with their ``places``, or as they are given out.

    Raises:
        OutputError: they cannot be written.
    """
    sums = Sums()
    temporary = path.with_name(f".{path.name}")
    with writing(path), temporary.open("wb") as file:
        for place in sorted(rows):
            row = rows[place]
            sums.count(row)
            file.write(_json([place, row] if places else row))
        file.flush()
        os.fsync(file.fileno())
    with writing(path):
        temporary.replace(path)
    return sums


class Lease:
    """A span that this replica answers.

    Attributes:
        lines: those that nobody has answered; ``missing`` of them have no row yet.
        rows: those that are there, by their line's place in the part.
    """

    def __init__(self, span: Span, part: Part, lines: list[Line], rows: dict[int, dict[str, Any]], journal: Path):
        self.span = span
        self.part = part
        mine = lines[span.first : span.first + span.count]
        self.rows = {place: row for place, row in rows.items() if span.first <= place < span.first + span.count}
        self.lines = [line for line in mine if line.index - part.index not in self.rows]
        self.missing = len(self.lines)
        self._journal: IO[bytes] | None = None
        self._path = journal

    @property
    def whole(self) -> bool:
        """Whether all rows of the span are there."""
        return self.missing == 0

    def add(self, line: Line, row: dict[str, Any], data: bytes) -> None:
        with writing(self._path):
            if self._journal is None:
                self._journal = self._path.open("ab")
            self._journal.write(data)
            self._journal.flush()
        self.rows[line.index - self.part.index] = row
        self.missing -= 1

    def close(self) -> None:
        if self._journal is not None:
            with suppress(OSError):  # a full disk, of which was told when it was written to
                self._journal.close()


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
                if lease.whole:  # another one had answered all of it, and did not come to say so
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
        """Keep a finished row, and hand in its span if it was the last.

        Raises:
            OutputError: it cannot be written.
            RequestError: it holds a number that JSON knows no form of.
        """
        with self._lock:
            lease = next(lease for lease in self._held.values() if 0 <= line.index - lease.part.index < lease.part.rows)
        row = dict(row)
        lease.add(line, row, _json([line.index - lease.part.index, row]))
        self.sums.count(row)
        if lease.whole:
            self._finish(lease)

    @property
    def open_rows(self) -> int:
        """Rows that are there of spans that are not handed in."""
        with self._lock:
            return sum(len(lease.rows) for lease in self._held.values())

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
            rows = kept_rows(self._folder, span.part)
            journal = self._folder.work / mine.name
            lease = Lease(span, part, read_part(stream, part, str(self._prompts)), rows, journal)
            self._repeated.update(part.index + place for place in part.repeated)
            with self._lock:
                self._held[span.part] = lease
            return lease
        return None

    def _finish(self, lease: Lease) -> None:
        """Hand in a span: a whole part as it will be given out, or rows with their places."""
        target = self._folder.finished / lease.span.held_by(self._name)
        whole = lease.span.count == lease.part.rows
        beside = target.with_name(f"{target.name}.sums")
        sums = Sums()
        for row in lease.rows.values():
            sums.count(row)
        try:
            put(beside, sums.to_dict())
            write_part(target, lease.rows, places=not whole)
        except OutputError:
            if (self._folder.leases / target.name).exists():
                raise  # otherwise this one was thought dead, another one was faster, and all of this is cleared away
        lease.close()
        with self._lock:
            del self._held[lease.span.part]
        first = lease.part.index
        self._repeated.difference_update(range(first, first + lease.part.rows))


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
    except ValueError:
        raise RequestError(
            "the answer's numbers are not finite (NaN or infinity), which JSON has no form for"
        ) from None


def offer(folder: JobFolder, spans: Iterable[Span], part: Part) -> None:
    """Let replicas take lines of a part.

    Raises:
        OutputError: it cannot be written.
    """
    for span in spans:
        put(folder.offers / span.name, asdict(part))
