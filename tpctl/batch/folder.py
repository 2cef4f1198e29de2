"""The folder that a batch over several engines lives in. docs/batch.md draws it.

What is done stands in it, and nowhere else: each file appears, moves and disappears by one rename, so that whoever is
killed at any moment leaves the state before or the state after.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tpctl.client.disk import writing
from tpctl.errors import OutputError

_SPAN = re.compile(r"(\d{5,})\.(\d+)-(\d+)\.(\d+)(?:~(\d+))?(?:@([\w-]+))?")
_PART = re.compile(r"part-(\d+)\.(?:jsonl|parquet)", re.ASCII)

DEATHS = 3
"""Engines, at least, that died over a line before it becomes an error row."""


OWN = secrets.token_hex(4)
"""What tells this process from others, which in containers on other hosts may have its number."""


@dataclass(frozen=True, order=True)
class Span:
    """Lines of one part: ``count`` of them from the line ``first`` on (counted from 0) in the order in which they are
    answered (``prefixes.order_of``), which ``deaths`` engines have died over. ``share``: those that begin alike, from
    1; 0 if lines are not told apart."""

    part: int
    first: int
    count: int
    deaths: int = 0
    share: int = 0

    @property
    def name(self) -> str:
        share = f"~{self.share}" if self.share else ""
        return f"{self.part:05d}.{self.first}-{self.count}.{self.deaths}{share}"

    @property
    def alone(self) -> bool:
        """Whether a replica that takes it takes nothing else meanwhile: one of its lines may be deadly."""
        return self.deaths >= DEATHS - 1

    def held_by(self, replica: str) -> str:
        """The name of the file that says so."""
        return f"{self.name}@{replica}"

    @staticmethod
    def parse(name: str) -> tuple[Span, str] | None:
        """A file's name as a span and who holds it (empty: nobody); ``None`` for other files."""
        if (found := _SPAN.fullmatch(name)) is None:
            return None
        part, first, count, deaths, share = (int(text or 0) for text in found.groups()[:5])
        return Span(part, first, count, deaths, share), found[6] or ""

    def meets(self, other: Span) -> bool:
        """Whether a line is in both."""
        return self.part == other.part and max(self.first, other.first) < min(self.end, other.end)

    @property
    def end(self) -> int:
        return self.first + self.count


class JobFolder:
    """Where everything lies.

    Attributes:
        root: the parts and what is said of them; the rest is in its subfolder ``.job``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.job = root / ".job"
        self.manifest = root / "manifest.json"
        self.stats = root / "stats.json"
        self.offers = self.job / "offers"
        self.leases = self.job / "leases"
        self.work = self.job / "work"
        self.finished = self.job / "finished"
        self.kept = self.job / "kept"
        self.replicas = self.job / "replicas"
        self.lock = self.job / "lock"
        self.state = self.job / "state.json"
        self.spec = self.job / "job.json"
        self.template = self.job / "chat_template.jinja"
        self.index = self.job / "parts.index"
        self.ids = self.job / "ids"
        self.log = self.job / "parts.log"
        self.lives = self.job / "replicas.log"
        self.stop = self.job / "stop"

    def make(self) -> None:
        """Create what is missing.

        Raises:
            OutputError: it cannot be written there.
        """
        with writing(self.root):
            self.root.mkdir(exist_ok=True)
            for folder in (self.offers, self.leases, self.work, self.finished, self.kept, self.replicas):
                folder.mkdir(parents=True, exist_ok=True)

    def part(self, number: int, suffix: str = ".jsonl") -> Path:
        return self.root / f"part-{number:05d}{suffix}"

    def parts(self) -> dict[int, Path]:
        """The parts that are there."""
        found = {}
        for name in names(self.root):
            if part := _PART.fullmatch(name):
                found[int(part[1])] = self.root / name
        return found

    def check_there(self) -> None:
        """Raise ``OutputError`` if the folder was removed, or its file system is gone."""
        if not self.job.is_dir():
            raise OutputError(
                f"{self.root} is gone; bring it back (mount its disk again) and go on with --resume, or begin anew"
            )


def names(folder: Path) -> list[str]:
    """The names in a folder; none if it is not there."""
    try:
        return os.listdir(folder)  # noqa: PTH208 — hundreds a second, and only names are wanted
    except FileNotFoundError:
        return []


def spans_in(folder: Path) -> Iterator[tuple[str, Span, str]]:
    """Files that stand for spans: name, span, holder; in the order of the input."""
    found = [
        (span, holder, name) for name in names(folder) if (parsed := Span.parse(name)) for span, holder in [parsed]
    ]
    for span, holder, name in sorted(found):
        yield name, span, holder


def unfinished(path: Path) -> Path:
    """Where this process writes a file that is to appear whole; others that write the same one do it elsewhere."""
    return path.with_name(f".{path.name}.{OWN}")


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file appear whole, through to the disk.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        _appear(path, write, sync=True)


def put(path: Path, data: bytes | Mapping[str, Any], *, sync: bool = False) -> None:
    """As ``write_whole``, of a few bytes, or a JSON object.

    Args:
        sync: on the disk before it has its name.
    """
    if not isinstance(data, bytes):
        data = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with writing(path):
        try:
            _appear(path, lambda file: file.write(data), sync=sync)
        except FileNotFoundError:
            # A coordinator that took this one's process for gone has tidied up in between.
            _appear(path, lambda file: file.write(data), sync=sync)


def _appear(path: Path, write: Callable[[IO[bytes]], object], *, sync: bool) -> None:
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:
        discard(temporary)
        raise


def move(source: Path, target: Path) -> bool:
    """Rename; whether ``source`` was still there. On a network's file system an answer may be lost: then the file has
    its new name, though the rename says that there was none.

    Raises:
        OutputError: it cannot be done.
    """
    with writing(target):
        try:
            source.rename(target)
        except FileNotFoundError:
            return False
    return True


def load(path: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` if there is none to be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that is only appended to; one that was cut off at the end is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield raw


def json_lines(path: Path) -> Iterator[Any]:
    """The values of such a file, up to a line that is none."""
    for raw in whole_lines(path):
        try:
            yield json.loads(raw)
        except ValueError:
            return


def log_lines(path: Path) -> Iterator[Any]:
    """The values of a file of ``open_log``, but for what a full disk or a power cut left of one."""
    for raw in whole_lines(path):
        with suppress(ValueError):
            yield json.loads(raw)


def open_log(path: Path) -> IO[bytes]:
    """A file that each run appends lines to; behind one that was cut off begins a new one.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        file = path.open("a+b")
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file


def discard(path: Path) -> None:
    """Remove a file, if that can be done."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
