"""Where a batch's rows go: kept on disk the moment they finish, given out in the order of the input.

Rows finish in any order. Each is appended to ``OUT.partial`` at once, so that an interruption at any moment loses
only what was being computed; of the rows themselves only the place in that file is kept in memory (12 bytes each).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tpctl.client.disk import writing
from tpctl.client.jobs import Line
from tpctl.errors import OutputError, RequestError, UsageError, shown

_VERSION = 1


def partial_of(target: Path) -> Path:
    """The file that keeps a run's rows until all are there."""
    return target.with_name(target.name + ".partial")


Encode = Callable[[IO[bytes], int, Iterable[bytes]], object]
"""Writes rows, JSON each with its line's end, as they are given out; the first is that of the line of this index."""


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


def as_they_are(out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
    """Rows as they are kept."""
    out.writelines(rows)


class Results:
    """Rows of one batch, by the index of their line.

    Attributes:
        partial: the file that keeps finished rows until all are there; ``None`` when they go to a stream.
    """

    def __init__(
        self,
        target: Path | None,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        encode: Encode = as_they_are,
    ) -> None:
        """Open.

        Args:
            target: the file to publish; ``None`` keeps rows in an unnamed file for ``emit``.
            settings: what the answers depend on besides their lines; a run resumes only under the same ones.
            resume: go on with the rows of an interrupted run, if there are any.
            force: a ``target`` that has content now is to be replaced.
            encode: how rows are given out.

        Raises:
            OutputError: the file cannot be written there, another process writes it, or an interrupted run is in the
                way.
            UsageError: the interrupted run was made under other settings.
        """
        self._target = target
        self._encode = encode
        self.partial = None if target is None else partial_of(target)
        self._places = array("Q")  # by index: 1 + offset of the row, 0 for none
        self._checksums = array("I")
        self._emitted = 0
        self._found = None if target is None else state_of(target)  # what publishing replaces
        header = {"tpctl_batch": _VERSION, "settings": dict(settings), "replaces": force}
        self._file: IO[bytes]
        if self.partial is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 — closed by __exit__
            return
        with writing(self.partial):
            if target is not None and target.is_dir():
                raise OutputError(f"{target} is a folder; name a file to write to")
            if self.partial.exists() and not self.partial.is_file():
                raise OutputError(f"{self.partial}, where rows are kept until all are there, is no file; remove it")
            self._file = self.partial.open("a+b")
            if target is not None and target.exists():
                # What others may not read stays so on the way; its owner must be able to go on.
                self.partial.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)
        try:
            self._take_over(header, resume, force)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial is not None and not self.count:
            self.partial.unlink(missing_ok=True)  # nothing in it to go on with
        try:
            self._file.close()
        except OSError:  # what could not be written is tried again here
            if error is None:
                raise

    @property
    def count(self) -> int:
        """Rows that are kept."""
        return sum(place > 0 for place in self._places)

    def has(self, line: Line) -> bool:
        """Whether an earlier run answered this very line."""
        index = line.index
        return index < len(self._places) and self._places[index] > 0 and self._checksums[index] == line.checksum

    def add(self, line: Line, row: Mapping[str, Any], cached: int = 0) -> None:
        """Keep a finished row; how much of its prompt was cached is not kept.

        Raises:
            OutputError: it cannot be written.
            RequestError: it holds a number that JSON knows no form of.
        """
        data = json_row([line.index, line.checksum, row])
        with writing(self.partial):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        self._note(line.index, line.checksum, place)

    def emit(self, stream: IO[bytes], *, gaps: bool = False) -> None:
        """Write the rows after those emitted before: up to the first unfinished one, or over ``gaps``."""
        while self._emitted < len(self._places) and (gaps or self._places[self._emitted]):
            if self._places[self._emitted]:
                self._encode(stream, self._emitted, [self._row(self._emitted)])
            self._emitted += 1
        stream.flush()

    def publish(self, count: int) -> None:
        """Put the rows of the first ``count`` lines into the target, in order, all at once.

        Raises:
            OutputError: it cannot be written, or another has been put there meanwhile; the partial file stays, or
                where its folder is gone, a copy of it.
        """
        assert self._target is not None and self.partial is not None
        if state_of(self._target) not in (None, self._found):
            what = "appeared" if self._found is None else "changed"
            raise OutputError(
                f"{self._target} {what} while this ran, and is left as it is; move it away, or replace it with "
                "--resume --force"
            )
        if not self._target.parent.is_dir():
            raise OutputError(
                f"the folder of {self._target} is gone; make it again and go on with --resume, after "
                f"`mv {self._rescued()} {self.partial}`, which holds the finished rows"
            )
        temporary = self._target.with_name(f".{self._target.name}.publishing")
        with writing(self._target):
            try:
                with temporary.open("wb") as out:
                    self._encode(out, 0, map(self._row, range(count)))
                    out.flush()
                    os.fsync(out.fileno())
                if self._target.exists():
                    shutil.copymode(self._target, temporary)
                temporary.replace(self._target)
            finally:
                temporary.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)

    def _rescued(self) -> Path:
        """A copy of the partial file, which is open but has no name any more."""
        assert self.partial is not None
        with writing(None):
            self._file.seek(0)
            with tempfile.NamedTemporaryFile(prefix=f"{self.partial.name}.", delete=False) as copy:
                shutil.copyfileobj(self._file, copy)
            return Path(copy.name)

    def _take_over(self, header: Mapping[str, Any], resume: bool, force: bool) -> None:
        """Lock the partial file, and read what an interrupted run left in it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another tpctl batch is writing {self.partial}; wait for it") from None
        self._file.seek(0)
        first = self._file.readline()
        if first and not resume:
            raise OutputError(f"{self.partial} holds the rows of an interrupted run; go on with --resume, or delete it")
        if not first.endswith(b"\n"):
            self._file.truncate(0)
            with writing(self.partial):
                self._file.write(json.dumps(header).encode() + b"\n")
                self._file.flush()
            return
        found = _parse(first)
        if not isinstance(found, dict) or found.get("tpctl_batch") != _VERSION:
            raise OutputError(f"{self.partial} was not written by this version of tpctl batch; delete it")
        if self._found is not None and not (force or found.get("replaces")):
            raise OutputError(
                f"{self._target} appeared after the run began that {self.partial} is of; move it away, or replace it "
                "with --resume --force"
            )
        now = json.loads(json.dumps(header))["settings"]
        if made := differing(found["settings"], now):
            raise UsageError(f"{self.partial} was made with {made}; use the same, or delete the file")
        self._read_rows(len(first))

    def _read_rows(self, place: int) -> None:
        for raw in self._file:
            entry = _parse(raw) if raw.endswith(b"\n") else None
            if not isinstance(entry, list):
                break  # cut off in the middle of a row
            index, checksum, row = entry
            # A line that failed is tried again: it may have been corrected, or the failure may have passed.
            self._note(index, checksum, place if "error" not in row and not _has_nan(raw) else None)
            place += len(raw)
        self._file.truncate(place)

    def _note(self, index: int, checksum: int, place: int | None) -> None:
        missing = index + 1 - len(self._places)
        if missing > 0:
            self._places.extend([0] * missing)
            self._checksums.extend([0] * missing)
        self._places[index] = 0 if place is None else place + 1
        self._checksums[index] = checksum

    def _row(self, index: int) -> bytes:
        self._file.seek(self._places[index] - 1)
        return json.dumps(json.loads(self._file.readline())[2], ensure_ascii=False).encode() + b"\n"


def state_of(target: Path) -> tuple[int, int, int] | None:
    """What tells a file with content from another one; ``None``: there is none."""
    try:
        stat = target.stat()
    except OSError:
        return None
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat.st_size else None


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What settings differ in, as they were and are; empty if in nothing."""
    before, after = json.loads(json.dumps(before)), json.loads(json.dumps(after))
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if isinstance(was, dict) or isinstance(now, dict):  # options by name; earlier versions had fewer
            if made := _options(was or {}, now or {}):
                return made
        elif was != now:
            return f"{name} {was}, but now it is {now}"
    return ""


def _options(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The options that differ, as they were and are."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(
        f"{_option(name)} {_value(before.get(name, 'left out'))} (now {_value(after.get(name, 'left out'))})"
        for name in names
    )


def _option(name: str) -> str:
    return "--json-schema" if name == "response_format" else f"--{name.replace('_', '-')}"


def _value(value: Any) -> Any:
    """A value as it is typed, or, of a schema, as it begins."""
    if isinstance(value, dict):
        return shown(value.get("json_schema", {}).get("schema", value))
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _has_nan(raw: bytes) -> bool:
    """Whether a row holds NaN or infinity, which earlier versions wrote though JSON knows no such numbers."""
    found: list[str] = []
    if b"NaN" in raw or b"Infinity" in raw:  # in a text, most likely
        json.loads(raw, parse_constant=found.append)
    return bool(found)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None
