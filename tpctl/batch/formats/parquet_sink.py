"""Parquet files as an output: the same columns in every part, with those of the input that are kept as they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tpctl.batch.formats.parquet import ParquetReader, ParquetSource
from tpctl.batch.formats.parquet_file import arrow
from tpctl.client.forms import ROW_FIELDS
from tpctl.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 5000
_BYTES = 32 << 20
"""Rows, and bytes of them, that are written at once, as a row group."""

_WHOLE_ROWS = 100_000
_WHOLE_BYTES = 64 << 20
"""The same of a file that is put together."""


class ParquetSink:
    """Rows as tables: ``ROW_FIELDS``, null where a row has none, and what is kept of the input."""

    suffix = ".parquet"

    def __init__(self, source: ParquetSource | None, answer: str) -> None:
        """Begin.

        Args:
            source: of the kept columns; ``None``: of an input of lines, of which nothing is kept.
            answer: what the answer's text is called.
        """
        arrow()
        self._source = source
        self._answer = answer
        self._reader: ParquetReader | None = None
        self._lock = threading.Lock()  # of it
        self._stack = ExitStack()

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        pq = arrow().parquet
        with pq.ParquetWriter(out, self._schema(), compression="zstd") as writer:
            for some in _bunches(rows):
                writer.write_table(self._table(first, some))
                first += len(some)

    def decode(self, path: Path) -> Iterator[dict[str, Any]]:
        pq = arrow().parquet
        names = [name for name in self._own().names if name != self._answer]
        with pq.ParquetFile(path) as file:
            for some in file.iter_batches(columns=[*names, self._answer]):
                for row in some.select([*names, self._answer]).to_pylist():
                    row["text"] = row.pop(self._answer)
                    yield {name: row[name] for name in ROW_FIELDS if name == "id" or row.get(name) is not None}

    def join(self, out: IO[bytes], parts: Iterable[Path]) -> None:
        library = arrow()
        with library.parquet.ParquetWriter(out, self._schema(), compression="zstd") as writer:
            held: list[pa.Table] = []
            for path in parts:
                held.append(library.parquet.read_table(path, partitioning=None))
                if sum(map(len, held)) >= _WHOLE_ROWS or sum(table.nbytes for table in held) >= _WHOLE_BYTES:
                    writer.write_table(library.concat_tables(held))
                    held = []
            if held:
                writer.write_table(library.concat_tables(held))

    def _own(self) -> pa.Schema:
        """The columns of the answers."""
        pa = arrow()
        lists = ("logprobs", "prompt_logprobs")
        token = [("id", pa.int64()), ("token", pa.string()), ("logprob", pa.float64())]
        kinds = {
            "id": self._kind_of_ids(),
            "prompt_tokens": pa.int64(),
            "completion_tokens": pa.int64(),
            **dict.fromkeys(lists, pa.list_(pa.struct([*token, ("top", pa.list_(pa.struct(token)))]))),
        }
        names = [name for name in ROW_FIELDS if name not in lists or self._source is None]
        return pa.schema([(self._answer if name == "text" else name, kinds.get(name, pa.string())) for name in names])

    def _kind_of_ids(self) -> pa.DataType:
        """Lines may have texts and numbers as ids; a column has one kind."""
        pa = arrow()
        if self._source is None:
            return pa.string()
        if (name := self._source.chosen.id) is None:
            return pa.int64()
        kind = self._source.schema.field(name).type
        return kind if pa.types.is_integer(kind) else pa.string()

    def _schema(self) -> pa.Schema:
        found = self._own()
        if self._source is not None:
            for name in self._source.chosen.kept:
                found = found.append(self._source.schema.field(name))
        return found

    def _table(self, first: int, rows: list[bytes]) -> pa.Table:
        pa = arrow()
        own = self._own()
        values = [json.loads(raw) for raw in rows]
        columns = []
        for field in own:
            name = "text" if field.name == self._answer else field.name
            found = [row.get(name) for row in values]
            if name == "id" and self._source is None:
                found = [None if id is None else str(id) for id in found]
            columns.append(pa.array(found, type=field.type))
        table = pa.table(columns, schema=own)
        if self._source is None or not (kept := self._source.chosen.kept):
            return table
        given = self._given(first, len(rows), kept)
        for name in kept:
            table = table.append_column(self._source.schema.field(name), given.column(name))
        return table

    def _given(self, first: int, count: int, names: tuple[str, ...]) -> pa.Table:
        """Kept columns of the input."""
        assert self._source is not None
        with self._lock:
            if self._reader is None:
                self._reader = self._stack.enter_context(self._source.open())
            if first + count > self._reader.size:
                raise SourceError(f"{self._source.shown} is shorter than it was; bring back what was there")
            return self._reader.table(first, count, names)


def _bunches(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    found: list[bytes] = []
    size = 0
    for raw in rows:
        found.append(raw)
        size += len(raw)
        if len(found) == _ROWS or size > _BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found
