"""How far a batch is, read from its folder by anybody at any time."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tpctl.batch.folder import JobFolder, load, log_lines, names
from tpctl.batch.rows import Sums
from tpctl.batch.signs import Watch
from tpctl.client.results import partial_of
from tpctl.errors import SourceError

_SIGN = 2.5  # seconds in which a coordinator on another machine gives one


@dataclass(frozen=True)
class BatchStatus:
    """What ``tpctl batch status`` says.

    Attributes:
        state: running, done, interrupted, failed (``reason``), or killed: it says that it runs, and gives no sign.
        rows: that are there, of ``total`` lines (``whole``: the input was read to its end).
        parts: that are done.
        since: when the run began, and ``end``, when it is expected to end: UTC, ISO 8601.
        prompt_tokens, completion_tokens: of rows in parts that are done; speeds are a second's.
        pending: of replicas that cannot be started yet.
        replicas: name, machine's name, state and rows of each that has given signs; silent if it gives none any more.
    """

    state: str
    reason: str | None
    rows: int
    total: int
    whole: bool
    errors: int
    parts: int
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    since: str
    seconds: float
    left: float | None
    end: str | None
    wanted: int
    pending: str
    replicas: list[dict[str, Any]]


def parts_folder(out: Path) -> Path:
    """Where the parts of a file of answers lie until all are there."""
    return out.with_name(out.name + ".parts")


def read_status(out: Path) -> BatchStatus:
    """Look.

    Args:
        out: a folder of parts, or the file that they will become.

    Raises:
        SourceError: there is no batch.
    """
    folder = JobFolder(out if out.is_dir() else parts_folder(out))
    said = load(folder.state)
    if said is None:
        raise SourceError(_nothing(out))
    state = said["state"]
    if state == "running" and not _lives(folder):
        state = "killed"
    running = state == "running"
    sums, parts = _done(folder)
    left = said["left"] if running else None
    end = None if left is None else datetime.now(UTC) + timedelta(seconds=left)
    return BatchStatus(
        state=state,
        reason=said["reason"] if state == "failed" else None,
        rows=said["rows"] if running else sums.rows,
        total=said["total"],
        whole=said["whole"],
        errors=sums.errors,
        parts=parts,
        prompt_tokens=sums.prompt_tokens,
        completion_tokens=sums.completion_tokens,
        prompt_tokens_per_second=round(said["prompt_speed"], 1) if running else 0.0,
        tokens_per_second=round(said["speed"], 1) if running else 0.0,
        since=said["since"],
        seconds=round(said["seconds"], 1),
        left=None if left is None else round(left, 1),
        end=None if end is None else end.isoformat(timespec="seconds"),
        wanted=said["wanted"],
        pending=said.get("pending", "") if running else "",
        replicas=_replicas(folder, said.get("silent", ())) if running else [],
    )


def _nothing(out: Path) -> str:
    """Why there is nothing to say of an output."""
    if partial_of(out).is_file():
        return (
            f"one engine writes {out}, and its own progress alone says how far it is; rows that are done are in "
            f"{partial_of(out)}, parts come with --replicas or -o FOLDER/"
        )
    if out.is_file():
        return f"no batch over parts is at work on {out}, which is there whole"
    return f"there is no batch at {out}; give the folder or file that one writes to"


def _lives(folder: JobFolder) -> bool:
    """Whether the coordinator does: its lock says so on its own machine, elsewhere its count, which moves."""
    watch = Watch(folder.state, folder.lock)
    if not watch.look():
        return False
    if watch.locked:
        return True
    before, deadline = watch.said.get("count"), time.monotonic() + _SIGN
    while time.monotonic() < deadline:
        time.sleep(0.1)
        watch.look()
        if watch.said.get("count") != before:
            return True
    return False


def _done(folder: JobFolder) -> tuple[Sums, int]:
    there = folder.parts()
    by_part = {entry["part"]: Sums(**entry["sums"]) for entry in log_lines(folder.log)}
    sums = Sums()
    for number in there:
        sums.add(by_part.get(number, Sums()))
    return sums, len(there)


def _replicas(folder: JobFolder, silent: Collection[str]) -> list[dict[str, Any]]:
    found = []
    for file in sorted(names(folder.replicas)):
        if file.endswith(".json") and not file.startswith(".") and (said := load(folder.replicas / file)) is not None:
            name = file.removesuffix(".json")
            state = "silent" if name in silent else said.get("state")
            found.append({"name": name, "host": said.get("host"), "state": state, "rows": said.get("rows")})
    return found
