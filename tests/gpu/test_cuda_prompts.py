"""Prompts in captured steps, and prefixes that many share, on the GPU engine's host side (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import DIRECT, SHAPE, best, finish, prompts_of, replayed, start
from tests.tiny import make_checkpoint
from tpctl.engine.runners import cuda as cuda_runner
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams

__all__ = ["replayed"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_short_prompts_are_replayed_once_their_size_has_come(
    name: str, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """Alone, beside decodes, behind a cached prefix, and in chunks."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18} if name == "gemma3" else {}
    model = make_checkpoint(name, tmp_path / "hf", **{**SHAPE, "num_hidden_layers": 2, **layers})
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    engine = start(tmp_path / "tp1", max_num_batched_tokens=32)
    lengths = prompts_of(5, 20, 40, 30, 7)
    lengths["3"] = lengths["2"][:32] + lengths["3"]

    def ask(turn: int, *together: str) -> list[Hashable]:
        """The sizes of prompts that were replayed."""
        prompts = {f"{turn}-{id}": [3 + (token + turn) % 120 for token in lengths[id]] for id in together}
        found: dict[str, list[int]] = {id: [] for id in prompts}
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        before = len(replayed)
        engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
        finish(engine, found)
        while engine.runner.rest():
            pass
        for id, ids in prompts.items():
            assert found[id] == best(model, ids, found[id]), id
        return [key[1] for key in replayed[before:] if key[0] == "mixed"]  # type: ignore[index]

    assert ask(1, "0") == []
    assert ask(2, "4") == [16]
    ask(3, "1", "2", "3")
    assert ask(4, "3", "0", "2", "1").count(32) >= 3


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_prefix_that_all_share_is_read_once(
    name: str, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runner, "_SHARED_ROWS", 3)
    monkeypatch.setattr(cuda_runner, "_SHARED_TOKENS", 128)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18} if name == "gemma3" else {}
    shape = {**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 512, **layers}
    model = make_checkpoint(name, tmp_path / "hf", **shape)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    engine = start(tmp_path / "tp1", max_model_len=256, max_num_batched_tokens=256, kv_cache_memory=4 << 20)
    (prefix,) = prompts_of(140).values()
    prompts = {"first": prefix[:137]} | {
        id: prefix[: 128 + at] + own for at, (id, own) in enumerate(prompts_of(5, 20, 3).items())
    }
    found: dict[str, list[int]] = {id: [] for id in prompts}
    for together in (["first"], [id for id in prompts if id != "first"]):
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.apply(Add([Request(id, prompts[id], params) for id in together]))
        finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert (4, False, True, DIRECT) in replayed
    assert engine.stats().prefix_cache_hit_tokens >= 3 * 128


@pytest.mark.always
@pytest.mark.parametrize("blocks,common", [
    ([[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]], 2),
    ([[1, 2, 3], [1, 9, 4], [1, 2, 6]], 1),
    ([[1, 2, 3], [7, 2, 4], [8, 2, 6]], 0),
    ([[1, 2, 3], [7, 2, 4], [1, 2, 6]], 0),
    ([[1], [1, 2]], 0),
])  # fmt: skip
def test_how_many_blocks_are_shared(blocks: list[list[int]], common: int) -> None:
    assert cuda_runner.shared_blocks(blocks) == common
