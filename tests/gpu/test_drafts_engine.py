"""Drafts on one GPU: answers are those without, in every kind of layer and with keys and values in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.test_engine import WIDE, most_behind
from tests.looping import make_looping
from tests.tiny import GEMMA3
from tests.tiny_predicting import make_copying
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners import cuda
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.report import EngineStats
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter runs them in test_cuda_drafts"),
]
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "attention_bias": False}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
NETS: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
NAMES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**NETS, "head_dim": 64},
    "qwen3": {"head_dim": 128},
    "gemma3": {"head_dim": 64, "layer_types": GEMMA3["layer_types"]},
    "qwen3_moe": {"head_dim": 64, **EXPERTS},
    "gpt_oss": {"head_dim": 64, "sliding_window": 20, "intermediate_size": 64},
    "deepseek_v3": {**EXPERTS, **LATENT, "num_key_value_heads": 4},
}
DAMP = {"deepseek_v3": 0.1, "qwen3_5_text": 0.01}  # of layers that leave less of the embedding's circle
PREDICTING: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 64, **EXPERTS},
    "deepseek_v3": {**EXPERTS, **LATENT, "num_key_value_heads": 4},
    "qwen3_5_text": {**NETS, "head_dim": 64},
    "qwen3_next": {**NETS, "head_dim": 64, "moe_intermediate_size": 64},
}
"""Models with a layer that predicts one token more."""
COPIES = {"qwen3_5_text": 0.03, "qwen3_next": 0.003}
"""The same for the layers of such models; mostly 0.01."""
PROMPTS = [[5, 6, 7, 8] * 12, [9, 9, 9], list(range(30, 90))]


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that as much is drafted, and computed, as can be."""
    monkeypatch.setattr(cuda, "gpu_cost", lambda loaded: RowCost(0, 0))


def run(shards: Path, params: SamplingParams | None = None, **settings: Any) -> tuple[list[list[int]], EngineStats]:
    defaults = {"kv_cache_memory": 64 << 20, "max_num_seqs": 48, "max_num_batched_tokens": 128}
    engine = Engine(EngineConfig(shards, 1, device="cuda", **{**defaults, **settings}), TPGroup(0, 1, "cuda"))
    params = params or SamplingParams(max_tokens=40, ignore_eos=True)
    engine.apply(Add([Request(str(number), ids, params) for number, ids in enumerate(PROMPTS)]))
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for output in engine.step():
            found[int(output.id)] += output.token_ids
    engine.scheduler.check_integrity()
    return found, engine.stats()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_equal_transformers(name: str, eager: bool, tmp_path: Path) -> None:
    model = make_looping(name, tmp_path / "hf", DAMP.get(name, 0.3), **{**WIDE, **NAMES[name]}).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    found, stats = run(tmp_path / "tp1", enforce_eager=eager, speculate="ngram")
    for ids, tokens in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
    assert stats.accepted_tokens > 0 and stats.steps < 42


@pytest.mark.parametrize("form", ["model", "packed", "fp8"])
def test_every_form_of_keys_and_values_stays_near_float32(form: str, tmp_path: Path) -> None:
    model = make_looping("qwen3", tmp_path / "hf", **{**WIDE, **NAMES["qwen3"]}).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1, dtype="bfloat16")
    found, stats = run(tmp_path / "tp1", kv_cache_dtype=form, speculate="ngram")
    assert stats.accepted_tokens > 0
    assert most_behind(model, PROMPTS, found) < 0.25


def predicting(name: str, folder: Path, **cut: Any) -> Any:
    """Shards of a model whose own layer's drafts hold often; transformers' model of it."""
    make_copying(name, folder / "hf", COPIES.get(name, 0.01), **{**WIDE, **PREDICTING[name]})
    shard_checkpoint(folder / "hf", folder / "tp1", 1, **cut)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager").cuda()
    model.config._experts_implementation = "eager"
    return model.eval()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", PREDICTING)
def test_a_models_own_layer_drafts(name: str, eager: bool, tmp_path: Path) -> None:
    """In captured steps and without; beyond a block, and as many requests as fill one size and the next."""
    model = predicting(name, tmp_path)
    found, stats = run(tmp_path / "tp1", enforce_eager=eager, speculate="mtp", block_size=16)
    for ids, tokens in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
    assert 20 < stats.accepted_tokens <= stats.draft_tokens and stats.steps < 40


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.2},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 0.2, "top_k": 7, "top_p": 0.95},
        {"temperature": 0.2, "logprobs": 1},
    ],
)
@pytest.mark.parametrize("name", PREDICTING)
def test_what_is_sampled_is_what_comes_without_drafts(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    predicting(name, tmp_path)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, seed=5, **params)
    without, _ = run(tmp_path / "tp1", sampling)
    found, stats = run(tmp_path / "tp1", sampling, speculate="mtp")
    assert found == without
    assert 0 < stats.accepted_tokens < stats.draft_tokens


@pytest.mark.parametrize("name", PREDICTING)
def test_a_models_own_layer_drafts_in_bfloat16(name: str, tmp_path: Path) -> None:
    """With keys and values in whatever form is best."""
    model = predicting(name, tmp_path, dtype="bfloat16")
    found, stats = run(tmp_path / "tp1", speculate="mtp")
    assert stats.accepted_tokens > 0
    assert most_behind(model, PROMPTS, found) < 0.25
