"""The file that the rows of parts are put together in: when it may be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tpctl.batch.status import parts_folder
from tpctl.client.results import partial_of
from tpctl.errors import OutputError


def check_file(target: Path, *, resume: bool, force: bool, finished: Callable[[], object]) -> None:
    """Refuse to replace rows that nobody gave up.

    Args:
        resume: an interrupted run may be gone on with; ``force``: what is there may be replaced.
        finished: is asked where there is content that is kept, and a run is to be gone on with: it ends this one if
            those are its rows.

    Raises:
        OutputError: the file holds something, or rows of an interrupted run lie beside it.
    """
    partial, parts = partial_of(target), parts_folder(target)
    if partial.exists():
        raise OutputError(
            f"{partial} holds the rows of an interrupted run with one engine; go on with it without "
            "--replicas, or delete it"
        )
    if target.exists() and target.stat().st_size and not force:
        if resume:
            finished()
        how = "--resume --force" if resume else "--force"
        raise OutputError(f"{target} exists already; use {how} to replace it, or name another file with -o")
    if force and not resume and parts.exists():
        raise OutputError(f"{parts} holds the rows of an interrupted run; go on with --resume, or delete it")
