"""What the names of a batch's input and output lead to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tpctl.errors import UsageError


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
