"""What the names of a batch's input and output lead to, and how they are read and written."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tpctl.checkpoint.outputs import resolved
from tpctl.cli.console import note
from tpctl.cli.streams import NamedFile, is_closed_pipe, stdin_bytes
from tpctl.errors import OutputError, SourceError, UsageError


def refuse_own_input(prompts: str, output: str) -> None:
    """Refuse to read and write one file, by whatever names: it would be lost, or never end."""
    from tpctl.client.results import partial_of

    read = _identity(0 if prompts == "-" else Path(prompts))
    if read is None:
        return
    written: list[tuple[int | Path, str]] = [(1, "standard output")]
    if output != "-":
        kept = partial_of(Path(output)) if Path(output).name else Path(output)
        written = [(Path(output), output), (kept, f"{output}.partial, where rows are kept")]
    for place, name in written:
        if _identity(place) == read:
            source = "standard input" if prompts == "-" else prompts
            also = "" if name == source else f", as {name}"
            raise UsageError(f"{source} is input and output at once{also}; name another file with -o")


def _identity(place: int | Path) -> tuple[int, int] | None:
    """Which file or pipe is open as number ``place``, or at that path; devices may be read and written at once."""
    try:
        found = os.fstat(place) if isinstance(place, int) else place.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode) else None


def is_pipe(path: str) -> bool:
    """Whether ``path`` is a named pipe, whose opening waits for its other end; one that is open already does not."""
    return Path(path).is_fifo() and not path.startswith(("/dev/", "/proc/"))


def target_of(output: str) -> Path | None:
    """The file that rows are collected for; ``None`` where they go out one by one: to stdout, a pipe or a device."""
    if output == "-":
        return None
    path = Path(output)
    if not path.name:
        raise OutputError(f"{output} is a folder; name a file to write to")
    if path.exists() and not path.is_file() and not path.is_dir():
        return None
    return resolved(path) if path.is_symlink() else path  # the link stays, what it names is replaced


@contextmanager
def opened(prompts: str, *, count: bool) -> Iterator[tuple[IO[bytes], int | None]]:
    """The input, and how many lines with text it has, if that is asked for and can be counted."""
    from tpctl.client.jobs import bounded_lines

    if prompts == "-":
        with stdin_bytes() as stream:
            yield stream, None
        return
    if is_pipe(prompts):
        note(f"waiting for somebody to write to {prompts}")
    try:
        stream = Path(prompts).open("rb")  # noqa: SIM115 — closed below
    except OSError as error:
        raise SourceError(f"cannot read {prompts}: {error.strerror}") from None
    with stream:
        if is_file(stream):
            if stream.read(4) == b"GGUF":
                raise SourceError(f"{prompts} is a GGUF model, not a file of prompts; give it with --model")
            stream.seek(0)
        total = None
        if count and is_file(stream):
            total = sum(1 for line in bounded_lines(stream, prompts) if line.strip())
            stream.seek(0)
        yield stream, total


@contextmanager
def output_stream(output: str, target: Path | None) -> Iterator[IO[bytes] | None]:
    """Where rows go at once, if they do."""
    if target is not None:
        yield None
    elif output == "-":
        yield sys.stdout.buffer
    else:
        if is_pipe(output):
            note(f"waiting for somebody to read {output}")
        try:
            file = NamedFile(output, "wb", output)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}") from None
        stream = io.BufferedWriter(file)
        try:
            yield stream
        except BaseException:
            with suppress(OSError):  # what could not be written was said when it was tried
                stream.close()
            raise
        with writing():
            stream.close()


def is_file(stream: IO[bytes]) -> bool:
    return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)


@contextmanager
def writing() -> Iterator[None]:
    """Says of rows that cannot go out one by one how none would be lost."""
    try:
        yield
    except OSError as error:
        if is_closed_pipe(error) or error.filename is None:
            raise
        if error.filename == "standard output":
            instead = "with -o FILE finished rows are kept for --resume"
        else:
            instead = "name a file on a disk with -o, beside which finished rows are kept for --resume"
        raise OutputError(f"cannot write to {error.filename}: {error.strerror}; {instead}") from None
