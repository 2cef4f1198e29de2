"""What memory the GPU engine gives its KV cache, without a GPU (``stand_in``)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import SHAPE, replayed, start
from tests.tiny import make_checkpoint
from tpctl.accounting import RESERVE
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.runners import cuda_sizes, loading
from tpctl.errors import EngineError
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
