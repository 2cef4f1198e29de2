"""Places that a user names: what their names must be, and where results may go."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from tpctl.errors import OutputError, SourceError


def resolved(path: Path, option: str = "-o") -> Path:
    """``path`` with its links followed; nothing need be there.

    Raises:
        OutputError: a link in it leads back to itself.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutputError(f"{path} is a link that leads back to itself; choose another place ({option})") from None
    return path.resolve()


def require_utf8(path: str | Path) -> None:
    """Raise unless ``path`` can be written down: in a manifest, in JSON, in a message.

    Raises:
        SourceError: a name in it has bytes that are not UTF-8.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise SourceError(f"the path {shown} is not UTF-8; rename it") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to the file ``path``, which keeps what it held unless all of it is on disk. A device gets it at
    once."""
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            file.write(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_overlap(output: Path, source: Path) -> None:
    """Raise unless ``output`` is apart from the folder ``source``, which is read: neither it, nor in it, nor around it.

    Raises:
        OutputError: it is not.
    """
    out, read = resolved(output), resolved(source)
    if out == read:
        raise OutputError(f"{output} is {source} itself, which is read; choose another folder (-o)")
    if out.is_relative_to(read):
        raise OutputError(f"{output} is inside {source}, which is read; choose another folder (-o)")
    if read.is_relative_to(out):
        raise OutputError(f"{output} holds the source {source} itself; choose another folder (-o)")
