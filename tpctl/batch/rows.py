"""Rows on their way into a part: sums, those that are kept of replicas which are gone, and files that appear whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tpctl.batch.folder import JobFolder, names, whole_lines
from tpctl.client.disk import writing
from tpctl.errors import RequestError


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


def kept_lines(folder: JobFolder, part: int) -> dict[int, bytes]:
    """Rows of a part that were saved from replicas which did not finish it, by their line's place in the part, as
    journals have them: ``[place, row]``."""
    found: dict[int, bytes] = {}
    for name in sorted(names(folder.kept)):
        if name.startswith(f"{part:05d}."):
            for raw in whole_lines(folder.kept / name):
                with suppress(ValueError):  # what a power cut left of a row
                    found.setdefault(json.loads(raw)[0], raw)
    return found


def kept_rows(folder: JobFolder, part: int) -> dict[int, dict[str, Any]]:
    """As ``kept_lines``, without the places."""
    return {place: json.loads(raw)[1] for place, raw in kept_lines(folder, part).items()}


def write_rows(path: Path, rows: Iterable[bytes]) -> None:
    """Make a file of rows appear whole, through to the disk.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    with writing(path):
        with temporary.open("wb") as file:
            file.writelines(rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_part(path: Path, rows: Mapping[int, Mapping[str, Any]], *, places: bool) -> Sums:
    """Write rows in the order of their lines; with their ``places``, or as they are given out. Errors as
    ``write_rows``."""
    sums = Sums()
    for row in rows.values():
        sums.count(row)
    ordered = sorted(rows.items())
    write_rows(path, (json_row([place, row] if places else row) for place, row in ordered))
    return sums


def json_row(value: Any) -> bytes:
    """A line of JSON.

    Raises:
        RequestError: it holds a number that JSON knows no form of.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
    except ValueError:
        raise RequestError(
            "the answer's numbers are not finite (NaN or infinity), which JSON has no form for"
        ) from None
