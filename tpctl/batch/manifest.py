"""What a folder of answers says of itself: ``manifest.json``, what they depend on; ``stats.json``, what they took."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder, load, put
from tpctl.batch.plan import Division, Plan
from tpctl.batch.prefixes import Sharing
from tpctl.client.results import differing
from tpctl.errors import OutputError, UsageError
from tpctl.version import __version__

VERSION = 1


def begun(folder: JobFolder, *, resume: bool, force: bool) -> bool:
    """Whether a batch that is to go on was begun in a folder, which is claimed; with ``force`` alone it is removed.

    Raises:
        OutputError: there is one, and nobody asked to go on with it, or it cannot be read.
    """
    found = load(folder.manifest)
    if found is not None and not resume:
        if not force:
            raise OutputError(
                f"{folder.root} holds a batch; go on with --resume, replace it with --force, or name another with -o"
            )
        found = None
    elif found is None and not force and (folder.parts() or folder.manifest.exists()):
        raise OutputError(
            f"{folder.manifest} cannot be read, and there are parts; bring it back, or begin anew with --force"
        )
    if found is None:
        _clear(folder)  # also what is left of one that was being removed when somebody was killed
    elif found.get("tpctl_batch") != VERSION:
        raise OutputError(f"{folder.manifest} was not written by this version of tpctl batch; name another with -o")
    return found is not None


def check_settings(folder: JobFolder, settings: Mapping[str, Any]) -> Division:
    """Compare a batch that goes on with how it was begun, as far as ``settings`` are known yet.

    Returns:
        How the input was divided.

    Raises:
        UsageError: it was begun with other settings.
    """
    found = load(folder.manifest) or {}
    before = {name: found["settings"].get(name) for name in settings}
    if made := differing(before, settings):
        raise UsageError(f"{folder.root} was made with {made}; use the same, or name another with -o")
    return Division(int(found["part_rows"]), Sharing(**found.get("sharing", {})))


def write_manifest(folder: JobFolder, settings: Mapping[str, Any], plan: Plan) -> None:
    """Say what the answers depend on; of the input as much as is known, all at the end of the batch.

    Raises:
        OutputError: it cannot be written.
    """
    whole = {"rows": plan.rows, "end": plan.end, "digest": plan.digest} if plan.whole else {}
    value = {
        "tpctl_batch": VERSION,
        "tpctl": __version__,
        "input": {"path": plan.formats.source.shown, **whole},
        "part_rows": plan.division.rows,
        "sharing": asdict(plan.division.sharing),
        "settings": dict(settings),
    }
    put(folder.manifest, value, sync=True)


def stats_of(board: Board, totals: Mapping[str, float], *, price: float | None) -> dict[str, Any]:
    """What the answers took, over all runs; ``price`` is that of a GPU's hour.

    What is counted of rows, cached tokens too, is exact: of those that are there, whoever was killed meanwhile. What
    replicas took (hours, computed tokens) is counted up to the last sign of each, a second before its end at most.
    """
    sums = board.sums
    seconds = totals["seconds"]
    hours = totals["gpu_seconds"] / 3600
    found: dict[str, Any] = {
        "rows": sums.rows,
        "errors": sums.errors,
        "cut": sums.cut,
        "prompt_tokens": sums.prompt_tokens,
        "cached_tokens": sums.cached_tokens,
        "completion_tokens": sums.completion_tokens,
        "computed_tokens": max(round(totals["computed_tokens"]), sums.completion_tokens),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sums.completion_tokens / max(seconds, 1e-9), 1),
        "replica_hours": round(totals["replica_seconds"] / 3600, 4),
        "gpu_hours": round(hours, 4),
    }
    if price is not None:
        found["cost"] = round(hours * price, 4)
    return found


def _clear(folder: JobFolder) -> None:
    """Remove a batch that its owner gives up; the parts first, so that what is left is never taken for answers."""
    for path in (*folder.parts().values(), folder.stats, folder.manifest):
        path.unlink(missing_ok=True)
    for path in folder.job.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != folder.lock:
            path.unlink()
    folder.make()
