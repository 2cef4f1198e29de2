"""Whether a file is what a batch has left when it was finished: what ``--resume`` finds that comes once more."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tpctl.batch.formats.place import Formats
from tpctl.client.forms import Form
from tpctl.client.jobs import Line, unanswered


@dataclass(frozen=True)
class Finished:
    """A whole output: its rows, and how many of them are errors."""

    rows: int
    errors: int


def finished(formats: Formats, target: Path) -> Finished | None:
    """What ``target`` holds, if that is a row for each line of the input, with its id and in its order; else ``None``.

    Settings are not compared: rows do not say what they were made with.

    Raises:
        SourceError: the input cannot be read.
    """
    rows = errors = 0
    with formats.source.open() as reader, closing(_rows(formats, target)) as answers:
        for line, row in zip_longest(reader.lines(), answers):
            if line is None or row is None or not _answers(row, line, formats.source.form):
                return None
            rows += 1
            errors += "error" in row
    return Finished(rows, errors) if rows else None


def _rows(formats: Formats, target: Path) -> Generator[dict[str, Any] | None]:
    """The rows of a file; ``None`` for what is none, behind which nothing comes."""
    try:
        yield from formats.sink.decode(target)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        yield None


def _answers(row: Any, line: Line, form: Form) -> bool:
    """Whether a row has what answers and errors have, and the id of a line; in a Parquet column all ids are texts."""
    if not isinstance(row, dict) or not ("error" in row or "completion_tokens" in row):
        return False
    return str(row.get("id")) == str(unanswered(form, line, "")["id"])
