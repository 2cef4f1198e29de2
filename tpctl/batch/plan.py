"""An input as parts: runs of lines that a replica answers together, found again by their place in the file.

Of a part no more is kept than where it begins and what its bytes hash to, so that an input of any length costs memory
by its parts and not by its lines (ids: eight bytes a line).
"""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import blake3
import numpy as np

from tpctl.batch.folder import JobFolder, Span, json_lines
from tpctl.batch.ids import Ids, Keys, keys_of
from tpctl.batch.prefixes import MOST_SHARES, UNSHARED, Sharing, sharing_of, sizes
from tpctl.client.disk import writing
from tpctl.client.jobs import Line, bounded_lines
from tpctl.errors import SourceError, UsageError, counted

PART_ROWS = 1000
"""Rows of a part where the input has many; a small one is divided so that every replica has several."""

PARTS_EACH = 4
SAMPLE_ROWS = 20_000
"""Rows of the input's beginning that say whether rows share prefixes."""

LARGEST = 32 << 20
"""Bytes of the input after which a part ends, however few lines they are."""


@dataclass(frozen=True)
class Part:
    """Lines of the input that one file of answers is for.

    Attributes:
        number: from 0, in the order of the input.
        offset, length: its bytes in the input.
        line: the number of its first line, from 1; ``index``: lines with text before it.
        rows: its lines with text.
        digest: BLAKE3 of its bytes, 32 hexadecimal digits.
        repeated: lines with text, counted from 0 in the part, whose id an earlier line had.
        shares: how many of its rows are in each share of rows that begin alike, by their first ``depth`` bytes; empty:
            they are not told apart.
    """

    number: int
    offset: int
    length: int
    line: int
    index: int
    rows: int
    lines: int
    digest: str
    repeated: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    depth: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def sharing(self) -> Sharing:
        return Sharing(len(self.shares) or 1, self.depth)

    def before(self, share: int) -> int:
        """Rows of shares before this one, from 1."""
        return sum(self.shares[: max(share - 1, 0)])

    def spans(self) -> list[Span]:
        """All of it, as it is offered at first."""
        shares = [(share, rows) for share, rows in enumerate(self.shares, start=1) if rows]
        found = [Span(self.number, self.before(share), rows, share=share) for share, rows in shares]
        return found or [Span(self.number, 0, self.rows)]

    @staticmethod
    def from_json(value: dict[str, Any]) -> Part:
        lists = {name: tuple(value.get(name, ())) for name in ("repeated", "shares")}
        return Part(**{**value, **lists})

    def named(self) -> str:
        """As messages call it."""
        return f"lines {self.line} to {self.line + self.lines - 1}" if self.lines > 1 else f"line {self.line}"


def read_part(stream: IO[bytes], part: Part, shown: str) -> list[Line]:
    """A part's lines with text.

    Raises:
        SourceError: the input is no longer what it was.
    """
    stream.seek(part.offset)
    data = stream.read(part.length)
    if _digest(data) != part.digest:
        raise SourceError(f"{part.named()} of {shown} changed after the batch began; bring back what they were")
    numbered = enumerate(io.BytesIO(data), start=part.line)
    texts = [(number, raw) for number, raw in numbered if raw.strip()]
    return [Line(part.index + place, number, raw) for place, (number, raw) in enumerate(texts)]


@dataclass(frozen=True)
class Division:
    """How an input is divided: ``rows`` of a part, and how they are shared out."""

    rows: int
    sharing: Sharing = UNSHARED


def division_of(prompts: Path, replicas: int, rows: int | None = None) -> Division:
    """How this input should be divided, so that each of ``replicas`` has a few spans of it to answer.

    Args:
        rows: of a part, if that is given.
    """
    enough = PART_ROWS * PARTS_EACH * replicas
    found, first, size = 0, [], 0
    with prompts.open("rb") as stream:
        for line in bounded_lines(stream, str(prompts)):
            if not line.strip():
                continue
            found += 1
            if found <= SAMPLE_ROWS and size < LARGEST:
                first.append(line)
                size += len(line)
            if found >= enough:
                break
    alone = rows or min(PART_ROWS, max(1, -(-found // (PARTS_EACH * replicas))))
    sharing = sharing_of(first, alone, min(MOST_SHARES, PARTS_EACH * replicas))
    return Division(rows or alone * sharing.shares, sharing)


class Plan:
    """Finds an input's parts in a thread: first it compares those that are known with the input, then come new ones.

    Attributes:
        prompts: the input; ``division``: of it into parts.
        known: parts that an earlier run found.
        rows, end: lines with text and bytes up to where the plan has come; ``size``: bytes of the input.
        whole: the plan has come to its end.
    """

    def __init__(self, folder: JobFolder, prompts: Path, division: Division) -> None:
        """Begin; the thread starts with ``start``."""
        self._folder = folder
        self.prompts = prompts
        self.division = division
        self._queue: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self.known = [Part.from_json(value) for value in json_lines(folder.index)]
        self.rows = sum(part.rows for part in self.known)
        self.end = self.known[-1].end if self.known else 0
        self.size = prompts.stat().st_size
        self.whole = False
        self._hash = blake3.blake3()

    @property
    def digest(self) -> str:
        """Of the whole input, made of its parts' digests; 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def ready(self) -> Iterator[Part]:
        """The parts that were found since the last call; sets ``whole`` behind the last one.

        Raises:
            SourceError: the input cannot be read, or has a line that is too long.
            UsageError: it is not the one that the batch was begun with.
        """
        while not self.whole:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self.whole = True
                return
            self._hash.update(item.digest.encode())
            if item.end > self.end:
                self.rows, self.end = self.rows + item.rows, item.end
            yield item

    def _run(self) -> None:
        try:
            with self.prompts.open("rb", buffering=1 << 20) as stream:
                self._compare(stream)
                self._go_on(stream)
            self._queue.put(None)
        except BaseException as error:  # whatever it is, who waits for parts must hear of it
            self._queue.put(error)

    def _compare(self, stream: IO[bytes]) -> None:
        for part in self.known:
            if self._stop.is_set():
                return
            stream.seek(part.offset)
            if _digest(stream.read(part.length)) != part.digest:
                raise self._changed(part)
            self._queue.put(part)

    def _changed(self, part: Part) -> UsageError:
        return UsageError(
            f"{part.named()} of {self.prompts} are not those that {self._folder.root} was begun with; "
            "give the same input (more lines at its end are welcome), or name another folder"
        )

    def _go_on(self, stream: IO[bytes]) -> None:
        """Find the parts behind those that are known."""
        last = self.known[-1] if self.known else Part(-1, 0, 0, 1, 0, 0, 0, "")
        offset, line = last.end, last.line + last.lines
        offset += self._rest_of_line(stream, last)
        stream.seek(offset)
        number, index = last.number + 1, last.index + last.rows
        ids: Ids | None = None
        with writing(self._folder.index):
            keep_lines(self._folder.index, len(self.known))
            kept, log = self._folder.ids.open("ab"), self._folder.index.open("ab")
        with kept, log:
            lines = bounded_lines(stream, str(self.prompts))
            while not self._stop.is_set():
                raws, texts = _take(lines, line, self.division.rows)
                if not texts:
                    return
                if ids is None:
                    ids = self._ids()
                keys = keys_of(texts)
                data = b"".join(raws)
                repeated = tuple(ids.add(keys))
                part = Part(
                    *(number, offset, len(data), line, index, len(texts), len(raws), _digest(data), repeated),
                    sizes((raw for _, raw in texts), self.division.sharing),
                    self.division.sharing.depth,
                )
                with writing(self._folder.index):
                    kept.write(keys.tobytes())
                    kept.flush()
                    log.write(json.dumps(asdict(part)).encode() + b"\n")
                    log.flush()
                self._queue.put(part)
                number, offset = number + 1, part.end
                line, index = line + part.lines, index + part.rows

    def _rest_of_line(self, stream: IO[bytes], last: Part) -> int:
        """Bytes of the last known line's end that were not there before."""
        if not last.length:
            return 0
        stream.seek(last.end - 1)
        if stream.read(1) == b"\n":
            return 0
        rest = next(bounded_lines(stream, str(self.prompts)), b"")
        if rest.strip():
            raise self._changed(last)
        return len(rest)

    def _ids(self) -> Ids:
        """The ids of the known parts; read from the input where they were not kept."""
        rows = sum(part.rows for part in self.known)
        ids = Ids()
        with writing(self._folder.ids):
            keys: Keys = np.fromfile(self._folder.ids, dtype=np.uint64, count=rows)
            if len(keys) < rows:
                with self.prompts.open("rb") as stream:
                    lines = (line for part in self.known for line in read_part(stream, part, str(self.prompts)))
                    keys = keys_of([(line.number, line.raw) for line in lines])
                self._folder.ids.write_bytes(keys.tobytes())
            elif self._folder.ids.stat().st_size > 8 * rows:
                with self._folder.ids.open("r+b") as file:
                    file.truncate(8 * rows)
        ids.take(keys)
        return ids


def _take(lines: Iterator[bytes], line: int, rows: int) -> tuple[list[bytes], list[tuple[int, bytes]]]:
    """The lines of the next part, and those of them with text, with their numbers."""
    raws: list[bytes] = []
    texts: list[tuple[int, bytes]] = []
    size = 0
    for raw in lines:
        raws.append(raw)
        size += len(raw)
        if raw.strip():
            texts.append((line + len(raws) - 1, raw))
            if len(texts) == rows or size > LARGEST:
                break
    return raws, texts


def _digest(data: bytes) -> str:
    return blake3.blake3(data).hexdigest()[:32]


def keep_lines(path: Path, count: int) -> None:
    """Cut a file off behind its first ``count`` lines."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())


def said_repeated(count: int) -> str:
    """What is said of lines whose ids were used before."""
    return f"{counted(count, 'line')} with an id that an earlier line has; each is an error row"
