"""Drafts by a model's own layer on the GPU engine's host side, without a GPU (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tests.gpu.stand_in import SHAPE, finish, replayed, start
from tests.tiny_predicting import make_copying
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.engine.runners import predicting, runner
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.scheduling.speculation import PredictedDrafter, RowCost
from tpctl.engine.steps import mixed
from tpctl.kernels.sampling.accept import accept, accept_reference
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.report import EngineStats
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

__all__ = ["replayed"]  # a fixture
pytestmark = pytest.mark.gpu

FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 16},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 32},
    "qwen3_5_text": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
DAMP = {"glm4_moe": 0.03, "deepseek_v3": 0.1, "qwen3_5_text": 0.12}
"""Of models of whose drafts some hold."""
PROMPTS = {"0": [*[5, 6, 7, 8] * 4, 5], "1": [9, 9, 9], "2": [(7 * at) % 120 + 3 for at in range(29)]}
Kept = dict[tuple[str, int], list[int]]
"""Drafts by the sequence and the tokens that they are to follow."""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """What is drafted, in steps whose rows cost nothing, so that as much is as can be."""
    drafts: Kept = {}
    keep = PredictedDrafter.keep

    def noted(self: PredictedDrafter, sequence: Sequence, length: int, found: list[int]) -> None:
        drafts[sequence.id, length] = found
        keep(self, sequence, length, found)

    monkeypatch.setattr(PredictedDrafter, "keep", noted)
    monkeypatch.setattr(cuda_runner, "gpu_cost", lambda loaded: RowCost(0, 0))
    monkeypatch.setattr(runner.ModelRunner, "row_cost", RowCost(0, 0))
    monkeypatch.setattr(predicting, "predicted_cost", lambda cost, blueprint: cost)
    return drafts


def shards_of(name: str, folder: Path) -> Path:
    make_copying(name, folder / "hf", DAMP[name], **{**SHAPE, **FAMILIES[name]})
    shard_checkpoint(folder / "hf", folder / "tp1", 1)
    return folder / "tp1"


def run(engine: Engine, params: dict[str, Any], tokens: int = 9) -> tuple[dict[str, list[int]], EngineStats]:
    found: dict[str, list[int]] = {id: [] for id in PROMPTS}
    requests = [
        Request(id, ids, SamplingParams(max_tokens=tokens, ignore_eos=True, seed=int(id), **params))
        for id, ids in PROMPTS.items()
    ]
    engine.apply(Add(requests))
    finish(engine, found)
    return found, engine.stats()


def on_a_cpu(shards: Path, **settings: Any) -> Engine:
    """In plain torch."""
    sizes = {"kv_cache_memory": 4 << 20, "block_size": 16, "max_num_batched_tokens": 48, "max_model_len": 96}
    return Engine(EngineConfig(shards, 1, max_num_seqs=8, **sizes, **settings), TPGroup(0, 1, "cpu"))


@pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_drafts_engine")
@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("name", "params", "eager"),
    [
        ("glm4_moe", {}, False),
        ("glm4_moe", {"temperature": 0.05, "top_k": 5}, True),
        ("deepseek_v3", {"temperature": 0.05}, False),
        ("deepseek_v3", {"logprobs": 1, "min_tokens": 3}, False),
        ("qwen3_5_text", {}, False),
        ("qwen3_5_text", {"temperature": 0.05}, True),
    ],
)
def test_drafts_and_answers_are_those_of_a_cpu(
    name: str, params: dict[str, Any], eager: bool, tmp_path: Path, kept: Kept, request: pytest.FixtureRequest
) -> None:
    """In captured steps, with prompts and without, and in none; with what the host samples, too."""
    shards = shards_of(name, tmp_path)
    expected, _ = run(on_a_cpu(shards), params)
    others, _ = run(on_a_cpu(shards, speculate="mtp"), params)
    drafts = dict(kept)
    kept.clear()
    replayed: list[Hashable] = request.getfixturevalue("replayed")
    request.getfixturevalue("monkeypatch").setattr(mixed, "_MISSES", 1)
    found, stats = run(
        start(shards, speculate="mtp", max_num_seqs=12, enforce_eager=eager, kv_cache_memory=4 << 20), params
    )
    assert found == expected == others
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    both = kept.keys() & drafts.keys()
    assert len(both) > 4
    for place in both:
        few = min(len(kept[place]), len(drafts[place]))
        assert kept[place][:few] == drafts[place][:few], place
    assert {key[0] for key in replayed if isinstance(key[0], str)} == (set() if eager else {"follow", "draft", "mixed"})  # type: ignore[index]


@pytest.mark.always
@pytest.mark.parametrize("count", [1, 3])
def test_what_holds_is_found_on_the_device(count: int) -> None:
    sampled = torch.tensor([7, 8, 9, 4, -2, 5, 6, 1, 1, 1, 1, 2], device=DEVICE)
    columns = [
        [3, 10, 0, 99, 7, 8, 3, -1],  # two hold
        [0, 4, 3, 99, 4, 5, -1, -1],  # one, and then there is no token
        [2, 20, 6, 23, 6, 1, 1, -1],  # all, up to the end
        [5, 0, 10, 99, -1, -1, -1, -1],
        [-1, 0, 0, 0, -1, -1, -1, -1],
    ]
    packed = torch.tensor(columns, dtype=torch.int32, device=DEVICE).t().contiguous()
    rows, following = accept(packed, sampled, count)
    assert rows.tolist() == [2, 4, 9, 10, 0]
    assert following[0, 1].tolist() == [13, 6, 24, 1, 1]
    assert following[0, 0].tolist() == [3, 0, -1, 5, -1]
    for got, want in zip((rows, following), accept_reference(packed, sampled, count), strict=True):
        assert torch.equal(got, want)
