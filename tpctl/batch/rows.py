"""Rows on their way into a part: sums, and those that are kept of replicas which are gone."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from tpctl.batch.folder import JobFolder, Span, load, names, whole_lines, write_whole
from tpctl.client.results import json_row

_KEPT = re.compile(rb"\[(\d+), \d+, (.*)\]\n")  # JSON has no line end but this one


@dataclass
class Sums:
    """What rows come to. ``tokens`` of prompts and answers; ``cached``: of the prompts', those that the engines which
    answered had in their prefix caches; ``cut``: answers that ended with the context."""

    rows: int = 0
    errors: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, row: Mapping[str, Any], cached: int = 0) -> None:
        self.rows += 1
        self.errors += "error" in row
        self.cut += "note" in row
        self.prompt_tokens += row.get("prompt_tokens", 0)
        self.completion_tokens += row.get("completion_tokens", 0)
        self.cached_tokens += cached

    def add(self, other: Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def less(self, other: Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) - getattr(other, field.name))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class KeptRow:
    """A row, and how many tokens of its prompt were ``cached``."""

    row: Mapping[str, Any]
    cached: int = 0

    def line(self, place: int) -> bytes:
        """As journals have it, with its line's place in the part."""
        return json_row([place, self.cached, self.row])

    @staticmethod
    def parse(raw: bytes) -> tuple[int, KeptRow]:
        """Raises ``ValueError``: it is none, as what a power cut left of one."""
        place, cached, row = json.loads(raw)
        return place, KeptRow(row, cached)


def kept_lines(folder: JobFolder, part: int, among: Span | None = None) -> dict[int, bytes]:
    """Rows of a part that were saved from replicas which did not finish it, by their line's place in the part, as
    journals have them.

    Args:
        among: leave out files that hold none of this span.
    """
    found: dict[int, bytes] = {}
    for path in _kept_files(folder, part, among):
        for raw in whole_lines(path):
            with suppress(ValueError):
                found.setdefault(KeptRow.parse(raw)[0], raw)
    return found


def kept_rows(folder: JobFolder, part: int) -> dict[int, KeptRow]:
    """As ``kept_lines``, parsed."""
    return dict(KeptRow.parse(raw) for raw in kept_lines(folder, part).values())


def put_together(
    folder: JobFolder, part: int, rows: int, target: Path, encode: Callable[[IO[bytes], Iterable[bytes]], object]
) -> Sums | None:
    """Make a part of what was saved of it: ``target`` appears whole, and has its rows in order. ``None`` and no file,
    if one is missing. ``encode`` writes them as they are given out.

    Where replicas handed in all of it, as pieces with their sums, no row is parsed.

    Raises:
        OutputError: it cannot be written.
    """
    files = _kept_files(folder, part)
    handed = [found for path in files if (found := load(sums_beside(path))) is not None]
    sums = Sums()
    with ExitStack() as stack:
        maps = [mapped for path in files if (mapped := _mapped(path, stack)) is not None]
        if len(handed) == len(files) and sum(one["rows"] for one in handed) == rows:
            places = [(int(one[1]), data, *one.span(2)) for data in maps for one in _KEPT.finditer(data)]
            for found in handed:
                sums.add(Sums(**found))
            places.sort(key=lambda place: place[0])
        else:
            first: dict[int, tuple[int, mmap.mmap, int, int]] = {}
            for data in maps:
                for one in _KEPT.finditer(data):
                    with suppress(ValueError):
                        place, kept = KeptRow.parse(one[0])
                        if place not in first:
                            first[place] = (place, data, *one.span(2))
                            sums.count(kept.row, kept.cached)
            places = [first[place] for place in sorted(first)]
        if [place for place, *_ in places] != list(range(rows)):
            return None
        write_whole(target, lambda out: encode(out, _copied(places)))
    return sums


def sums_beside(rows: Path) -> Path:
    """The file of what the rows of another one come to."""
    return rows.with_name(f"{rows.name}.sums")


def sums_of(rows: Iterable[Mapping[str, Any]]) -> Sums:
    """What rows come to that are read from a part; it does not say what was cached."""
    sums = Sums()
    for row in rows:
        sums.count(row)
    return sums


def keep_rows(path: Path, rows: Mapping[int, KeptRow]) -> None:
    """Write rows by their places, in order, for who takes what is left of their part. Errors as ``write_whole``."""
    write_whole(path, lambda out: out.writelines(kept.line(place) for place, kept in sorted(rows.items())))


def _kept_files(folder: JobFolder, part: int, among: Span | None = None) -> list[Path]:
    found = []
    for name in sorted(names(folder.kept)):
        if name.startswith(f"{part:05d}.") and not name.endswith(".sums"):
            parsed = Span.parse(name.removesuffix(".rows"))
            if among is None or parsed is None or parsed[0].meets(among):
                found.append(folder.kept / name)
    return found


def _mapped(path: Path, stack: ExitStack) -> mmap.mmap | None:
    """A file's bytes, until the stack is left; ``None`` if it has none."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return None
            return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        return None


def _copied(places: Iterable[tuple[int, mmap.mmap, int, int]]) -> Iterator[bytes]:
    for _, data, start, end in places:
        yield data[start:end] + b"\n"
