"""What a server costs a token: all of ``tpctl serve`` over an engine that costs nothing.

    python benchmarks/serve_cost.py [MODEL] [--streams 256] [--tokens 200] [--step-ms 20] [--runs 3] [--interval 1]
        [--whole]

The engine is a process that gives each stream a token a step (``serve_worker.py``), the clients are this process, which
drops what comes. What is told is the processor time of the server's own process, all its threads, over the tokens: of
the engine's message, the text, the chunk and the write to its socket; and the memory it holds then. ``--interval``:
tokens in a chunk (``tpctl serve --stream-interval``). ``--whole`` asks for answers that do not stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from serve_load import megabytes, processor_seconds  # noqa: E402

from tpctl.checkpoint.sources import resolve  # noqa: E402
from tpctl.client.tokenizer import Tokenizer  # noqa: E402

TEXT = "The sky is blue because molecules of the air scatter short waves of light more than long ones.\n"


async def stream(port: int, body: dict[str, object]) -> int:
    """Send a request, and count the bytes that come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    raw = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(raw) + raw)
    count = 0
    while piece := await reader.read(1 << 20):
        count += len(piece)
    writer.close()
    return count


def requests_open(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(r"^tpctl_requests_open (\S+)$", answer.read().decode(), re.M)
    return float(found[1]) if found else 0.0


async def measure(pid: int, port: int, streams: int, body: dict[str, object]) -> tuple[float, float, float, int]:
    """Processor seconds of its own and the system's, seconds, and bytes of all streams."""
    tasks = [asyncio.create_task(stream(port, body)) for _ in range(streams)]
    while await asyncio.to_thread(requests_open, port) < streams:  # a second behind the last the engine begins
        await asyncio.sleep(0.02)
    before, started = processor_seconds(pid), time.perf_counter()
    sizes = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    after = processor_seconds(pid)
    return after[0] - before[0], after[1] - before[1], seconds, sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    ids = Tokenizer(resolve(args.model).folder).encode(TEXT)
    ids = (ids * (args.tokens // len(ids) + 1))[: args.tokens]
    plan = {"streams": args.streams, "step": args.step_ms / 1000, "ids": ids}
    env = {
        **os.environ,
        "TPCTL_WORKER": "benchmarks.serve_worker",
        "SERVE_COST": json.dumps(plan),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tpctl", "serve", args.model, "--port", "0", "--device", "cpu"]
    command += ["--stream-interval", str(args.interval)]
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"Uvicorn running on http://127.0.0.1:(\d+)", line):
                break
        else:
            raise SystemExit("the server did not start")
        body = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": not args.whole}
        for run in range(args.runs):
            own, system, seconds, size = asyncio.run(measure(server.pid, int(found[1]), args.streams, body))
            tokens = args.streams * args.tokens
            own, system = 1e6 * own / tokens, 1e6 * system / tokens
            print(
                f"{run + 1}: {args.streams} streams of {args.tokens} tokens in {seconds:.1f} s, {size / tokens:.0f} "
                f"bytes a token; server {own + system:.1f} µs a token ({own:.1f} its own, {system:.1f} the system's), "
                f"{megabytes(server.pid):.1f} MB"
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
