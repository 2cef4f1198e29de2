"""``tpctl batch`` by one replica and by several: generated tokens a second, with text in and text out.

    python benchmarks/replicas.py --shape qwen3-0.6b [--tp 1] [--replicas 1 2 4] [--rows 2000] [--device cuda]
        [--memory-share 0.45]

Random weights of a known shape with a tokenizer of bytes, prompts of 50 to 400 bytes and 16 to 256 answer tokens. tok/s
is what ``stats.json`` says, s the whole command, starts and all. ``--memory-share`` is what each replica takes of a
GPU, where several share one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from made_model import BYTES, with_tokenizer

WORDS = ["the", "river", "stone", "winter", "light", "letter", "garden", "morning", "window", "house", "paper", "road"]
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_prompts(path: Path, rows: int, seed: int) -> None:
    chance = random.Random(seed)
    with path.open("w") as file:
        for number in range(rows):
            text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(10, 70)))
            row = {"id": number, "prompt": text, "max_tokens": chance.randint(16, 256)}
            file.write(json.dumps(row) + "\n")


def measure(scratch: Path, model: Path, replicas: int, options: list[str]) -> dict[str, float]:
    """One batch: ``command`` seconds of it all, and its own counts."""
    out = scratch / "rows"
    command = [sys.executable, "-m", "tpctl", "batch", str(scratch / "prompts.jsonl"), "-o", f"{out}/"]
    command += ["--model", str(model), "--replicas", str(replicas), "--part-rows", "200", *options]
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    stats = json.loads((out / "stats.json").read_text())
    shutil.rmtree(out)
    assert stats["errors"] == 0, stats
    return {"command": seconds, "tok/s": stats["tokens_per_second"], "tokens": stats["completion_tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=1, help="in turn, of each number of replicas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--memory-share", type=float)
    args = parser.parse_args()
    options = ["--device", args.device, "--tp", str(args.tp), "--max-model-len", "1024"]
    if args.memory_share:
        options += ["--gpu-memory-utilization", str(args.memory_share)]
    print(f"{args.shape}, tp {args.tp}, {args.rows} rows, {os.cpu_count()} cores\n")
    print("| replicas | tok/s | beside the first | s | tokens |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="replicas-") as name:
        scratch = Path(name)
        model = with_tokenizer(args.shape, args.tp, BYTES, "bytes", PLAIN)
        write_prompts(scratch / "prompts.jsonl", args.rows, 0)
        first: dict[int, float] = {}
        for run in range(args.runs):
            for replicas in args.replicas:
                found = measure(scratch, model, replicas, options)
                rate = found["tok/s"] / first.setdefault(run, found["tok/s"])
                cells = (replicas, f"{found['tok/s']:,.1f}", f"{rate:.2f}", f"{found['command']:.1f}", found["tokens"])
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
