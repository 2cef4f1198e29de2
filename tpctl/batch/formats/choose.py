"""Which source and which sink a batch has: by what its user says, or by the input's name and first lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpctl.batch.formats.files import begins_as_parquet, find, is_several, refuse_model
from tpctl.batch.formats.jsonl import AnySink, JsonlSink, JsonlSource, KeptSink
from tpctl.batch.formats.openai import OPENAI, OpenAISink
from tpctl.batch.formats.parquet import ParquetSource
from tpctl.batch.formats.parquet_sink import ParquetSink
from tpctl.batch.formats.place import Formats, Sink
from tpctl.client.forms import ALL, ROW_FIELDS, OwnForm
from tpctl.errors import SourceError, UsageError, shown

NAMED = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl"}
"""What a file's name says of its format."""


@dataclass(frozen=True)
class Asked:
    """What is asked for; ``None``, and no columns: nothing is said.

    Attributes:
        input_format: jsonl, openai or parquet; ``output_format``: jsonl or parquet.
    """

    input_format: str | None = None
    output_format: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    keep_columns: tuple[str, ...] | str = ()
    answer_column: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, by the options' names."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def form(self) -> OwnForm:
        return OwnForm(self.prompt_column, self.id_column, self.keep_columns, self.answer_column or "text")

    def columns(self) -> str | None:
        """An option about columns that was given."""
        names = ("prompt_column", "id_column", "keep_columns", "answer_column")
        return next((f"--{name.replace('_', '-')}" for name in names if getattr(self, name)), None)


@dataclass(frozen=True)
class FormatSpec:
    """The formats of a batch, as its replicas are told: nothing is left open.

    Attributes:
        prompts: the input, by a name that holds on every host.
        read: jsonl, openai or parquet; ``write``: jsonl, openai or parquet.
        model: what answers in OpenAI's form say that they are from.
    """

    prompts: str
    read: str
    write: str
    asked: Asked
    model: str

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> FormatSpec:
        asked = dict(value["asked"])
        if isinstance(asked["keep_columns"], list):
            asked["keep_columns"] = tuple(asked["keep_columns"])
        return FormatSpec(**{**value, "asked": Asked(**asked)})

    def formats(self) -> Formats:
        form = self.asked.form
        if self.read == "parquet":
            source = ParquetSource(self.prompts, form, carried=self.write != "parquet")
            return Formats(source, self._sink(source))
        lines = JsonlSource(Path(self.prompts), form, OPENAI if self.read == "openai" else form)
        return Formats(lines, self._sink(None))

    def _sink(self, source: ParquetSource | None) -> Sink:
        answer = self.asked.form.answer
        if self.write == "parquet":
            return ParquetSink(source, answer)
        if self.write == "openai":
            return OpenAISink(self.model)
        return KeptSink(answer) if self.asked.keep_columns or answer != "text" else JsonlSink()


def plain(prompts: Path) -> Formats:
    """Lines in tpctl's own form, and rows in the same."""
    return Formats(JsonlSource(prompts), JsonlSink())


def choose(prompts: str, output: str, asked: Asked, model: str) -> FormatSpec | None:
    """The formats of a batch; ``None`` where its lines have to come first (``by_first_line``).

    Raises:
        UsageError: options contradict each other, or need what is not installed.
        SourceError: the input cannot be read, or has not what is asked for.
    """
    _check(asked)
    read = asked.input_format or ("parquet" if is_several(prompts) or begins_as_parquet(prompts) else None)
    named = next((form for end, form in NAMED.items() if output.endswith(end)), None)
    if named is not None and asked.output_format not in (None, named) and not Path(output).is_dir():
        raise UsageError(f"--output-format is {asked.output_format}, but {output} is called {named}; leave one out")
    write = asked.output_format or ("parquet" if named == "parquet" else None)
    if read == "parquet":
        if prompts == "-":
            raise UsageError("Parquet is read by rows' places; give a file in place of -")
        if Path(prompts).is_dir():
            find(prompts)  # what it lacks is said before what is not installed
        folder = output.endswith("/") or (output != "-" and Path(output).is_dir())
        spec = FormatSpec(prompts, "parquet", write or ("parquet" if folder else "jsonl"), asked, model)
    elif prompts == "-" or not Path(prompts).is_file():
        if read is None and not Path(prompts).exists() and prompts != "-":
            return FormatSpec(prompts, "jsonl", write or "jsonl", asked, model)  # who opens it says why not
        if write == "parquet":
            raise UsageError(f"Parquet is written for what is read from a file; {prompts} is none, give one")
        return None if read is None else _of_lines(prompts, read, write, asked, model)
    else:
        refuse_model(prompts)
        if read is not None and begins_as_parquet(prompts):
            raise UsageError(f"{prompts} is Parquet, and not --input-format {read}; leave that out")
        spec = _of_lines(prompts, read or _recognised(prompts, asked), write, asked, model)
    if spec.write == "parquet" and output == "-":
        raise UsageError("Parquet is no stream; name a file or a folder for it with -o")
    if isinstance(source := spec.formats().source, ParquetSource):
        source.check()
    return spec


def by_first_line(source: JsonlSource, asked: Asked, model: str) -> Sink:
    """What rows become whose lines come one by one: what the first of them asks for."""
    own = _of_lines("-", "jsonl", "jsonl", asked, model)._sink(None)
    return AnySink(source, own, OpenAISink(model))


def _of_lines(prompts: str, read: str, write: str | None, asked: Asked, model: str) -> FormatSpec:
    if read == "openai":
        if (given := asked.columns()) is not None:
            raise UsageError(f"{given} is for rows of data sets, and {prompts} has OpenAI batch lines; leave it out")
        if write == "parquet":
            raise UsageError(f"{prompts} has OpenAI batch lines, whose answers are lines, too; write no Parquet")
        return FormatSpec(prompts, "openai", "openai", asked, model)
    if write == "parquet" and asked.keep_columns:
        raise UsageError(
            "--keep-columns has no types to go by where the input is JSON and the output Parquet; write JSON lines, or "
            "give Parquet"
        )
    return FormatSpec(prompts, "jsonl", write or "jsonl", asked, model)


def _recognised(prompts: str, asked: Asked) -> str:
    """How a file's lines ask, by the first of them.

    Raises:
        SourceError: none of those has a field that is asked for.
    """
    form = asked.form
    source = JsonlSource(Path(prompts), form)
    with source.open() as reader:
        entries = reader.head()
    if source.form is OPENAI:
        return "openai"
    wanted = [asked.prompt_column, asked.id_column, *(asked.keep_columns if asked.keep_columns != ALL else ())]
    fields = dict.fromkeys(name for entry in entries for name in entry)
    for name in wanted:
        if entries and name is not None and name not in fields:
            there = ", ".join(shown(field) for field in list(fields)[:20])
            raise SourceError(f"no line of {prompts} has a field {shown(name)}; they have {there}")
    return "jsonl"


def _check(asked: Asked) -> None:
    if "" in (asked.prompt_column, asked.id_column, asked.answer_column, *asked.keep_columns):
        raise UsageError("a column's name is empty; give one, or leave the option out")
    if asked.answer_column in set(ROW_FIELDS) - {"text"}:
        raise UsageError(f"--answer-column {asked.answer_column} is what rows have already; choose another name")
