"""What ``tpctl batch`` reads and writes: the options, and the input opened for one engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.places import is_file, opened
from tpctl.errors import OutputError, UsageError

if TYPE_CHECKING:
    from tpctl.batch.formats.choose import Asked, FormatSpec
    from tpctl.batch.formats.place import Reader, Sink, Source


class InputFormat(StrEnum):
    jsonl = "jsonl"
    openai = "openai"
    parquet = "parquet"


class OutputFormat(StrEnum):
    jsonl = "jsonl"
    parquet = "parquet"


@dataclass(frozen=True)
class FormatOptions:
    """Formats and columns; ``None``: as the files' names and first lines have it."""

    input_format: Annotated[InputFormat | None, typer.Option(help="Default: by the name and the first lines.")] = None
    output_format: Annotated[
        OutputFormat | None, typer.Option(help="Default: by OUTPUT's name; of a FOLDER the input's.")
    ] = None
    prompt_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column, or field of each line, that has the prompt: a text, or a list of messages."
        ),
    ] = None
    id_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column that has the id.")] = None
    keep_columns: Annotated[
        str | None, typer.Option(metavar="A,B|all", help="Columns that go into the rows as they are.")
    ] = None
    answer_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the answer's text is called. Default: text.")
    ] = None

    def asked(self) -> Asked:
        """As ``batch`` has it."""
        from tpctl.batch.formats.choose import Asked
        from tpctl.client.forms import ALL

        keep: tuple[str, ...] | str = ()
        if self.keep_columns is not None:
            keep = ALL if self.keep_columns == ALL else tuple(name.strip() for name in self.keep_columns.split(","))
        return Asked(
            None if self.input_format is None else str(self.input_format),
            None if self.output_format is None else str(self.output_format),
            self.prompt_column,
            self.id_column,
            keep,
            self.answer_column,
        )


def located(spec: FormatSpec | None, prompts: str) -> FormatSpec:
    """The formats of a batch over parts, with the input by a name that replicas can use wherever they are.

    Raises:
        UsageError: it is no file; SourceError: it cannot be read.
    """
    from tpctl.batch.formats.files import refuse_model

    if prompts == "-":
        raise UsageError("a batch over parts reads its lines by their place in a file; give a file in place of -")
    if spec is None:
        raise UsageError(f"a batch over parts reads its lines by their place in a file; {prompts} is no file, give one")
    if spec.read == "parquet":
        return spec if "://" in prompts else replace(spec, prompts=os.path.abspath(prompts))  # noqa: PTH100 — a pattern
    refuse_model(prompts)
    return replace(spec, prompts=str(Path(prompts).resolve()))


def refuse_among_input(spec: FormatSpec | None, output: str) -> None:
    """Refuse rows that would be taken for input the next time.

    Raises:
        OutputError: they would.
    """
    if spec is None or spec.read != "parquet" or "://" in spec.prompts or output == "-":
        return
    from tpctl.batch.formats.files import find

    place = Path(output).absolute()
    folder = Path(spec.prompts).absolute()
    among = [Path(path).absolute() for path in find(spec.prompts).paths]
    if place in among or (folder.is_dir() and folder in (place, *place.parents)):
        raise OutputError(f"{output} would be among the files of {spec.prompts}; name another place with -o")


@dataclass(frozen=True)
class Opened:
    """The input of one engine.

    Attributes:
        total: its lines, if they were counted.
        sink: what rows become.
    """

    source: Source
    reader: Reader
    total: int | None
    sink: Sink


@contextmanager
def opened_input(spec: FormatSpec | None, asked: Asked, prompts: str, model: str, *, count: bool) -> Iterator[Opened]:
    """Open the input for one engine, whatever it is: a file, a pipe, tables.

    Raises:
        SourceError: it cannot be read.
        UsageError: it is not what options say.
    """
    from tpctl.batch.formats.choose import by_first_line
    from tpctl.batch.formats.jsonl import JsonlReader, JsonlSource
    from tpctl.batch.formats.openai import OPENAI

    if spec is not None and spec.read == "parquet":
        formats = spec.formats()
        with formats.source.open() as reader:
            yield Opened(formats.source, reader, reader.size, formats.sink)
        return
    name = "standard input" if prompts == "-" else prompts
    told = None if spec is None else OPENAI if spec.read == "openai" else asked.form
    source = JsonlSource(Path(prompts), asked.form, told, name)
    sink = by_first_line(source, asked, model) if spec is None else spec.formats().sink
    with opened(prompts, count=count) as (stream, total):
        yield Opened(source, JsonlReader(stream, source, again=is_file(stream)), total, sink)
