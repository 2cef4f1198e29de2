"""The three standard streams: errors that name the stream, closed ones that are not mistaken for empty ones."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

CLOSED_PIPE = 141
"""Exit code where the reader of our output is gone (``tpctl … | head``): 128 + SIGPIPE, as of any other command."""


class NamedFile(io.FileIO):
    """A file whose failing reads and writes say in ``OSError.filename`` which file it was.

    The system names a file only where one is opened by its name.
    """

    def __init__(self, file: str | int, mode: str, name: str) -> None:
        super().__init__(file, mode, closefd=not isinstance(file, int))
        self._name = name

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, "closed" if error.errno == errno.EBADF else error.strerror, self._name)

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            raise self._named(error) from None

    def readinto(self, buffer: Any, /) -> Any:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise self._named(error) from None

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise self._named(error) from None


class _OwnFile(io.FileIO):
    """What ``take_streams`` opens for stderr, told from files of others."""


def stdin_bytes() -> io.BufferedReader:
    """Standard input, apart from ``sys.stdin``.

    A thread that waits in ``sys.stdin`` when the program ends would hold the lock that exiting needs.
    """
    return io.BufferedReader(NamedFile(0, "rb", "standard input"))


def take_streams() -> None:
    """Prepare ``sys.stdin``, ``stdout`` and ``stderr`` for a command.

    A stream that the shell closed (``<&-``) fails when it is used, as its number would if the command were in C;
    Python alone would ignore what is written to it. Nobody can be told of a closed stderr. A character that the
    terminal cannot show becomes a "?".

    ``sys.stderr`` becomes a file of its own beside number 2, so that what a library writes there can be kept apart.
    """
    for number, name, unusable in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            _occupy(number, unusable)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(stdin_bytes())
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        raw = NamedFile(1, "wb", "standard output")
        encoding = None if sys.stdout is None else sys.stdout.encoding
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "replace", line_buffering=raw.isatty())
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        encoding = None if sys.stderr is None else sys.stderr.encoding
        # Without a buffer: what could not be written would be tried again at the end, and change the exit code.
        own: Any = _OwnFile(os.dup(2), "wb")
        sys.stderr = io.TextIOWrapper(own, encoding, line_buffering=True, write_through=True)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")


def give_stderr_back() -> None:
    """Close the file that ``take_streams`` made, which Python would otherwise warn of at its end."""
    own = sys.stderr
    if isinstance(own, io.TextIOWrapper) and isinstance(own.buffer, _OwnFile):
        sys.stderr = sys.__stderr__
        own.close()


def settle_stdout() -> None:
    """Write what is kept for stdout; if that cannot be, drop it and all that follows."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def is_closed_pipe(error: OSError) -> bool:
    return error.errno == errno.EPIPE


def _occupy(number: int, mode: int) -> None:
    """Open the closed file ``number``, which a file opened later would take."""
    opened = os.open(os.devnull, mode)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
