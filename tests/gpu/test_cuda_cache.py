"""What memory the GPU engine gives its KV cache, without a GPU (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import SHAPE, replayed, start
from tests.tiny import make_checkpoint, make_mixture
from tpctl.accounting import RESERVE
from tpctl.arch.config import ModelConfig
from tpctl.attention_choice import KINDS, Kind
from tpctl.checkpoint.metadata import read_metadata
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.runners import cuda_memory, cuda_sizes, loading
from tpctl.errors import EngineError
from tpctl.planning.model_sizes import ModelSizes
from tpctl.planning.step_sizes import later_bytes
from tpctl.sharding.cutting.shard import shard_checkpoint

__all__ = ["replayed"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]


def test_the_cache_gets_what_nothing_else_needs(
    tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    gib = 1 << 30
    share, taken = [GpuShare(80 * gib, 79 * gib, 0.5)], 3 * gib
    monkeypatch.setattr(loading, "_share", lambda settings, group, nbytes: share[0])
    monkeypatch.setattr(GpuShare, "taken", lambda self, device: taken)
    engine = start(tmp_path / "tp1", kv_cache_memory=None)
    runner: Any = engine.runner
    assert runner.memory.num_blocks == 6 * 96 // 16  # more would never be used
    later, config = runner.steps.later, runner.loaded.config
    tables = 4 * (2 * 6 + cuda_sizes.largest_rows(runner.loaded.settings, runner.pace)) * 96 // 16
    # And the logits of a captured step, its activations, and what sampling with the host's help takes.
    assert later > tables + 6 * config.vocab_size * 4 + runner.sampler.working_bytes(6)
    block = runner.loaded.slab_bytes
    rest = taken + later + RESERVE
    share[0] = GpuShare(80 * gib, rest + 10 * block + block // 2, 1.0)
    assert start(tmp_path / "tp1", kv_cache_memory=None).runner.memory.num_blocks == 10
    share[0] = GpuShare(80 * gib, rest, 1.0)
    with pytest.raises(EngineError, match=r"nothing is left for the KV cache: of .* 80\.0 GiB rank 0 may take 3\.5"):
        start(tmp_path / "tp1", kv_cache_memory=None)


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": SHAPE,
    "gpt_oss": {"sliding_window": 7, "num_hidden_layers": 2},
    "qwen3_next": {},
}
"""One pool, with prefixes that decodes share; two, with sinks; and chunks of recurrent layers."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_counts_what_captured_steps_and_sampling_take(
    name: str, tmp_path: Path, replayed: list[Hashable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, but for the largest step, which a plan estimates."""
    (make_checkpoint if name == "qwen3" else make_mixture)(name, tmp_path / "hf", **SHAPES[name])
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (1 << 20) + 123_457)
    monkeypatch.setattr(cuda_memory, "_run_largest", lambda loaded: None)
    monkeypatch.setitem(KINDS, "triton", Kind(16))
    runner: Any = start(tmp_path / "tp1", kv_cache_memory=8 << 20).runner
    model = ModelSizes(ModelConfig.load(tmp_path / "hf"), read_metadata(str(tmp_path / "hf")), None)
    assert runner.steps.activations == 123_457 and runner.pace is None
    assert later_bytes(model, model.small_plan(1), 0, 123_457, 48, 6, 96) == runner.steps.later
