"""What ends an answer: the context, which a small KV cache shortens, stop tokens, and nothing before ``min_tokens``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_checkpoint
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.errors import EngineError
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

BLOCK = 4 * 2 * 3 * 8 * 8 * 4
"""Bytes of 4 tokens: keys and values of 3 layers of 8 heads of 8 dimensions, in float32."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama2")
    make_checkpoint("llama2", folder / "hf")
    shard_checkpoint(folder / "hf", folder / "tp1", 1)
    return folder / "tp1"


def start(shards: Path, **settings: Any) -> Engine:
    with torch.inference_mode():
        return Engine(EngineConfig(shards, 1, **{"block_size": 4, **settings}), TPGroup())


def answer(engine: Engine, **params: Any) -> tuple[list[int], Output]:
    """The tokens that follow ten, and the last output."""
    outputs: list[Output] = []
    with torch.inference_mode():
        outputs += engine.apply(Add([Request("a", list(range(5, 15)), SamplingParams(**params))]))
        while engine.has_work:
            outputs += engine.step()
    return [token for output in outputs for token in output.token_ids], outputs[-1]


def test_a_context_that_the_kv_cache_shortens(shards: Path) -> None:
    engine = start(shards, kv_cache_memory=8 * BLOCK + BLOCK // 2)
    info = engine.info()
    assert (info.max_model_len, info.wanted_model_len, info.kv_cache_bytes) == (32, 128, 8 * BLOCK)
    tokens, last = answer(engine, max_tokens=100, ignore_eos=True)
    assert (len(tokens), last.finish_reason) == (22, "length")
    assert last.message == "the KV cache holds 32 tokens, fewer than the model's 128; raise --kv-cache-memory"
    tokens, last = answer(engine, max_tokens=22, ignore_eos=True)
    assert (len(tokens), last.finish_reason, last.message) == (22, "length", None)


def test_the_end_of_the_models_own_context(shards: Path) -> None:
    engine = start(shards, kv_cache_memory=32 * BLOCK)
    assert (engine.info().max_model_len, engine.info().wanted_model_len) == (128, 128)
    assert answer(engine, max_tokens=1000, ignore_eos=True)[1].message == (
        "prompt and answer fill the context of 128 tokens"
    )


def test_a_context_that_was_asked_for_is_not_shortened(shards: Path) -> None:
    said = f"--max-model-len 64 does not fit: the KV cache holds 32 tokens; give --kv-cache-memory {16 * BLOCK} "
    with pytest.raises(EngineError, match=said):
        start(shards, kv_cache_memory=8 * BLOCK, max_model_len=64)


def test_no_answer_ends_before_min_tokens(shards: Path) -> None:
    engine = start(shards, kv_cache_memory=32 * BLOCK)
    free, _ = answer(engine, max_tokens=12, ignore_eos=True)
    stops = tuple({free[2], free[5]})
    tokens, last = answer(engine, max_tokens=12, ignore_eos=True, stop_token_ids=stops)
    assert (last.finish_reason, tokens[-1] in stops, len(tokens) <= 3) == ("stop", True, True)
    for least in (1, 4, 12):
        tokens, last = answer(engine, max_tokens=12, min_tokens=least, ignore_eos=True, stop_token_ids=stops)
        assert len(tokens) >= least
        assert not set(stops) & set(tokens[:least])
        assert (last.finish_reason == "stop") == (tokens[-1] in stops and len(tokens) > least)
    # The model's own end of an answer counts too.
    engine.scheduler.limits = replace(engine.scheduler.limits, eos_token_ids=frozenset(stops))
    tokens, _ = answer(engine, max_tokens=12, min_tokens=12)
    assert len(tokens) == 12
    assert not set(stops) & set(tokens)
    assert len(answer(engine, max_tokens=12)[0]) <= 3
