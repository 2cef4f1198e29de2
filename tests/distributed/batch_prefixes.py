"""What it saves that rows which begin alike go to one replica: documents, each asked several questions, which are
scattered over the input.

    python -m tests.distributed.batch_prefixes [--documents 48] [--questions 8] [--replicas 2] [--seed 0]
        [--kv-cache-memory 600MiB]

Each line: how rows were given out, tokens that were found in prefix caches, tokens a second, and CPU time of all
processes, which says more where other jobs share the machine. ``input``: consecutive rows, as they stand; ``order``:
beginnings beside each other within a part; ``shares``: as ``tpctl batch`` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tpctl.batch.folder import JobFolder, load

UNSHARED = "prefixes.sharing_of = lambda *_: prefixes.UNSHARED"
WITHOUT = {
    "input": f"{UNSHARED}; prefixes.order_of = lambda lines, _: [*range(len(lines))]",
    "order": UNSHARED,
    "shares": "",
}
"""What is left out, in every process of a batch."""

WORDS = ["the", "river", "stone", "winter", "light", "letter", "garden", "morning", "window", "house", "paper", "road"]


def write_prompts(path: Path, documents: int, questions: int, seed: int) -> Path:
    """About 270 tokens each; in random order."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choice(WORDS) for _ in range(260)) for _ in range(documents)]
    rows = [(text, question) for question in range(questions) for text in texts]
    chance.shuffle(rows)
    with path.open("w") as file:
        for id, (text, question) in enumerate(rows):
            file.write(json.dumps({"id": id, "prompt": f"{text} Which word is number {question}?"}) + "\n")
    return path


def measure(scratch: Path, prompts: Path, how: str, options: list[str]) -> str:
    site = scratch / f"site-{how}"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"from tpctl.batch import prefixes\n{WITHOUT[how]}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    out = scratch / how
    command = [sys.executable, "-m", "tpctl", "batch", str(prompts), "-o", f"{out}/", "--device", "cpu", *options]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stats = load(JobFolder(out).stats)
    assert stats is not None and stats["errors"] == 0
    found, asked = stats["cached_tokens"], stats["prompt_tokens"]
    return (
        f"{how}: {found:,} of {asked:,} tokens cached ({found / asked:.1%}), {asked - found:,} computed, "
        f"{asked / seconds:,.0f} prompt tokens/s, {seconds:.1f} s, {cpu:.1f} s of CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kv-cache-memory", default="600MiB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = ["--replicas", str(args.replicas), "--kv-cache-memory", args.kv_cache_memory, "--max-tokens", "2"]
    options += ["--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "512"]
    with tempfile.TemporaryDirectory(prefix="batch-prefixes-") as scratch:
        prompts = write_prompts(Path(scratch, "prompts.jsonl"), args.documents, args.questions, args.seed)
        for how in WITHOUT:
            print(measure(Path(scratch), prompts, how, options), flush=True)


if __name__ == "__main__":
    main()
