"""``tpctl serve`` under many streams, on a GPU or a CPU, and vLLM's server under the same; each line as it is known.

    python benchmarks/serve_gpu.py --shape qwen3-0.6b [--streams 256 500] [--rounds 2] [--alone] [--json FILE]
    python benchmarks/serve_gpu.py --shape qwen3-0.6b --server vllm [--python VLLM/bin/python]

Weights are random (``made_model.py``); vLLM makes its own. The streams of a round begin at once, each is to have
``--output-tokens``. Of each round: streams that were lost, tokens a second, TTFT and ITL, the server process' own
processor time a token, and, from two looks at ``/metrics`` while all of them run, the time of a step and how much of it
the server computed for. Memory is told after each round. ``--alone`` takes the time of a step with no server, too. What
the server's engine does is in processes of its own, on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from made_model import made_model  # noqa: E402
from process_tree import descendants, kill_all  # noqa: E402
from serve_load import (  # noqa: E402
    Asked,
    Round,
    Sample,
    Watch,
    gpu_megabytes,
    lost,
    megabytes,
    rounds,
)

from tpctl.bench.latencies import Spread, summarise  # noqa: E402

NAMES = {
    "tpctl": {
        "running": "tpctl_requests_running",
        "steps": "tpctl_steps_total",
        "tokens": "tpctl_generated_tokens_total",
        "held": "tpctl_held_steps_total",
        "late": "tpctl_late_steps_total",
    },
    "vllm": {
        "running": "vllm:num_requests_running",
        "steps": "vllm:iteration_tokens_total_count",
        "tokens": "vllm:generation_tokens_total",
    },
}
START = 400.0
"""Seconds in which a server has to be ready."""


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--server", choices=sorted(NAMES), default="tpctl")
    parser.add_argument("--streams", type=int, nargs="+", default=[256, 500])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(8, max(1, len(os.sched_getaffinity(0)) // 2)))
    parser.add_argument("--every", type=float, default=0.25, help="seconds between two looks at the server")
    parser.add_argument("--alone", action="store_true", help="a step's time without a server, behind it")
    parser.add_argument("--python", default=sys.executable, help="vLLM's")
    parser.add_argument("--more", default="", help="further options of the server, in one word")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    folder, bare = made_model(args.shape, args.tp)
    say(f"{args.shape}: random weights after {time.perf_counter() - started:.1f} s")
    found: list[dict[str, Any]] = []
    with serving(args, folder, bare) as (pid, port):
        watch = Watch(pid, port, NAMES[args.server])
        say(f"  {memory(pid)}")
        for at, streams in enumerate(args.streams):
            asked = Asked(streams, args.prompt_tokens, args.output_tokens, args.rounds, 1_000_000 * at)
            for number, one in enumerate(rounds(asked, watch, port, args.processes, args.every)):
                row = {"server": args.server, "shape": args.shape, "streams": streams, "round": number + 1}
                found.append({**row, **tell(asked, one, number), "memory": memory(pid)})
                say(f"  {memory(pid)}")
                if args.json is not None:
                    args.json.write_text(json.dumps(found, indent=1))
    if args.alone and args.server == "tpctl":
        alone(args, folder)


def tell(asked: Asked, one: Round, number: int) -> dict[str, Any]:
    """Print a round; what was said, as JSON has it."""
    answers = list(one.load.answers)
    summary = summarise(one.load, float("inf"), {}) if any(answer.error is None for answer in answers) else None
    say(f"{asked.streams} streams, round {number + 1}: {lost(answers, asked.output)} lost")
    for error in sorted({answer.error for answer in answers if answer.error is not None}):
        say(f"  failed: {error}")
    if summary is None:
        return {"lost": len(answers)}
    tokens = max(summary.output_tokens, 1)
    own, system = (1e6 * seconds / tokens for seconds in one.processor)
    say(
        f"  {summary.output_tokens} tokens in {summary.duration:.2f} s, {summary.output_per_second:,.0f} a second; "
        f"{summary.chunks} chunks; busiest client {one.busiest:.0%} of a core"
    )
    for name, spread in (("TTFT", summary.ttft), ("ITL", summary.itl), ("TPOT", summary.tpot)):
        if spread is not None:
            say(f"  {name} {shown(spread)}")
    say(f"  server {own + system:.1f} µs a token ({own:.1f} its own, {system:.1f} the system's), prompts included")
    told = {"lost": lost(answers, asked.output), **summary.to_dict(), "own_us": own, "system_us": system}
    return {**told, **steady(asked, one.samples)}


def steady(asked: Asked, samples: list[Sample]) -> dict[str, Any]:
    """Of the time between the first and the last look that saw all streams at work."""
    full = [sample for sample in samples if sample.running == asked.streams]
    if len(full) < 2 or full[-1].steps == full[0].steps:
        say(f"  all {asked.streams} were not seen at work twice ({len(samples)} looks): no time of a step")
        return {}
    first, last = full[0], full[-1]
    seconds, steps = last.at - first.at, last.steps - first.steps
    processor, tokens = last.processor - first.processor, last.tokens - first.tokens
    found = {"step_ms": 1e3 * seconds / steps, "server_ms": 1e3 * processor / steps, "share": processor / seconds}
    found |= {"held": (last.held - first.held) / steps, "late": (last.late - first.late) / steps}
    say(
        f"  all at work for {seconds:.2f} s, {steps:.0f} steps of {found['step_ms']:.2f} ms; of each the server "
        f"computes {found['server_ms']:.2f} ms, {found['share']:.0%}; {1e6 * processor / max(tokens, 1):.1f} µs a token"
    )
    if last.held > first.held:
        say(f"  launched when due: {found['held']:.0%} of the steps, {found['late']:.1%} too late")
    return found


def shown(spread: Spread) -> str:
    return (
        f"p50 {spread.p50:.2f} ms, p90 {spread.p90:.2f}, p99 {spread.p99:.2f}, most {spread.max:.1f} "
        f"(mean {spread.mean:.2f})"
    )


def memory(pid: int) -> str:
    """Of a server, of the processes below it, and of the GPU."""
    below = sum(megabytes(one) for one in descendants(pid) if Path(f"/proc/{one}/statm").exists())
    return f"memory: server {megabytes(pid):.1f} MB, workers {below:,.0f} MB, GPU {gpu_megabytes():,.0f} MB"


@contextmanager
def serving(args: argparse.Namespace, folder: Path, bare: Path) -> Iterator[tuple[int, int]]:
    """A server's process and port."""
    port = free_port()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if args.server == "tpctl":
        command = [sys.executable, "-m", "tpctl", "serve", str(folder), "--port", str(port), "--tp", str(args.tp)]
        ready = printed
    else:
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
        command = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bare)]
        command += ["--load-format", "dummy", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--tensor-parallel-size", str(args.tp), "--disable-uvicorn-access-log"]
        ready = healthy
    command += args.more.split()
    say(f"$ {' '.join(command)}")
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            while not ready(port, Path(log.name)):
                if server.poll() is not None or time.perf_counter() - started > START:
                    raise SystemExit(f"the server did not start:\n{Path(log.name).read_text()[-4000:]}")
                time.sleep(0.05)
            say(f"{args.server}: ready after {time.perf_counter() - started:.1f} s")
            yield server.pid, port
        except Exception:
            say(Path(log.name).read_text()[-4000:])
            raise
        finally:
            end(server)


def end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        kill_all(server.pid)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def printed(port: int, log: Path) -> bool:
    return re.search(r"Uvicorn running on", log.read_text(errors="replace")) is not None


def healthy(port: int, log: Path) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def alone(args: argparse.Namespace, folder: Path) -> None:
    """The same engine's steps, with nobody to tell."""
    command = [sys.executable, "-m", "tpctl", "bench", "latency", str(folder), "--runs", "2"]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens)]
    command += ["--sequences", ",".join(map(str, args.streams)), "--tp", str(args.tp)]
    say(f"$ {' '.join(command)}")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
    main()
