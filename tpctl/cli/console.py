"""Where output goes: results to stdout, everything else (progress, hints, errors) to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tpctl.checkpoint.progress import Progress
from tpctl.errors import json_printable, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def stdout() -> Console:
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # ``main`` knows what to do

    return Output(highlight=False, markup=False, emoji=False)  # names may hold [brackets] and :colons:


def say(text: str = "") -> None:
    """A line of a report on stdout. What it says comes from files that others made, so nothing in it steers the
    terminal."""
    print(printable(text))


def note(text: str) -> None:
    """A line for the person at the terminal: to stderr, unstyled, never mixed with results.

    Where stderr takes no more (the log's disk is full, its reader gone) the work goes on without.
    """
    with suppress(OSError):
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """``value`` on stdout. What a terminal would obey is escaped, which leaves the value what it is."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("\n".join(json_printable(row) for row in text.split("\n")))


@contextmanager
def byte_progress(title: str) -> Iterator[Progress]:
    """A progress bar in bytes on stderr, from the first report on; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, what="": None
        return
    with ExitStack() as stack:
        bar: Bar | None = None
        task: TaskID | None = None

        def update(done: int, total: int, what: str = "") -> None:
            nonlocal bar, task
            if bar is None or task is None:
                bar = stack.enter_context(_byte_bar())
                task = bar.add_task(printable(title), total=None)
            bar.update(task, completed=done, total=total, description=printable(f"{title} {what}".rstrip()))

        yield update


def _byte_bar() -> Bar:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=stderr(), transient=True)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something takes its time, which can be told what does; silent where stderr is no
    terminal."""
    if not sys.stderr.isatty():
        yield lambda more: None
        return
    from rich.text import Text

    with stderr().status(Text(printable(text))) as shown:
        yield lambda more: shown.update(Text(printable(f"{text}: {more}")))
