"""``tpctl bench quality`` with real workers and weights of the demo model's first layers, beside transformers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.distributed.patience import PATIENCE
from tpctl.bench.passage import PASSAGE
from tpctl.checkpoint.cache import cache_root

pytestmark = pytest.mark.slow

TOKENS, CONTEXT, STRIDE = 300, 128, 64


def quality(model: str, *options: str) -> dict[str, Any]:
    sizes = [f"--{name}={value}" for name, value in (("tokens", TOKENS), ("context", CONTEXT), ("stride", STRIDE))]
    command = [sys.executable, "-m", "tpctl", "bench", "quality", model, "--device", "cpu", "--json"]
    done = subprocess.run([*command, *sizes, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_two_sizes_are_one_model_and_its_perplexity_transformers(small: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = quality(small, "--dtype", "float32", "--tp", "2", "--against-tp", "1")
    assert (report["engine"]["tp_size"], report["against_engine"]["tp_size"]) == (2, 1)
    assert report["perplexity"] == pytest.approx(report["against_perplexity"], rel=1e-4)
    assert 0 <= report["divergence"]["max"] < 1e-6
    assert report["same_top"] > 0.99
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(small)(PASSAGE, return_tensors="pt").input_ids[:, :TOKENS]
    total, done = 0.0, 1
    for begin in range(0, TOKENS, STRIDE):
        end = min(begin + CONTEXT, TOKENS)
        with torch.no_grad():
            logprobs = model(ids[:, begin:end]).logits[0].double().log_softmax(-1)
        total += sum(float(logprobs[at - 1 - begin, ids[0, at]]) for at in range(done, end))
        done = end
        if end == TOKENS:
            break
    assert report["perplexity"] == pytest.approx(math.exp(-total / (TOKENS - 1)), rel=1e-4)


def test_two_dtypes_and_nothing_is_left_in_the_cache(small: str) -> None:
    """The distributions' file has no name there; the workers open it all the same."""
    report = quality(small, "--dtype", "bfloat16", "--against-dtype", "float32")
    assert 0 < report["divergence"]["mean"] < 0.01
    assert not [path.name for path in cache_root().iterdir() if path.name.startswith("tmp")]
