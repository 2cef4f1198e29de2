"""Files of lines: tpctl's own requests, a data set's rows, or OpenAI's batch lines, which the first of them tells."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tpctl.batch.formats.ids import Find, Keys, id_finder, keys_of
from tpctl.batch.formats.openai import OPENAI, is_batch_line
from tpctl.batch.formats.place import LARGEST, ChangedError, Part, Sink, digest_of
from tpctl.batch.prefixes import Sharing, sizes
from tpctl.client.forms import OWN, ROW_FIELDS, Form, OwnForm
from tpctl.client.jobs import Line, bounded_lines
from tpctl.client.results import as_they_are, json_row
from tpctl.errors import SourceError

HEAD = 64
"""Lines that are looked at before a batch begins."""

_MARK = b'"custom_id"'


@dataclass
class JsonlSource:
    """A file of lines.

    Attributes:
        own: how they ask if they are not OpenAI's.
        told: how they ask, if somebody says so.
    """

    path: Path
    own: OwnForm = OWN
    told: Form | None = None
    name: str | None = None
    _found: Form | None = field(default=None, init=False)

    @property
    def shown(self) -> str:
        return self.name or str(self.path)

    @property
    def form(self) -> Form:
        return self.told or self._found or self.own

    @contextmanager
    def open(self) -> Iterator[JsonlReader]:
        try:
            stream = self.path.open("rb", buffering=1 << 20)
        except OSError as error:
            raise SourceError(f"cannot read {self.shown}: {error.strerror}") from None
        with stream:
            yield JsonlReader(stream, self, self.path.stat().st_size)

    def ids(self) -> Find:
        """What finds the ids of lines, as far as it is known how they ask."""
        return id_finder(self.form.id_field, needed=self.form.id_needed)

    def look(self, lines: Iterable[tuple[int, bytes]]) -> None:
        """Learn from numbered lines how lines ask, or see that they ask as those before them.

        Raises:
            SourceError: one does not.
        """
        if self.own.prompt_field is not None and self.told is None:
            return
        expected = self.told or self._found
        openai = expected is OPENAI
        for number, raw in lines:
            if (_MARK in raw) == openai and expected is not None:
                continue
            if expected is not None:
                self._compare(number, self._form_of(raw), expected)
            else:
                expected = self._found = self._form_of(raw)
                openai = expected is OPENAI

    def may_differ(self, lines: bytes) -> bool:
        """Whether ``look`` has something to see in lines: quicker than to look at each."""
        return (self.told or self._found) in (None, OPENAI) or _MARK in lines

    def _compare(self, number: int, found: Form | None, expected: Form) -> None:
        if found is None or (found is OPENAI) == (expected is OPENAI):
            return
        is_one, others = ("an OpenAI batch line", "tpctl's own") if found is OPENAI else ("tpctl's own", "OpenAI's")
        raise SourceError(
            f"line {number} of {self.shown} is {is_one}, where lines are {others}; give each form a file of its own"
        )

    def _form_of(self, raw: bytes) -> Form | None:
        """``None`` where a line tells nothing."""
        try:
            entry = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if is_batch_line(entry):
            return OPENAI
        return self.own if isinstance(entry, dict) and ("prompt" in entry or "messages" in entry) else None


class JsonlReader:
    """An opened file of lines, or a pipe, of which only ``lines`` can be had."""

    def __init__(self, stream: IO[bytes], source: JsonlSource, size: int = 0, *, again: bool = True) -> None:
        self._stream = stream
        self._source = source
        self._start = stream.tell() if again else 0
        self.size = size
        self.again = again

    @property
    def shown(self) -> str:
        return self._source.shown

    def lines(self) -> Iterator[Line]:
        if self.again:
            self._stream.seek(self._start)
        index = 0
        for number, raw in enumerate(bounded_lines(self._stream, self.shown), start=1):
            if raw.strip():
                self._source.look([(number, raw)])
                yield Line(index, number, raw)
                index += 1

    def head(self) -> list[dict[str, Any]]:
        """What the first lines hold; none of what is no JSON."""
        found = []
        for line, _ in zip(self.lines(), range(HEAD), strict=False):
            with suppress(ValueError, RecursionError):
                entry = json.loads(line.raw)
                if isinstance(entry, dict):
                    found.append(entry)
        return found

    def count(self, most: int) -> int:
        self._stream.seek(self._start)
        rows = 0
        for line in bounded_lines(self._stream, self.shown):
            rows += bool(line.strip())
            if rows >= most:
                break
        return rows

    def mentions(self, word: str, most: int | None = None) -> bool:
        if not self.again:
            return False
        self._stream.seek(self._start)
        name = json.dumps(word).encode()
        if most is not None:
            return name in self._stream.read(most)
        return any(name in line for line in bounded_lines(self._stream, self.shown))

    def check(self, part: Part) -> None:
        self._bytes(part)

    def read(self, part: Part) -> list[Line]:
        numbered = enumerate(io.BytesIO(self._bytes(part)), start=part.line)
        texts = [(number, raw) for number, raw in numbered if raw.strip()]
        return [Line(part.index + place, number, raw) for place, (number, raw) in enumerate(texts)]

    def parts(self, last: Part | None, rows: int, sharing: Sharing) -> Iterator[tuple[Part, Keys]]:
        last = last or Part(-1, 0, 0, 1, 0, 0, 0, "")
        offset, line = last.end + self._rest_of_line(last), last.line + last.lines
        self._stream.seek(offset)
        number, index = last.number + 1, last.index + last.rows
        lines = bounded_lines(self._stream, self.shown)
        find: Find | None = None
        while True:
            raws, texts = _take(lines, line, rows)
            if not texts:
                return
            data = b"".join(raws)
            if self._source.may_differ(data):
                self._source.look(texts)
            find = find or self._source.ids()
            part = Part(
                *(number, offset, len(data), line, index, len(texts), len(raws), digest_of(data)),
                shares=sizes((raw for _, raw in texts), sharing),
                depth=sharing.depth,
                field=sharing.field,
            )
            yield part, keys_of(texts, find)
            number, offset = number + 1, part.end
            line, index = line + part.lines, index + part.rows

    def keys(self, parts: Iterable[Part]) -> Keys:
        lines = (line for part in parts for line in self.read(part))
        return keys_of([(line.number, line.raw) for line in lines], self._source.ids())

    def _bytes(self, part: Part) -> bytes:
        self._stream.seek(part.offset)
        data = self._stream.read(part.length)
        if digest_of(data) != part.digest:
            raise ChangedError(part, part.named())
        return data

    def _rest_of_line(self, last: Part) -> int:
        """Bytes of the last known line's end that were not there before."""
        if not last.length:
            return 0
        self._stream.seek(last.end - 1)
        if self._stream.read(1) == b"\n":
            return 0
        rest = next(bounded_lines(self._stream, self.shown), b"")
        if rest.strip():
            raise ChangedError(last, last.named())
        return len(rest)


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


class JsonlSink:
    """Rows as they are kept, a line each."""

    suffix = ".jsonl"

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        as_they_are(out, first, rows)

    def decode(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as stream:
            yield from map(json.loads, stream)

    def join(self, out: IO[bytes], parts: Iterable[Path]) -> None:
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)


class AnySink(JsonlSink):
    """Rows of lines that come one by one: it is seen when the first of them is there what they become."""

    def __init__(self, source: JsonlSource, own: Sink, openai: Sink) -> None:
        self._source = source
        self._own = own
        self._openai = openai

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        sink = self._openai if self._source.form is OPENAI else self._own
        sink.encode(out, first, rows)


class KeptSink(JsonlSink):
    """Rows with the fields that are kept of their lines, which stand behind the answer's own."""

    def __init__(self, answer: str) -> None:
        """``answer``: what the answer's text is called."""
        self._answer = answer

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        for raw in rows:
            row = json.loads(raw)
            kept = row.pop("kept", {})
            own = {self._answer if name == "text" else name: value for name, value in row.items()}
            out.write(json_row({**own, **kept}))

    def decode(self, path: Path) -> Iterator[dict[str, Any]]:
        names = {name: name for name in ROW_FIELDS if name != "text"} | {self._answer: "text"}
        for row in super().decode(path):
            own = {names[name]: value for name, value in row.items() if name in names}
            yield {**own, "kept": {name: value for name, value in row.items() if name not in names}}
