"""What ``tpctl bench`` measures, all through the same client and workers that chat and batch use."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpctl.bench.workload import Workload, make_workload, one_request
from tpctl.client.engine_client import EngineClient
from tpctl.errors import EngineError
from tpctl.wire.messages import Request
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig


@dataclass(frozen=True)
class Figure:
    """A measured quantity: every value in the order taken. Quote the median, show the spread."""

    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


@dataclass(frozen=True)
class Measured:
    """The figures of a benchmark, how the engine ran, and its counters at the end where they tell something."""

    figures: dict[str, Figure]
    engine: EngineInfo
    stats: EngineStats | None = None


@dataclass(frozen=True)
class Report:
    """One benchmark: what was measured, on what, with what."""

    benchmark: str
    model: str
    figures: dict[str, Figure]
    engine: EngineInfo
    machine: dict[str, Any]
    settings: dict[str, Any]
    stats: EngineStats | None = None

    def to_dict(self) -> dict[str, Any]:
        figures = {
            name: {"unit": f.unit, "median": f.median, "min": f.spread[0], "max": f.spread[1], "values": f.values}
            for name, f in self.figures.items()
        }
        stats = {} if self.stats is None else {"stats": asdict(self.stats)}
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "figures": figures,
            "engine": {**asdict(self.engine), **stats},
            "machine": self.machine,
            "settings": self.settings,
        }


Say = Callable[[str], None]
"""Takes a line on each value as it is measured, so that a benchmark that is cut off has shown what it had."""


def _silent(line: str) -> None:
    """Nobody listens."""


def throughput(
    config: EngineConfig,
    workload: str,
    vocab_size: int,
    runs: int,
    sampling: Mapping[str, Any] | None = None,
    say: Say = _silent,
) -> Measured:
    """Generated tokens a second, from handing in all requests to the last token, after one run to warm up, which is
    "first run": what a single batch gets.

    sampling: fields of ``SamplingParams`` in place of the workload's own.

    Raises:
        EngineError: a prompt and its answer do not fit the context.
    """
    rates, times = [], []
    with EngineClient(config) as client:
        info = client.wait_ready()
        for run in range(runs + 1):
            work = make_workload(workload, vocab_size, run * 13, sampling)
            _check_context(work, info)
            started = time.perf_counter()
            drain(client, work.requests)
            times.append(time.perf_counter() - started)
            rates.append(work.output_tokens / times[-1])
            say(f"{f'run {run} of {runs}' if run else 'first run'}: {rates[-1]:,.0f} tok/s")
        stats = client.stats()
    figures = {
        "throughput": Figure("tok/s", rates[1:]),
        "duration": Figure("s", times[1:]),
        "first run": Figure("tok/s", rates[:1]),
    }
    return Measured(figures, info, stats)


def latency(
    config: EngineConfig,
    prompt_tokens: int,
    output_tokens: int,
    vocab_size: int,
    runs: int,
    sampling: Mapping[str, Any] | None = None,
    sequences: Sequence[int] = (1,),
    say: Say = _silent,
) -> Measured:
    """Time to first token, and time per token after it, of requests handed in at once: one, or as many as
    ``sequences`` says, each number by itself.

    Of one request TPOT is (time of ``output_tokens`` + 1 tokens - time of one token) / ``output_tokens``; of N the same
    quotient is the time of a step that generates N tokens ("step N").

    Raises:
        EngineError: so many tokens do not fit the context, or so many sequences the engine.
    """
    figures: dict[str, Figure] = {}
    numbers = itertools.count()

    def requests(count: int, tokens: int) -> list[Request]:
        return [one_request(prompt_tokens, tokens, next(numbers), vocab_size, sampling) for _ in range(count)]

    with EngineClient(config) as client:
        info = client.wait_ready()
        if prompt_tokens + output_tokens + 1 > info.max_model_len:
            raise EngineError(
                f"{prompt_tokens} prompt tokens and {output_tokens + 1} to generate are more than the "
                f"{info.max_model_len} of --max-model-len; ask for fewer, or raise it"
            )
        if (most := max(sequences)) > config.max_num_seqs:
            raise EngineError(
                f"{most} sequences are more than the {config.max_num_seqs} of --max-num-seqs; ask for fewer, or raise "
                "it"
            )
        for count in sequences:
            first, per_token = [], []
            for run in range(runs + 1):
                one = timed(client, requests(count, 1))
                many = timed(client, requests(count, output_tokens + 1))
                if run:
                    first.append(one * 1e3)
                    per_token.append((many - one) / output_tokens * 1e3)
            names = ("ttft", "tpot") if count == 1 else (f"ttft {count}", f"step {count}")
            for name, values in zip(names, (first, per_token), strict=True):
                figures[name] = Figure("ms", values)
                say(f"{name}: {figures[name].median:.2f} ms")
    return Measured(figures, info)


def startup(config: EngineConfig, prompt_tokens: int, vocab_size: int, runs: int, say: Say = _silent) -> Measured:
    """From starting the workers to the first token of a prompt; each run starts them anew.

    ``before`` is what passed before the first of them: from the start of this process, through its imports, to a model
    that is found, sharded and verified.
    """
    before = _process_age()
    seconds = []
    for run in range(runs):
        started = time.perf_counter()
        with EngineClient(config) as client:
            info = client.wait_ready()
            drain(client, [one_request(prompt_tokens, 1, run, vocab_size)])
            seconds.append(time.perf_counter() - started)
            say(f"start {run + 1} of {runs}: {seconds[-1]:.2f} s")
    figures = {"startup": Figure("s", seconds)}
    return Measured(figures if before is None else {**figures, "before": Figure("s", [before])}, info)


def machine() -> dict[str, Any]:
    """What the figures were taken on: processor, GPUs and their driver, versions (torch's names CUDA's), date; and
    tpctl's commit, where it runs from a clone."""
    versions: dict[str, str | None] = {}
    for package in ("tpctl", "torch", "triton", "transformers", "flash-attn", "flash-attn-3"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "gpus": _ask_gpus("name"),
        "driver": next(iter(_ask_gpus("driver_version")), None),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _check_context(work: Workload, info: EngineInfo) -> None:
    """Raise ``EngineError`` if the longest of ``work`` is longer than the engine takes."""
    longest = max(work.requests, key=lambda one: len(one.token_ids) + one.sampling.max_tokens)
    prompt, answer = len(longest.token_ids), longest.sampling.max_tokens
    if prompt + answer <= info.max_model_len:
        return
    cut = "--kv-cache-memory" if info.max_model_len < info.wanted_model_len else "--max-model-len"
    raise EngineError(
        f"the workload {work.name} has {prompt:,} prompt tokens and {answer:,} to generate, {prompt + answer:,} "
        f"together, but this engine takes {info.max_model_len:,}; raise {cut} if that is the limit, or take another "
        "--workload"
    )


def drain(client: EngineClient, requests: list[Request]) -> None:
    """Hand in ``requests`` and wait for all of their tokens.

    Raises:
        EngineError: a request failed, or the context cut an answer short: the time would be of fewer tokens.
    """
    client.submit(requests)
    left, produced = len(requests), 0
    while left:
        for output in client.outputs():
            produced += len(output.token_ids)
            if output.finish_reason == "error":
                raise EngineError(f"request {output.id} failed: {output.message}")
            left -= output.finish_reason is not None
    wanted = sum(request.sampling.max_tokens for request in requests)
    if produced != wanted:
        raise EngineError(f"the engine produced {produced} tokens instead of {wanted}")


def timed(client: EngineClient, requests: list[Request]) -> float:
    """Seconds until all of their tokens are there; errors as of ``drain``."""
    started = time.perf_counter()
    drain(client, requests)
    return time.perf_counter() - started


def _process_age() -> float | None:
    """Seconds since this process began: /proc/self/stat's 22nd field, in clock ticks after the machine's start.
    ``None`` where there is no such file."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _commit() -> str | None:
    """The commit of the clone that this code lies in, marked where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    described = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    return next(iter(_lines(described)), None)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ask_gpus(field: str) -> list[str]:
    """One answer of nvidia-smi's a GPU; none where there is none."""
    return _lines(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])


def _lines(command: list[str]) -> list[str]:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines() if found.returncode == 0 else []
