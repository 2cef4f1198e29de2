"""The rows whose logits are wanted come out of the model as they do when all rows are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("wanted", [[], [4], [0, 6, 10]])
def test_wanted_rows_equal_those_of_all_rows(tmp_path: Path, tp_size: int, wanted: list[int]) -> None:
    make_checkpoint("llama-biases", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size)

    def rank(group: TPGroup) -> None:
        runner = make_runner(EngineConfig(tmp_path / "shards", tp_size, kv_cache_memory=1 << 22, block_size=4), group)
        blocks = BlockManager(runner.memory.num_blocks, 4, enable_prefix_caching=False)
        sequences = [Sequence(str(i), list(range(3, 3 + n)), SamplingParams(), 256) for i, n in enumerate((5, 6))]
        for sequence in sequences:
            assert blocks.grow(sequence, len(sequence.token_ids))
        items = [ScheduledSequence(sequence, 0, len(sequence.token_ids), True) for sequence in sequences]

        def run(rows: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
            for layer in runner.kv:
                layer.k.zero_()
                layer.v.zero_()
            forward = build_forward_batch(ScheduledBatch(items, 0), 4, group.device)
            hidden = runner.model(forward, runner.kv, rows)
            return hidden, [side.clone() for layer in runner.kv for side in (layer.k, layer.v)]

        with torch.inference_mode():
            whole, stored = run(None)
            found, stored_too = run(torch.tensor(wanted, dtype=torch.int64))
        assert whole.shape[0] == 11
        torch.testing.assert_close(found, whole[wanted])
        for mine, other in zip(stored_too, stored, strict=True):
            torch.testing.assert_close(mine, other)

    run_ranks(tp_size, rank)
