"""What ``tpctl bench serve`` says at a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from tpctl.cli.console import note, say, stdout
from tpctl.cli.plot import columns
from tpctl.errors import counted

if TYPE_CHECKING:
    from tpctl.bench.answers import Answer
    from tpctl.bench.latencies import Spread, Summary
    from tpctl.bench.serving import Measured

BUSY = 0.7
"""Share of the time from which a client that computes is what limits the figures."""

LATE = 0.1
"""Seconds from which it is told that requests were sent after they were due."""


def warmed(answers: Sequence[Answer], seconds: float) -> None:
    """Say what was sent before anything was measured."""
    prompts, tokens = sum(one.prompt_tokens or 0 for one in answers), sum(one.tokens for one in answers)
    note(
        f"warmed up: {counted(len(answers), 'request')} in {seconds:.2f} s, prompts of {counted(prompts, 'token')} and "
        f"answers of {tokens:,}, which no figure counts"
    )


def print_runs(found: Sequence[Measured], url: str) -> None:
    """A table and a plot: of one rate in detail, of several beside each other."""
    first = found[0]
    say(f"{first.model} at {url}")
    for one in found:
        _say_run(one.summary)
    say()
    if len(found) == 1:
        _one_rate(first.summary)
    else:
        _many_rates([one.summary for one in found])


def _say_run(run: Summary) -> None:
    """What a run was, and what of it is not as it should be."""
    rate = "all at once" if math.isinf(run.rate) else f"{run.rate:g} a second"
    prompts, answers = (f"{total / run.completed:,.1f}" for total in (run.prompt_tokens, run.output_tokens))
    say(
        f"{rate}: {counted(run.completed, 'answer')} in {run.duration:.2f} s, {run.failed} failed; {run.peak} at once; "
        f"prompts of {prompts} tokens, answers of {answers}"
    )
    for error, count in run.errors.items():
        say(f"  failed {counted(count, 'time')}: {error}")
    if run.uncounted:
        say(f"  {counted(run.uncounted, 'answer')} came without usage: their chunks are taken for tokens")
    elif run.output_tokens > 1.01 * run.chunks:
        say(f"  {run.output_tokens / run.chunks:.2f} tokens came in a chunk: ITL is the time between chunks")
    if run.late > LATE and not math.isinf(run.rate):
        why = "so few may be under way, or it is busy here"
        say(f"  requests were sent up to {run.late:.2f} s after they were due: {why}")
    if (busy := run.processor / run.duration) > BUSY:
        say(f"  this client computed for {busy:.0%} of the time: it may be what limits the figures")


def _one_rate(run: Summary) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("ms")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name in ("ttft", "tpot", "itl", "e2e"):
        if (spread := getattr(run, name)) is not None:
            table.add_row(name.upper(), *(f"{value:,.2f}" for value in asdict(spread).values()))
    stdout().print(table)
    say()
    good = "" if run.goodput is None else f" ({run.goodput:,.2f} within --slo)"
    tokens = f"{run.output_per_second:,.1f} tokens of answers, {run.tokens_per_second:,.1f} with prompts"
    say(f"a second: {run.requests_per_second:,.2f} requests{good}, {tokens}")
    ends = ("0", f"{run.duration:.4g} s")
    for title, which in (("tokens of answers a second", 0), ("requests under way", 1)):
        say()
        for line in columns(title, [slice_[which] for slice_ in run.slices], ends):
            say(line)


def _many_rates(runs: Sequence[Summary]) -> None:
    good = any(run.good is not None for run in runs)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    heads = ["rate", "req/s", *(["good/s"] if good else []), "tok/s", "at once"]
    heads += [f"{name}\n{share}" for name in ("TTFT", "TPOT", "ITL", "E2E") for share in ("p50", "p99")]
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        cells = [f"{run.rate:g}", _short(run.requests_per_second)]
        cells += [] if run.goodput is None else [_short(run.goodput)]
        cells += [_short(run.output_per_second), str(run.peak)]
        for spread in (run.ttft, run.tpot, run.itl, run.e2e):
            cells += _pair(spread)
        table.add_row(*cells)
    stdout().print(table)
    within = ", good/s: within --slo" if good else ""
    say(f"req/s: answered{within}; tok/s: tokens of answers; the others in ms")
    rates = [f"{run.rate:g}" for run in runs]
    second = [0.0 if run.ttft is None else run.ttft.p99 for run in runs]
    for title, values in (
        ("tokens of answers a second, by rate", [run.output_per_second for run in runs]),
        ("TTFT p99 in ms, by rate", second),
    ):
        say()
        for line in columns(title, values, rates):
            say(line)


def _pair(spread: Spread | None) -> list[str]:
    return ["", ""] if spread is None else [_short(spread.p50), _short(spread.p99)]


def _short(value: float) -> str:
    """In three digits, or as many as stand before the point."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
