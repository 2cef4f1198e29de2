"""What ``tpctl bench serve`` itself costs a token, against a server that costs next to nothing (``sse_source.py``).

    python benchmarks/sse_cost.py [--streams 256] [--tokens 400] [--step-ms 20,10,0] [--runs 3]

Each stream has a token a step, each in a write of its own; with steps of 0 ms as fast as the client takes them. What is
told is the client's processor time a token, and tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tpctl.bench.endpoint import Address  # noqa: E402
from tpctl.bench.prompts import Shape, random_prompts  # noqa: E402
from tpctl.bench.serving import Measured, Settings, measure  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", default="20,10,0")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    for step in args.step_ms.split(","):
        command = [sys.executable, str(ROOT / "benchmarks" / "sse_source.py"), str(args.streams), step]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as source:
            assert source.stdout is not None
            address = Address.of(f"http://127.0.0.1:{int(source.stdout.readline())}")
            settings = Settings(address, None, None, "completions", rates=[float("inf")] * args.runs)
            shape = Shape(16, args.tokens)

            def told(one: Measured, step: str = step) -> None:
                run = one.summary
                assert run.completed == args.streams and run.chunks == run.output_tokens, run
                assert run.itl is not None
                each = 1e6 * run.processor / run.output_tokens
                print(
                    f"steps of {step} ms: {run.output_tokens} tokens at {run.output_per_second:,.0f} a second", end=""
                )
                print(f"; client {each:.1f} µs a token; ITL {run.itl.p50:.2f} ms, p99 {run.itl.p99:.2f}")

            def prompts(seed: int, count: int | None, shape: Shape = shape) -> list[dict[str, object]]:
                return random_prompts(count or args.streams, shape, seed)

            try:
                asyncio.run(measure(settings, prompts, lambda what: nullcontext(), told))
            finally:
                source.kill()


if __name__ == "__main__":
    main()
