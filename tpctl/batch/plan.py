"""An input as parts: runs of lines that a replica answers together, found again by their place.

Of a part no more is kept than where it begins and what is there hashes to, so that an input of any length costs memory
by its parts and not by its lines (ids: eight bytes a line).
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import blake3
import numpy as np

from tpctl.batch.folder import JobFolder, json_lines
from tpctl.batch.formats.ids import Ids, Keys
from tpctl.batch.formats.place import LARGEST, ChangedError, Formats, Part, Reader
from tpctl.batch.prefixes import MOST_SHARES, UNSHARED, Sharing, sharing_of
from tpctl.client.disk import writing
from tpctl.client.forms import OwnForm
from tpctl.errors import UsageError, counted

PART_ROWS = 1000
"""Rows of a part where the input has many; a small one is divided so that every replica has several."""

PARTS_EACH = 4
SAMPLE_ROWS = 20_000
"""Rows of the input's beginning that say whether rows share prefixes."""


@dataclass(frozen=True)
class Division:
    """How an input is divided: ``rows`` of a part, and how they are shared out."""

    rows: int
    sharing: Sharing = UNSHARED


def division_of(formats: Formats, replicas: int, rows: int | None = None) -> Division:
    """How this input should be divided, so that each of ``replicas`` has a few spans of it to answer.

    Args:
        rows: of a part, if that is given.
    """
    enough = PART_ROWS * PARTS_EACH * replicas
    with formats.source.open() as reader:
        found = reader.count(enough)
        first = _first(reader, min(SAMPLE_ROWS, enough))
    alone = rows or min(PART_ROWS, max(1, -(-found // (PARTS_EACH * replicas))))
    form = formats.source.form
    field = form.prompt_field or "" if isinstance(form, OwnForm) else ""
    sharing = sharing_of(first, alone, min(MOST_SHARES, PARTS_EACH * replicas), field)
    return Division(rows or alone * sharing.shares, sharing)


def _first(reader: Reader, most: int) -> list[bytes]:
    """The first rows."""
    found, size = [], 0
    for line in reader.lines():
        found.append(line.raw)
        size += len(line.raw)
        if len(found) == most or size >= LARGEST:
            break
    return found


class Plan:
    """Finds an input's parts in a thread: first it compares those that are known with the input, then come new ones.

    Attributes:
        formats: of the input and the output; ``division``: of the input into parts.
        known: parts that an earlier run found.
        rows, end: lines with text, and the place up to where the plan has come; ``size``: where the input ends.
        whole: the plan has come to its end.
    """

    def __init__(self, folder: JobFolder, formats: Formats, division: Division) -> None:
        """Begin; the thread starts with ``start``.

        Raises:
            SourceError: the input cannot be read.
        """
        self._folder = folder
        self.formats = formats
        self.division = division
        self._queue: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self.known = [Part.from_json(value) for value in json_lines(folder.index)]
        self.rows = sum(part.rows for part in self.known)
        self.end = self.known[-1].end if self.known else 0
        with formats.source.open() as reader:
            self.size = reader.size
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
            with self.formats.source.open() as reader:
                try:
                    self._compare(reader)
                    self._go_on(reader)
                except ChangedError as error:
                    raise self._changed(reader, error) from None
            self._queue.put(None)
        except BaseException as error:  # whatever it is, who waits for parts must hear of it
            self._queue.put(error)

    def _compare(self, reader: Reader) -> None:
        for part in self.known:
            if self._stop.is_set():
                return
            reader.check(part)
            self._queue.put(part)

    def _changed(self, reader: Reader, error: ChangedError) -> UsageError:
        unit = "rows" if error.named.startswith("row") else "lines"
        return UsageError(
            f"{error.named} of {reader.shown} are not those that {self._folder.root} was begun with; "
            f"give the same input (more {unit} at its end are welcome), or name another folder"
        )

    def _go_on(self, reader: Reader) -> None:
        """Find the parts behind those that are known."""
        ids: Ids | None = None
        with writing(self._folder.index):
            keep_lines(self._folder.index, len(self.known))
            kept, log = self._folder.ids.open("ab"), self._folder.index.open("ab")
        with kept, log:
            last = self.known[-1] if self.known else None
            for part, keys in reader.parts(last, self.division.rows, self.division.sharing):
                if keys is not None:
                    if ids is None:
                        ids = self._ids(reader)
                    part = replace(part, repeated=tuple(ids.add(keys)))
                with writing(self._folder.index):
                    if keys is not None:
                        kept.write(keys.tobytes())
                        kept.flush()
                    log.write(json.dumps(asdict(part)).encode() + b"\n")
                    log.flush()
                self._queue.put(part)
                if self._stop.is_set():
                    return

    def _ids(self, reader: Reader) -> Ids:
        """The ids of the known parts; read from the input where they were not kept."""
        rows = sum(part.rows for part in self.known)
        ids = Ids()
        with writing(self._folder.ids):
            keys: Keys = np.fromfile(self._folder.ids, dtype=np.uint64, count=rows)
            if len(keys) < rows:
                found = reader.keys(self.known)
                assert found is not None
                keys = found
                self._folder.ids.write_bytes(keys.tobytes())
            elif self._folder.ids.stat().st_size > 8 * rows:
                with self._folder.ids.open("r+b") as file:
                    file.truncate(8 * rows)
        ids.take(keys)
        return ids


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
