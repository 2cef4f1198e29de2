"""Models on a GPU, what they are asked, and how far answers may be off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.tiny import LONG_ROPES
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": 517,
    "max_position_embeddings": 512,
}

CHANGES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4},
    "llama3": {},
    "llama-biases": {},
    "llama-head-dim": {"head_dim": 80},
    "smollm2": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 19},
    "qwen2-window": {},
    "qwen3": {"head_dim": 128},
    "phi3-window": {},
    "phi3-long-rope": {"rope_parameters": LONG_ROPES[32]},
    "phi4-mini": {"rope_parameters": LONG_ROPES[24] | {"partial_rotary_factor": 0.75}},
}

LENGTHS = (3, 17, 40, 65, 130)

TOKENS = 20


def run(folder: Path, prompts: list[list[int]], tokens: int | list[int] = TOKENS, **settings: Any) -> list[list[int]]:
    """Greedy continuations, ``tokens`` long (of each prompt), from an engine made for this call."""
    defaults: dict[str, Any] = {"kv_cache_memory": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    config = EngineConfig(folder, 1, device="cuda", **{**defaults, **settings})
    engine = Engine(config, TPGroup(0, 1, "cuda"))
    lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    engine.apply(Add([Request(str(i), ids, params[i]) for i, ids in enumerate(prompts)]))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            found[int(output.id)] += output.token_ids
    engine.scheduler.check_integrity()
    return found


def prompts_of(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(3, vocab, (length,)).tolist() for length in lengths]


def most_behind(model: Any, prompts: list[list[int]], found: list[list[int]]) -> float:
    """How far the found tokens' logits are behind the best ones in float32, in standard deviations.

    A token that bfloat16 prefers may be behind, but only by rounding.
    """
    worst = 0.0
    for ids, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(tokens, device="cuda").unsqueeze(-1)).squeeze(-1)
        worst = max(worst, float(((logits.max(-1).values - chosen) / logits.std(-1)).max()))
    return worst
