"""One coordinator to a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tpctl.batch.folder import JobFolder, load, names
from tpctl.batch.signs import Watch, lock, machine
from tpctl.client.disk import writing
from tpctl.errors import OutputError

_OTHERS_SIGN = 3.5  # seconds in which another coordinator gives one


@contextmanager
def claimed(folder: JobFolder) -> Iterator[None]:
    """Have the folder to oneself, as its coordinator. What was made is removed again if no batch began in it.

    Raises:
        OutputError: another process has it, it holds something else, or it cannot be written to.
    """
    if not folder.job.is_dir() and names(folder.root):
        raise OutputError(f"{folder.root} holds files that are no batch's; name a new or an empty folder with -o")
    folder.make()
    held = take(folder)
    try:
        yield
    finally:
        if folder.job.is_dir() and not folder.manifest.exists():
            shutil.rmtree(folder.job, ignore_errors=True)
            with suppress(OSError):  # it holds something that others put there
                folder.root.rmdir()
        held.close()


def take(folder: JobFolder) -> IO[bytes]:
    """The coordinator's lock of a folder, which one process has.

    Raises:
        OutputError: another one has it, or gives signs of life from another machine.
    """
    refusal = OutputError(
        f"another tpctl batch is writing {folder.root}; wait for it, or see how far it is: "
        f"`tpctl batch status {folder.root}`"
    )
    with writing(folder.lock):
        held = lock(folder.lock)
    if held is None:
        raise refusal
    said = load(folder.state) or {}
    if said.get("state") == "running" and said.get("machine") != machine():
        watch = Watch(folder.state, folder.lock)
        watch.look()
        before, deadline = watch.said.get("count"), time.monotonic() + _OTHERS_SIGN
        while time.monotonic() < deadline:
            time.sleep(0.1)
            watch.look()
            if watch.said.get("count") != before:
                held.close()
                raise refusal
    return held
