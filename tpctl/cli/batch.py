"""``tpctl batch``: answer every line of a JSONL file."""

from __future__ import annotations

import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from tpctl.checkpoint.outputs import resolved
from tpctl.cli.console import note, status, stderr
from tpctl.cli.engine import describe, interrupts, prepare, say_context, say_policy
from tpctl.cli.options import (
    MODEL_HELP,
    POLICY,
    EngineOptions,
    SamplingOptions,
    SchedulingPolicy,
    TemplateOptions,
    grouped,
)
from tpctl.cli.places import is_pipe, refuse_own_input
from tpctl.cli.streams import NamedFile, is_closed_pipe, stdin_bytes
from tpctl.cli.template import TemplateAtHand, look_ahead
from tpctl.errors import EngineError, OutputError, SourceError, UsageError

if TYPE_CHECKING:
    from tpctl.client.batch import Tally
    from tpctl.client.results import Results

REPORTS = 60.0
"""Seconds between lines about progress where stderr is no terminal."""

TOGETHER = 32
"""Lines of a file that are read at once, so that their conversations are rendered at the cost of one."""

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256, "seed": 0}


@grouped
def batch(
    prompts: Annotated[str, typer.Argument(help="JSONL file; - for stdin.")],
    output: Annotated[str, typer.Option("-o", "--output", help="JSONL file; - for stdout.")] = "-",
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    scheduling_policy: Annotated[SchedulingPolicy | None, POLICY] = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    template: TemplateOptions,
) -> None:
    """Answer every line of a JSONL file: {"id"?, "prompt"} or {"id"?, "messages"}, with sampling fields.

    Messages may hold whatever the model's chat template reads; "chat_template_kwargs" of a line adds to the option.

    One row a line comes out, in the order of the input: {"id", "text", "finish_reason", "prompt_tokens",
    "completion_tokens"}, or {"id", "error"} for a line that cannot be run; a "note" says where the context, and not
    "max_tokens", ended an answer. A field that is null is not given. An id left out is the line number, which
    counts empty lines too; those get no row.

    By default answers are greedy (temperature 0) and at most 256 tokens long; line n without a seed gets
    --seed + n - 1. Until all rows are there they are kept in OUTPUT.partial; --resume goes on with that, and with
    --force as well may then replace an OUTPUT. The exit code is 1 if any row is an error, 130 after Ctrl-C.

    The scheduling policy is makespan if prompts and answers are files. Elsewhere somebody may wait for the first
    rows, so it is fcfs.
    """
    from tpctl.client.batch import Batch
    from tpctl.client.engine_client import EngineClient
    from tpctl.client.jobs import JobParser, bounded_lines, read_lines
    from tpctl.client.results import Results

    sampling.check(DEFAULTS)
    shown = "standard input" if prompts == "-" else prompts
    values = {**DEFAULTS, **sampling.given()}
    stop = sampling.stop or []
    target, silent = _target(output), _is_silent(output)
    if resume and target is None:
        raise UsageError("--resume needs a file to go on with; name it with -o")
    refuse_own_input(prompts, output)
    if target is not None:
        _check_target(target, prompts, resume=resume, force=force)
    at_hand = TemplateAtHand(template)
    settings = {"model": model, "dtype": str(engine.dtype), "sampling": values, "stop": stop}
    settings["template"] = at_hand.settings
    with (
        _opened(prompts, count=not silent) as (stream, total),
        Results(target, settings, resume=resume, force=force) as results,
        _stream(output, target) as out,
    ):
        _check_kept(prompts, stream, results)
        policy = scheduling_policy or _policy(prompts, target)
        needed = _mentions(stream, b'"messages"') and not _mentions(stream, b'"chat_template_kwargs"')
        config = prepare(model, engine, policy, lambda source: look_ahead(at_hand, source, needed=needed))
        with _remains(results), EngineClient(config) as client:
            tokenizer = at_hand.tokenizer(config.text_dir)
            with status(f"loading {model}"):
                info = client.wait_ready()
            if not silent:
                note(f"{model} is ready ({describe(info)})")
            say_policy(scheduling_policy, info)
            say_context(info)
            parser = JobParser(tokenizer, sampling=values, stop=stop, max_model_len=info["max_model_len"])
            run = Batch(client, tokenizer, results, window=4 * config.max_num_seqs)
            with (
                _progress(total, config.tp_size, silent=silent) as show,
                interrupts() as noted,
            ):

                def step(tally: Tally) -> None:
                    show(tally)
                    if out is not None:
                        with _writing():
                            results.emit(out)

                together = TOGETHER if _is_file(stream) else 1
                lines = read_lines(bounded_lines(stream, shown))
                tally = run.run(lines, parser, together=together, step=step, should_stop=lambda: noted)
            stats = {} if tally.interrupted else client.stats()
        with _remains(results):
            if out is not None:
                with _writing():
                    results.emit(out, gaps=True)
            elif not tally.interrupted:
                results.publish(tally.lines)
        note(_summary(tally, stats))
        if tally.interrupted:
            if results.partial is not None and not results.count:
                note("interrupted before any row was finished")
            elif results.partial is not None:
                note(f"interrupted; finished rows are kept in {results.partial}, go on with --resume")
            else:
                note(_without_row(tally.given_up))
            raise typer.Exit(130)
    if tally.errors:
        raise typer.Exit(1)


@contextmanager
def _opened(prompts: str, *, count: bool) -> Iterator[tuple[IO[bytes], int | None]]:
    """The input, and how many lines with text it has, if that is asked for and can be counted."""
    if prompts == "-":
        with stdin_bytes() as stream:
            yield stream, None
        return
    if is_pipe(prompts):
        note(f"waiting for somebody to write to {prompts}")
    try:
        stream = Path(prompts).open("rb")  # noqa: SIM115 — closed below
    except OSError as error:
        raise SourceError(f"cannot read {prompts}: {error.strerror}") from None
    with stream:
        total = None
        if count and _is_file(stream):
            from tpctl.client.jobs import bounded_lines

            total = sum(1 for line in bounded_lines(stream, prompts) if line.strip())
            stream.seek(0)
        yield stream, total


def _is_file(stream: IO[bytes]) -> bool:
    return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)


def _mentions(stream: IO[bytes], word: bytes) -> bool:
    """Whether a line of a file holds ``word``; a pipe cannot be asked."""
    if not _is_file(stream):
        return False
    place = stream.tell()
    found = any(word in line for line in stream)
    stream.seek(place)
    return found


def _target(output: str) -> Path | None:
    """The file that rows are collected for; ``None`` where they go out one by one: to stdout, a pipe or a device."""
    if output == "-":
        return None
    path = Path(output)
    if not path.name:
        raise OutputError(f"{output} is a folder; name a file to write to")
    if path.exists() and not path.is_file() and not path.is_dir():
        return None
    return resolved(path) if path.is_symlink() else path  # the link stays, what it names is replaced


def _policy(prompts: str, target: Path | None) -> SchedulingPolicy:
    return SchedulingPolicy.makespan if target is not None and Path(prompts).is_file() else SchedulingPolicy.fcfs


def _check_target(target: Path, prompts: str, *, resume: bool, force: bool) -> None:
    """Refuse to replace answers that nobody gave up."""
    from tpctl.client.results import partial_of

    if not target.is_file():
        return
    going_on = resume and partial_of(target).exists()
    if target.stat().st_size and not force and not going_on:
        raise OutputError(f"{target} exists already; use --force to replace it, or name another file with -o")


@contextmanager
def _stream(output: str, target: Path | None) -> Iterator[IO[bytes] | None]:
    """Where rows go at once, if they do."""
    if target is not None:
        yield None
    elif output == "-":
        yield sys.stdout.buffer
    else:
        if is_pipe(output):
            note(f"waiting for somebody to read {output}")
        try:
            file = NamedFile(output, "wb", output)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}") from None
        stream = io.BufferedWriter(file)
        try:
            yield stream
        except BaseException:
            with suppress(OSError):  # what could not be written was said when it was tried
                stream.close()
            raise
        with _writing():
            stream.close()


def _check_kept(prompts: str, stream: IO[bytes], results: Results) -> None:
    """Before a run goes on: whether the rows it finds answer the lines it is given; a pipe cannot be asked."""
    from tpctl.client.jobs import bounded_lines, read_lines

    kept = results.count
    if not kept or not stream.seekable():
        return
    matching = sum(results.has(line) for line in read_lines(bounded_lines(stream, prompts)))
    stream.seek(0)
    if not matching:
        raise UsageError(
            f"none of the {_count(kept, 'row')} in {results.partial} answers a line of {prompts}; "
            "give the input that they were made from, or delete the file"
        )
    if matching < kept:
        note(
            f"{kept - matching} of the {_count(kept, 'row')} in {results.partial} answer no line of {prompts} any more"
        )


def _is_silent(output: str) -> bool:
    """Whether nothing is said of progress: the answers appear on the terminal themselves."""
    return output == "-" and sys.stdout.isatty()


@contextmanager
def _progress(total: int | None, tp_size: int, *, silent: bool) -> Iterator[Callable[[Tally], None]]:
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


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _speed(tally: Tally) -> str:
    errors = f", {_count(tally.errors, 'error')}" if tally.errors else ""
    return f"{tally.tokens_per_second:,.0f} tok/s{errors}"


def _summary(tally: Tally, stats: dict[str, float]) -> str:
    """What a run did, in one line."""
    parts = [f"{_count(tally.lines, 'prompt')} in {tally.seconds:.1f} s"]
    if tally.resumed:
        parts.append(f"{tally.resumed:,} of them answered before")
    parts.append(f"{_count(tally.prompt_tokens, 'token')} in")
    parts.append(f"{tally.completion_tokens:,} out ({tally.tokens_per_second:,.1f} tok/s)")
    share = tally.cached_tokens / max(1, tally.prompt_tokens)
    parts.append(f"prefix cache {_count(tally.cached_tokens, 'token')} ({share:.0%})")
    if "preemptions" in stats:  # an interrupted engine is not asked
        parts.append(_count(int(stats["preemptions"]), "preemption"))
    if tally.cut:
        parts.append(f"{_count(tally.cut, 'answer')} cut by the end of the context")
    parts.append(_count(tally.errors, "error"))
    return ", ".join(parts)


def _without_row(numbers: list[int]) -> str:
    """What an interrupted run whose rows went out one by one leaves unanswered."""
    if not numbers:
        return "interrupted; no line after these has a row"
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"interrupted; {'line' if len(numbers) == 1 else 'lines'} {shown}, and all that follow, have no row"


@contextmanager
def _remains(results: Results) -> Iterator[None]:
    """Adds to an error what became of the rows that were finished before it."""
    try:
        yield
    except (EngineError, OutputError, SourceError, KeyboardInterrupt, SystemExit) as error:
        if results.partial is None or not results.count:
            raise
        rows = "1 finished row is" if results.count == 1 else f"{results.count} finished rows are"
        kept = f"{rows} in {results.partial}, go on with --resume"
        if isinstance(error, SystemExit):  # a signal: there is its exit code, and no message
            note(f"tpctl: stopped; {kept}")
            raise
        if isinstance(error, KeyboardInterrupt):  # the second one
            raise KeyboardInterrupt(kept) from None
        raise type(error)(f"{error}; {kept}") from None


@contextmanager
def _writing() -> Iterator[None]:
    """Says of rows that cannot go out one by one how none would be lost."""
    try:
        yield
    except OSError as error:
        if is_closed_pipe(error) or error.filename is None:
            raise
        if error.filename == "standard output":
            instead = "with -o FILE finished rows are kept for --resume"
        else:
            instead = "name a file on a disk with -o, beside which finished rows are kept for --resume"
        raise OutputError(f"cannot write to {error.filename}: {error.strerror}; {instead}") from None
