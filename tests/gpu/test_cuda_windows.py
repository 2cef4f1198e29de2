"""Layers with windows, heads of several sizes and shared keys on the GPU engine's host side (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import SHAPE, answered, best, prompts_of, replayed, start
from tests.tiny import make_checkpoint
from tpctl.accounting import KvLayout
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

__all__ = ["replayed"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]
MIXED = ["sliding_attention", "full_attention"]


@pytest.mark.daily(2)
@pytest.mark.parametrize(("way", "block_size", "window"), [("graphs", 16, 18), ("eager", 32, 15), ("paced", 16, 18)])
def test_layers_with_windows_keep_what_they_see(
    way: str, block_size: int, window: int, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """In a pool of their own, of which blocks go from one sequence to the next, whose content would be seen."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**SHAPE, "num_hidden_layers": 3, "layer_types": layers, "sliding_window": window}
    model = make_checkpoint("gemma3", tmp_path / "hf", **shape)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(50, 3, 5, 35)
    prompts["2"] = prompts["0"][:32] + prompts["2"]  # a shared prefix
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
    }[way]
    engine = start(tmp_path / "tp1", block_size=block_size, max_num_seqs=2, max_model_len=64, **settings)
    assert engine.runner.loaded.layout == KvLayout(block_size, (None, window), (2, 1))
    lengths = dict.fromkeys(prompts, 3)
    lengths["0"] = 10
    requests = [
        Request(id, ids, SamplingParams(max_tokens=lengths[id], ignore_eos=True)) for id, ids in prompts.items()
    ]
    found = answered(engine, requests[:2], requests[2:])
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
        assert len(found[id]) == lengths[id]
    assert engine.stats().prefix_cache_hit_tokens == 32
    assert len(replayed) > 0 or way == "eager"


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Heads of two sizes in two pools, and a layer that reads another's keys.
        ("gemma4-text-edge", {"layer_types": [*MIXED, "full_attention"], "num_kv_shared_layers": 1}),
        ("gemma4-text-moe", {"layer_types": MIXED}),
        ("ministral3-window", {"num_hidden_layers": 1}),
    ],
)
def test_attention_of_other_kinds(name: str, sizes: dict[str, Any], tmp_path: Path, replayed: list[Hashable]) -> None:
    """In captured steps and in one with a prefix that is found."""
    sizes |= {"num_hidden_layers": len(sizes["layer_types"])} if "layer_types" in sizes else {}
    model = make_checkpoint(name, tmp_path / "hf", **sizes)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(35, 3, 5)
    prompts["2"] = prompts["0"][:32] + prompts["2"]  # a shared prefix
    engine = start(tmp_path / "tp1", max_num_seqs=2, max_model_len=64)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    requests = [Request(id, ids, params) for id, ids in prompts.items()]
    found = answered(engine, requests[:2], requests[2:])
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert engine.stats().prefix_cache_hit_tokens == 32
    assert len(replayed) > 0
