"""The engine on one GPU with gated delta nets: tokens against transformers, graphs against eager launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.engine_runs import prompts_of, run
from tests.gpu.here import INTERPRET
from tests.gpu.logit_errors import DEVICE, WAYS, Expected, Run, record, rounded_too
from tests.tiny import MIXTURES, make_mixture
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter runs it in test_delta_net_cuda"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "intermediate_size": 320,
    "vocab_size": 517,
    "max_position_embeddings": 512,
}
NAMES = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_equal_transformers(name: str, backend: str, eager: bool, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "hf", **SIZES).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(517, (1, 2, 17, 64, 65, 130, 200))
    prompts += [prompts[-1][:150], prompts[-1]]
    found = run(tmp_path / "tp1", prompts, attention_backend=backend, enforce_eager=eager, block_size=32)
    for ids, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_captured_bfloat16_equals_launches(name: str, tmp_path: Path) -> None:
    make_mixture(name, tmp_path / "hf", **SIZES)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1, dtype="bfloat16")
    prompts = prompts_of(517, (1, 2, 17, 64, 65, 130, 33, 450))
    settings: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    found, eager = (run(tmp_path / "tp1", prompts, enforce_eager=one, **settings) for one in (False, True))
    assert found == eager


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits(name: str, way: str, tmp_path: Path) -> None:
    """As far from float32 as bfloat16 takes transformers' own model, with short prompts in captured steps, too. Every
    token has all experts: which ones a router chooses may be decided by rounding, and moves logits by any amount."""
    count = MIXTURES[name][1].get("num_experts")
    model, rounded = rounded_too(
        make_mixture(name, tmp_path / "hf", **SIZES, **({"num_experts_per_tok": count} if count else {})), tmp_path
    )
    settings = {"kv_cache_memory": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 512, **WAYS[way]}
    engine = Engine(
        EngineConfig(tmp_path / "tp1", 1, device=DEVICE, dtype="bfloat16", **settings), TPGroup(0, 1, DEVICE)
    )
    found = Run({})
    found.logits = record(engine, 1024)
    lengths, params = (1, 2, 17, 64, 65, 130, 33, 450), SamplingParams(max_tokens=20, ignore_eos=True)
    torch.manual_seed(3)
    prompts: dict[str, list[int]] = {}
    for turn in range(3):
        wave = {f"{turn}-{length}": torch.randint(3, 517, (length,)).tolist() for length in lengths}
        if turn:  # those of the wave before go on, from states that were kept
            wave |= {f"{turn}-{length}-again": [*prompts[f"{turn - 1}-{length}"], 5] for length in (65, 130)}
        found.tokens |= {id: [] for id in wave}
        engine.apply(Add([Request(id, ids, params) for id, ids in wave.items()]))
        while engine.has_work:
            for output in engine.step():
                found.tokens[output.id] += output.token_ids
        while engine.runner.rest():
            pass
        prompts |= wave
    mixed: Any = getattr(engine.runner, "_mixed", None)
    assert way == "eager" or len(mixed._captured) >= (1 if way == "paced" else 2)  # a pace fills steps to few sizes
    assert Expected.of(model, rounded, prompts, found.tokens).check(found) < 1.4
