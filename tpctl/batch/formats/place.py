"""What all formats have in common: parts, a source that finds their rows again by place, a sink that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import blake3

from tpctl.batch.folder import Span
from tpctl.batch.formats.ids import Keys
from tpctl.batch.prefixes import Sharing
from tpctl.client.forms import Form
from tpctl.client.jobs import Line
from tpctl.errors import SourceError

LARGEST = 32 << 20
"""Bytes of the input after which a part ends, however few lines they are."""


@dataclass(frozen=True)
class Part:
    """Lines of the input that one file of answers is for.

    Attributes:
        number: from 0, in the order of the input.
        offset, length: its place in the input: bytes of a file of lines, rows of a table.
        line: the number of its first line, from 1; ``index``: lines with text before it.
        rows: its lines with text.
        digest: BLAKE3 of what is at its place, 32 hexadecimal digits.
        repeated: lines with text, counted from 0 in the part, whose id an earlier line had.
        shares: how many of its rows are in each share of rows that begin alike, by their first ``depth`` bytes; empty:
            they are not told apart.
        field: as of ``Sharing``.
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
    field: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def sharing(self) -> Sharing:
        return Sharing(len(self.shares) or 1, self.depth, self.field)

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

    def named(self, unit: str = "line") -> str:
        """As messages call it."""
        last = self.line + self.lines - 1
        return f"{unit}s {self.line} to {last}" if self.lines > 1 else f"{unit} {self.line}"


class ChangedError(Exception):
    """A part of the input is no longer what it was."""

    def __init__(self, part: Part, named: str) -> None:
        super().__init__(named)
        self.part = part
        self.named = named


class Reader(Protocol):
    """An opened input.

    Attributes:
        size: where its last part ends, or if that is not known, where it may.
        again: its rows are all there, and can be read a second time.
        shown: what messages call it.
    """

    @property
    def size(self) -> int: ...

    @property
    def again(self) -> bool: ...

    @property
    def shown(self) -> str: ...

    def lines(self) -> Iterator[Line]:
        """All rows, from the first. Raises ``SourceError`` if they cannot be read."""

    def count(self, most: int) -> int:
        """How many there are, counted up to ``most``."""

    def mentions(self, word: str, most: int | None = None) -> bool:
        """Whether a row may have a field of this name, as far as can be told beforehand; of lines the first ``most``
        bytes are looked at."""

    def check(self, part: Part) -> None:
        """Raise ``ChangedError`` if a part is not what it was."""

    def read(self, part: Part) -> list[Line]:
        """A part's rows. Raises ``ChangedError``."""

    def parts(self, last: Part | None, rows: int, sharing: Sharing) -> Iterator[tuple[Part, Keys | None]]:
        """The parts behind ``last``, shared out, and their ids as keys, if their rows have any.

        Raises:
            ChangedError: the last one has grown.
        """

    def keys(self, parts: Iterable[Part]) -> Keys | None:
        """Those of parts that are known."""


class Source(Protocol):
    """An input.

    Attributes:
        shown: what messages call it.
        form: how its lines ask, as soon as there was one.
    """

    @property
    def shown(self) -> str: ...

    @property
    def form(self) -> Form: ...

    def open(self) -> AbstractContextManager[Reader]:
        """Raises ``SourceError`` if it cannot be read."""


class Sink(Protocol):
    """What rows become. They come as they are kept: JSON in ``Batch``'s form, with what is ``Form.beside`` them.

    Attributes:
        suffix: of a part's name.
    """

    @property
    def suffix(self) -> str: ...

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        """Write a whole file of them; ``first``: the index of the first one's line."""

    def decode(self, path: Path) -> Iterator[dict[str, Any]]:
        """The rows of such a file, as they came, or so that ``encode`` makes the same of them."""

    def join(self, out: IO[bytes], parts: Iterable[Path]) -> None:
        """Make one file of several."""


@dataclass(frozen=True)
class Formats:
    """What a batch reads and what it writes."""

    source: Source
    sink: Sink


def digest_of(data: bytes) -> str:
    return blake3.blake3(data).hexdigest()[:32]


def read_checked(reader: Reader, part: Part) -> list[Line]:
    """A part's rows.

    Raises:
        SourceError: the input is no longer what it was.
    """
    try:
        return reader.read(part)
    except ChangedError as error:
        raise SourceError(
            f"{error.named} of {reader.shown} changed after the batch began; bring back what was there"
        ) from None
