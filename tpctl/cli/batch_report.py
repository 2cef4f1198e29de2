"""What ``tpctl batch`` tells of a run: how far it is, what it did, and what it left undone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tpctl.cli.console import note, stderr
from tpctl.errors import OutputError, counted

if TYPE_CHECKING:
    from tpctl.batch.coordinator import Progress as JobProgress
    from tpctl.batch.formats.choose import FormatSpec
    from tpctl.client.batch import Tally
    from tpctl.client.results import Results
    from tpctl.wire.report import EngineStats

REPORTS = 60.0
"""Seconds between lines about progress where stderr is no terminal."""


@contextmanager
def progress(total: int | None, tp_size: int, *, silent: bool) -> Iterator[Callable[[Tally], None]]:
    """Shows answered lines and tokens per second on stderr: a bar, or where that is no terminal a line at times."""
    if silent:
        yield lambda tally: None
        return
    if not sys.stderr.isatty():
        yield _reports(total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(f"tp {tp_size}", total=total, speed="")

        def show(tally: Tally) -> None:
            bar.update(task, completed=tally.lines, speed=_speed(tally))

        yield show


def _reports(total: int | None) -> Callable[[Tally], None]:
    """Notes how far a run is, every ``REPORTS`` seconds."""
    due = time.monotonic() + REPORTS

    def report(tally: Tally) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + REPORTS
        of = "" if total is None else f" of {total:,}"
        lines = "line" if (tally.lines if total is None else total) == 1 else "lines"
        note(f"{tally.lines:,}{of} {lines} after {tally.seconds:.0f} s, {_speed(tally)}")

    return report


def summary(tally: Tally, stats: EngineStats | None) -> str:
    """What a run did, in one line."""
    parts = [f"{counted(tally.lines, 'prompt')} in {tally.seconds:.1f} s"]
    if tally.resumed:
        parts.append(f"{tally.resumed:,} of them answered before")
    parts.append(f"{counted(tally.prompt_tokens, 'token')} in")
    parts.append(f"{tally.completion_tokens:,} out ({tally.tokens_per_second:,.1f} tok/s)")
    share = tally.cached_tokens / max(1, tally.prompt_tokens)
    parts.append(f"prefix cache {counted(tally.cached_tokens, 'token')} ({share:.0%})")
    if stats is not None:  # an interrupted engine is not asked
        parts.append(counted(stats.preemptions, "preemption"))
    if tally.cut:
        parts.append(f"{counted(tally.cut, 'answer')} cut by the end of the context")
    parts.append(counted(tally.errors, "error"))
    return ", ".join(parts)


def end_if_finished(spec: FormatSpec | None, target: Path, kept: Path) -> None:
    """What ``--resume`` comes to where ``target`` has content and nothing is kept of an interrupted run.

    Args:
        spec: ``None``: of lines that come one by one, which nothing can be compared with.
        kept: where an interrupted run's rows would be.

    Raises:
        typer.Exit: it is this batch's output, and finished: 1 if a row is an error, else 0.
        OutputError: it is something else, which is not replaced.
    """
    from tpctl.batch.finished import finished
    from tpctl.client.results import state_of

    if kept.exists() or state_of(target) is None:
        return
    whole = None if spec is None else finished(spec.formats(), target)
    if whole is not None:
        sums = f"{counted(whole.rows, 'row')}, {counted(whole.errors, 'error')}"
        note(f"{target} is finished: {sums}; nothing is left to do")
        raise typer.Exit(1 if whole.errors else 0)
    what = "lines that can be read once only" if spec is None else f"the lines of {spec.prompts}"
    raise OutputError(
        f"{target} exists already, and is no finished output of {what}; name another file with -o, or move it away: "
        "--force would delete what is in it"
    )


def left_behind(tally: Tally, results: Results) -> str:
    """What became of an interrupted run's rows."""
    if results.partial is None:
        return _without_row(tally.given_up)
    if not results.count:
        return "interrupted before any row was finished"
    return f"interrupted; finished rows are kept in {results.partial}, go on with --resume"


def _without_row(numbers: list[int]) -> str:
    """What an interrupted run whose rows went out one by one leaves unanswered."""
    if not numbers:
        return "interrupted; no line after these has a row"
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"interrupted; {'line' if len(numbers) == 1 else 'lines'} {shown}, and all that follow, have no row"


def _speed(tally: Tally) -> str:
    errors = f", {counted(tally.errors, 'error')}" if tally.errors else ""
    return f"{tally.tokens_per_second:,.0f} tok/s{errors}"


@contextmanager
def job_progress(replicas: int, tp_size: int) -> Iterator[Callable[[JobProgress], None]]:
    """As ``progress``, of a batch over several replicas."""
    if not sys.stderr.isatty():
        due = time.monotonic() + REPORTS

        def report(job: JobProgress) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + REPORTS
                of = f"{job.total:,}" if job.whole else f"about {job.total:,}"
                left = "" if job.left is None else f", {duration(job.left)} left"
                note(f"{job.rows:,} of {of} rows after {duration(job.seconds)}, {_job_speed(job)}{left}")

        yield report
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(f"{counted(replicas, 'replica')}, tp {tp_size}", total=None, speed="", left="")

        def show(job: JobProgress) -> None:
            left = "" if job.left is None else f"{duration(job.left)} left"
            bar.update(task, completed=job.rows, total=job.total, speed=_job_speed(job), left=left)

        yield show


def duration(seconds: float) -> str:
    """As people say it: 42 s, 3 min 05 s, 12 h 30 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def job_summary(stats: Mapping[str, Any], prompts: int | None) -> str:
    """What a batch over parts came to, over all its runs, in one line; ``prompts`` is ``None`` if it is not done."""
    parts = [f"{counted(stats['rows'], 'row')} in {stats['seconds']:.1f} s"]
    if prompts is not None and prompts != stats["rows"]:
        parts[0] += f" for {counted(prompts, 'prompt')}"
    parts.append(f"{counted(stats['prompt_tokens'], 'token')} in")
    parts.append(f"{stats['completion_tokens']:,} out ({stats['tokens_per_second']:,.1f} tok/s)")
    share = stats["cached_tokens"] / max(1, stats["prompt_tokens"])
    parts.append(f"prefix cache {counted(stats['cached_tokens'], 'token')} ({share:.0%})")
    if stats["cut"]:
        parts.append(f"{counted(stats['cut'], 'answer')} cut by the end of the context")
    if stats["gpu_hours"]:
        parts.append(f"{stats['gpu_hours']:.4g} GPU hours")
    if "cost" in stats:
        parts.append(f"cost {stats['cost']:,.2f}")
    parts.append(counted(stats["errors"], "error"))
    return ", ".join(parts)


def _job_speed(job: JobProgress) -> str:
    errors = f", {counted(job.errors, 'error')}" if job.errors else ""
    replicas = f"{job.alive} of {counted(job.wanted, 'replica')}"
    pending = f", {job.pending}" if job.pending else ""
    return f"{job.prompt_speed:,.0f} tok/s in, {job.speed:,.0f} out, {replicas}{pending}{errors}"
