"""Speed on a CPU that other processes use as well: beside 0, 1, 2 … spinning processes, at each TP size.

    python benchmarks/busy_cpu.py [--model demo] [--tp 1 2] [--busy 0 1 2] [--runs 3] [--settings VARIABLE=VALUE …]

Each row is an environment for the workers: tpctl's defaults, and what ``--settings`` names (OMP_WAIT_POLICY=passive
unless told otherwise). In every round the rows take turns, each with workers started anew, so that a machine that is
busier for a while slows all of them alike. Measured are decode (one sequence, --tokens tokens), prefill (a prompt of
1,000 tokens) and the time to an answer (from starting the workers to the last of 32 tokens). Prints a Markdown table of
medians, with the least and the greatest.

``--settings GOMP_SPINCOUNT=300000`` gives what GCC's OpenMP runtime does by itself; allow minutes for each of its runs
on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processes import spinning
from tpctl.arch.config import ModelConfig
from tpctl.bench.measure import machine
from tpctl.bench.workload import one_request
from tpctl.checkpoint.sources import resolve
from tpctl.client.engine_client import EngineClient
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.settings import EngineConfig

PROMPT, ANSWER, LONG_PROMPT = 64, 32, 1000  # tokens


def seconds(client: EngineClient, request: Request) -> float:
    started = time.perf_counter()
    client.submit([request])
    while not any(output.finish_reason for output in client.outputs()):
        pass
    return time.perf_counter() - started


def measure(folder: Path, tp_size: int, env: dict[str, str], vocab: int, shift: int, tokens: int) -> list[float]:
    """Decode tok/s, prefill seconds, seconds to an answer."""
    started = time.perf_counter()
    with EngineClient(EngineConfig(folder, tp_size, device="cpu"), env=env) as client:
        client.wait_ready()
        seconds(client, one_request(PROMPT, ANSWER, shift, vocab))
        answer = time.perf_counter() - started
        one = seconds(client, one_request(PROMPT, 1, shift + 1, vocab))
        decode = tokens / (seconds(client, one_request(PROMPT, tokens + 1, shift + 2, vocab)) - one)
        prefill = seconds(client, one_request(LONG_PROMPT, 1, shift + 3, vocab))
    return [decode, prefill, answer]


def told(values: list[float], digits: int) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--settings", nargs="*", default=["OMP_WAIT_POLICY=passive"], metavar="VARIABLE=VALUE")
    args = parser.parse_args()

    source = resolve(args.model)
    vocab = ModelConfig.load(source.folder).vocab_size
    rows: dict[str, dict[str, str]] = {"defaults": {}}
    for setting in args.settings:
        name, _, value = setting.partition("=")
        rows[setting] = {name: value}
    found: dict[tuple[int, int, str], list[list[float]]] = {}
    load_before = os.getloadavg()[0]
    for run in range(args.runs):
        for tp_size in args.tp:
            folder = ensure_sharded(source, tp_size)
            for count in args.busy:
                for row, env in rows.items():
                    with spinning(count):
                        values = measure(folder, tp_size, env, vocab, 10 * run, args.tokens)
                    found.setdefault((tp_size, count, row), []).append(values)
                    print(f"tp {tp_size}, {count} busy, {row}: {values}", file=sys.stderr, flush=True)

    about = machine()
    print(
        f"{about['cpu']}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}, commit "
        f"{about['commit']}, {about['date']}; load average {load_before:.1f} before, medians of {args.runs}\n"
    )
    print("| tp | busy processes | workers' environment | decode, tok/s | prefill of 1,000, s | to an answer, s |")
    print("|---|---|---|---|---|---|")
    for (tp_size, count, row), runs in sorted(found.items()):
        decode, prefill, answer = (list(values) for values in zip(*runs, strict=True))
        print(f"| {tp_size} | {count} | {row} | {told(decode, 1)} | {told(prefill, 2)} | {told(answer, 1)} |")


if __name__ == "__main__":
    main()
