"""Parquet files as an input: a row is found again by its file, row group and place; memory holds one row group.

Rows count through all files, so that a part is a run of rows. What a part was is told by digests of its row groups:
BLAKE3 over the stored bytes of the columns that are read, which costs no decoding.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from tpctl.batch.formats import columns
from tpctl.batch.formats.files import Found, find
from tpctl.batch.formats.ids import Keys, key_of
from tpctl.batch.formats.parquet_file import arrow, chunks_of, hash_chunk, opened, reading
from tpctl.batch.formats.place import LARGEST, ChangedError, Part
from tpctl.batch.prefixes import Sharing, sizes
from tpctl.client.forms import OwnForm
from tpctl.client.jobs import Line
from tpctl.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class Group:
    """A row group: ``number`` of file ``file``, with the input's row ``first`` and those behind it; ``size``: bytes of
    what is read of it."""

    file: int
    number: int
    first: int
    rows: int
    size: int


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files.

    Attributes:
        prompts: as the user names them.
        asked: which columns are looked at.
        carried: kept columns go along with the lines, as JSON; otherwise the sink asks for them.
    """

    prompts: str
    asked: OwnForm
    carried: bool

    @property
    def shown(self) -> str:
        return self.prompts

    @property
    def form(self) -> OwnForm:
        keep: tuple[str, ...] | str = self.asked.keep if self.carried else ()
        return OwnForm(self.chosen.prompt, self.chosen.id, keep, self.asked.answer)

    @property
    def chosen(self) -> columns.Chosen:
        return self._footers.chosen

    @property
    def schema(self) -> pa.Schema:
        """Of the first file."""
        return self._footers.schema

    def check(self) -> None:
        """Raise ``SourceError`` if a file cannot be read, or has not the columns that are wanted."""
        assert self._footers

    @contextmanager
    def open(self) -> Iterator[ParquetReader]:
        reader = ParquetReader(self, self._footers)
        try:
            yield reader
        finally:
            reader.close()

    @property
    def _footers(self) -> Footers:
        found = self.__dict__.get("footers")
        if found is None:
            found = Footers.read(self)
            object.__setattr__(self, "footers", found)
        return found


@dataclass(frozen=True)
class Footers:
    """What the ends of the files say.

    Attributes:
        states: of the files.
        groups: those with rows.
        rows: of all of them.
    """

    files: Found
    states: Sequence[list[Any]]
    schema: pa.Schema
    chosen: columns.Chosen
    groups: Sequence[Group]
    rows: int

    @staticmethod
    def read(source: ParquetSource) -> Footers:
        arrow()
        files = find(source.prompts)
        schema: pa.Schema | None = None
        chosen: columns.Chosen | None = None
        groups: list[Group] = []
        rows = 0
        states = []
        for number, path in enumerate(files.paths):
            with opened(files, path) as file:
                states.append(files.state(path))
                if schema is None or chosen is None:
                    schema = file.schema_arrow
                    chosen = columns.choose(schema, source.asked, path, carried=source.carried)
                else:
                    chosen.compare(schema, file.schema_arrow, path, files.paths[0])
                for at in range(file.num_row_groups):
                    group = file.metadata.row_group(at)
                    if group.num_rows:
                        size = sum(chunk.total_uncompressed_size for chunk in chunks_of(group, chosen.all))
                        groups.append(Group(number, at, rows, group.num_rows, size))
                        rows += group.num_rows
        assert schema is not None and chosen is not None
        return Footers(files, states, schema, chosen, groups, rows)


@dataclass
class ParquetReader:
    """Opened files; one at a time, and of that one row group."""

    source: ParquetSource
    footers: Footers
    again: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._firsts = [group.first for group in self.footers.groups]
        self._digest: tuple[int, str] = (-1, "")
        self._held: dict[tuple[str, ...], tuple[int, Any]] = {}  # by columns: a group of them
        self._file: tuple[int, Any, Any] = (-1, None, None)  # number, context, opened file

    def close(self) -> None:
        if self._file[1] is not None:
            self._file[1].__exit__(None, None, None)
        self._file = (-1, None, None)
        self._held.clear()

    @property
    def shown(self) -> str:
        return self.source.shown

    @property
    def size(self) -> int:
        return self.footers.rows

    def lines(self) -> Iterator[Line]:
        for first, count in self._runs(0, 1000):
            yield from self._lines(first, count)

    def count(self, most: int) -> int:
        return min(self.footers.rows, most)

    def mentions(self, word: str, most: int | None = None) -> bool:
        return word == "messages" and self.footers.chosen.messages

    def check(self, part: Part) -> None:
        if part.end > self.footers.rows or self._digest_of(part.offset, part.length) != part.digest:
            raise ChangedError(part, self._named(part))

    def read(self, part: Part) -> list[Line]:
        self.check(part)
        return list(self._lines(part.offset, part.length))

    def parts(self, last: Part | None, rows: int, sharing: Sharing) -> Iterator[tuple[Part, Keys | None]]:
        number, first = (0, 0) if last is None else (last.number + 1, last.end)
        for start, count in self._runs(first, rows):
            digest = self._digest_of(start, count)
            raws = (line.raw for line in self._lines(start, count))  # read only where they are shared out
            part = Part(
                *(number, start, count, start + 1, start, count, count, digest),
                shares=sizes(raws, sharing),
                depth=sharing.depth,
                field=sharing.field,
            )
            yield part, self._keys(start, count)
            number += 1

    def keys(self, parts: Iterable[Part]) -> Keys | None:
        found = [self._keys(part.offset, part.length) for part in parts]
        known = [keys for keys in found if keys is not None]
        return np.concatenate(known) if known else None

    def table(self, first: int, count: int, names: Sequence[str]) -> pa.Table:
        """Some columns of some rows.

        Raises:
            SourceError: they cannot be read.
        """
        pieces = []
        for at, start, rows in self._within(first, count):
            pieces.append(self._group(at, tuple(names)).slice(start, rows))
        return arrow().concat_tables(pieces)

    def _runs(self, first: int, rows: int) -> Iterator[tuple[int, int]]:
        """Runs of rows from ``first`` on, as long as is wanted and bearable."""
        while first < self.footers.rows:
            group = self.footers.groups[self._at(first)]
            each = max(1, group.size // group.rows)
            count = min(rows, max(1, LARGEST // each), self.footers.rows - first)
            yield first, count
            first += count

    def _lines(self, first: int, count: int) -> Iterator[Line]:
        names = self.footers.chosen.read
        table = self.table(first, count, names)
        with reading(self._named_at(first)):
            values = [columns.values(table.column(name)) for name in names]
        for place, row in enumerate(zip(*values, strict=True)):
            raw = columns.as_json(dict(zip(names, row, strict=True)))
            yield Line(first + place, first + place + 1, raw, "row")

    def _keys(self, first: int, count: int) -> Keys | None:
        if (name := self.footers.chosen.id) is None:
            return None
        column = self.table(first, count, (name,)).column(name)
        with reading(self._named_at(first)):
            ids = columns.values(column)
        numbered = enumerate(ids, start=first + 1)
        return np.array([key_of(f"\0{row}" if id is None else id) for row, id in numbered], dtype=np.uint64)

    def _at(self, row: int) -> int:
        """The group that a row is in."""
        return bisect_right(self._firsts, row) - 1

    def _within(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The groups that rows are in, and which of a group's rows they are: from where on, and how many."""
        end = first + count
        for at in itertools.count(self._at(first)):
            group = self.footers.groups[at]
            start, stop = max(first, group.first), min(end, group.first + group.rows)
            yield at, start - group.first, stop - start
            if stop == end:
                return

    def _open(self, number: int) -> pq.ParquetFile:
        if self._file[0] != number:
            self.close()
            files = self.footers.files
            context = opened(files, path := files.paths[number])
            self._file = (number, context, context.__enter__())
            if files.state(path) != self.footers.states[number]:
                raise SourceError(f"{path} changed after it was first looked at; bring back what was there")
        return self._file[2]

    def _group(self, at: int, names: tuple[str, ...]) -> pa.Table:
        held = self._held.get(names)
        if held is None or held[0] != at:
            del held
            self._held.pop(names, None)
            group = self.footers.groups[at]
            file = self._open(group.file)
            with reading(self._named_group(at)):
                table = file.read_row_group(group.number, columns=list(names)).select(list(names))
            if table.num_rows != group.rows:
                raise SourceError(f"{self._named_group(at)} changed after the batch began; bring back what was there")
            self._held[names] = (at, table)
        return self._held[names][1]

    def _digest_of(self, first: int, count: int) -> str:
        total = blake3.blake3()
        for at, start, rows in self._within(first, count):
            total.update(f"{self._group_digest(at)} {start} {rows};".encode())
        return total.hexdigest()[:32]

    def _group_digest(self, at: int) -> str:
        if self._digest[0] != at:
            group = self.footers.groups[at]
            path = self.footers.files.paths[group.file]
            wanted = self.footers.chosen.all
            total = blake3.blake3(json.dumps([group.rows, list(wanted)]).encode())
            with reading(path), self.footers.files.system.open(path, "rb") as file:
                for chunk in chunks_of(self._open(group.file).metadata.row_group(group.number), wanted):
                    hash_chunk(file, chunk, total)
            self._digest = (at, total.hexdigest())
        return self._digest[1]

    def _named(self, part: Part) -> str:
        if part.offset >= self.footers.rows:
            return part.named("row")
        first, last = self._at(part.offset), self._at(min(part.end, self.footers.rows) - 1)
        to = "" if first == last else f" to {self._named_group(last)}"
        return f"{part.named('row')} ({self._named_group(first)}{to})"

    def _named_at(self, row: int) -> str:
        return self._named_group(self._at(row))

    def _named_group(self, at: int) -> str:
        group = self.footers.groups[at]
        return f"row group {group.number} of {self.footers.files.paths[group.file]}"
