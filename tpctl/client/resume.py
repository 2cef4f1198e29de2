"""What a batch may replace, what it goes on with, and what is said of the rows that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tpctl.client.jobs import Line
from tpctl.client.results import Results
from tpctl.errors import EngineError, OutputError, SourceError, UsageError, counted


def check_target(target: Path, *, force: bool) -> None:
    """Refuse to replace answers that nobody gave up. Raises ``OutputError``: ``target`` holds some."""
    if target.is_file() and target.stat().st_size and not force:
        raise OutputError(f"{target} exists already; use --force to replace it, or name another file with -o")


def check_kept(results: Results, lines: Iterable[Line], shown: str) -> str | None:
    """Whether the rows that a run finds answer the lines it is given.

    Args:
        shown: what the input is called.

    Returns:
        What to say of rows that answer none of them any more, if there are some.

    Raises:
        UsageError: that goes for all rows.
    """
    kept = results.count
    matching = sum(results.has(line) for line in lines)
    rows = f"{counted(kept, 'row')} in {results.partial}"
    if kept and not matching:
        raise UsageError(
            f"none of the {rows} answers a line of {shown}; give the input that they were made from, or delete the file"
        )
    return f"{kept - matching} of the {rows} answer no line of {shown} any more" if matching < kept else None


def rows_left(results: Results) -> str | None:
    """Where the finished rows of ``results`` are, if there are some and they stay: for ``remains``."""
    if results.partial is None or not results.count:
        return None
    rows = "1 finished row is" if results.count == 1 else f"{results.count} finished rows are"
    return f"{rows} in {results.partial}"


@contextmanager
def remains(left: Callable[[], str | None]) -> Iterator[None]:
    """Adds to an error what became of the rows that were finished before it; to a ``SystemExit``, as a note.

    Args:
        left: says where they are, if there are some.
    """
    try:
        yield
    except (EngineError, OutputError, SourceError, KeyboardInterrupt, SystemExit) as error:
        where = left()
        if where is None:
            raise
        kept = f"{where}, go on with --resume"
        if isinstance(error, SystemExit):
            error.add_note(kept)
            raise
        if isinstance(error, KeyboardInterrupt):  # the second one
            raise KeyboardInterrupt(kept) from None
        raise type(error)(f"{error}; {kept}") from None
