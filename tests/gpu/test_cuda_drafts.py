"""Drafts in decode steps on the GPU engine's host side, without a GPU (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import SHAPE, best, finish, replayed, start
from tests.looping import make_looping
from tests.tiny import make_checkpoint
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.engine.scheduling.speculation import RowCost
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams

__all__ = ["replayed"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18},
    "gpt_oss": {"layer_types": ["sliding_attention"], "sliding_window": 18},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 32, "first_k_dense_replace": 0},
}
"""Layers with windows and without, sinks, experts, a latent cache."""


@pytest.mark.daily(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_in_layers_of_other_kinds(
    name: str, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In captured steps, beyond the window, beside a sequence without drafts; answers are transformers'."""
    monkeypatch.setattr(cuda_runner, "gpu_cost", lambda loaded: RowCost(0, 0))
    model = make_looping(name, tmp_path / "hf", **{**SHAPE, **FAMILIES[name]})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = {"0": [5, 6, 7, 8] * 4, "1": [4, 5, 6, 7, 20, 4, 5, 6, 7, 21, 4, 5, 6]}  # where 4 follows 7
    engine = start(tmp_path / "tp1", speculate="ngram", max_num_seqs=8)
    found: dict[str, list[int]] = {id: [] for id in prompts}
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
    finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    stats = engine.stats()
    assert stats.accepted_tokens > 0
    assert stats.accepted_tokens < stats.draft_tokens or name == "qwen3_moe"  # of which all hold
    assert max(key[0] for key in replayed if key[0] != "mixed") > 2  # type: ignore[index,type-var,return-value,operator]


@pytest.mark.always
@pytest.mark.parametrize(
    ("params", "eager"),
    [
        ({}, False),
        ({"temperature": 0.05}, True),
        ({"temperature": 0.05, "logprobs": 1, "repetition_penalty": 1.01}, False),
    ],
)
def test_drafts_are_rows_of_a_decode(
    params: dict[str, Any], eager: bool, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those without speculation, on the device as with the host's help, in captured steps and without."""
    monkeypatch.setattr(cuda_runner, "gpu_cost", lambda loaded: RowCost(0, 0))
    make_checkpoint("qwen3", tmp_path / "hf", **{**SHAPE, "num_hidden_layers": 1})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = {"0": [5, 6, 7, 8] * 4, "1": [9, 9, 9]}
    requests = [
        Request(id, ids, SamplingParams(max_tokens=9, ignore_eos=True, seed=int(id), **params))
        for id, ids in prompts.items()
    ]
    answers: dict[str, dict[str, list[int]]] = {}
    for way in ("off", "ngram"):
        replayed.clear()
        engine = start(tmp_path / "tp1", speculate=way, max_num_seqs=8, enforce_eager=eager)
        answers[way] = {id: [] for id in prompts}
        engine.apply(Add(requests))
        finish(engine, answers[way])
    stats = engine.stats()
    assert answers["ngram"] == answers["off"]
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps < 9
    sizes = {key[0] for key in replayed}  # type: ignore[index]
    assert not sizes if eager else max(sizes) > 4
