"""A quantised model takes the memory of its stored form, and no more, when it is loaded and when it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.packers import awq, compressed
from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.sharding.cutting.shard import shard_checkpoint

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 256,
}
EXPERTS: dict[str, Any] = {"num_experts": 16, "moe_intermediate_size": 512, "num_experts_per_tok": 4}
INT4 = compressed("pack-quantized", num_bits=4, strategy="group", group_size=128).config

CHILD = """
import json, sys
from pathlib import Path
import torch
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

def taken():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}

torch.set_num_threads(1)
torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
group, before = TPGroup(0, 1, "cpu"), taken()
config = EngineConfig(Path(sys.argv[1]), 1, kv_cache_memory=1 << 22, block_size=4, max_num_seqs=2)
with torch.inference_mode():
    runner = make_runner(config, group)
    blocks = BlockManager(runner.memory.num_blocks, 4, enable_prefix_caching=False)
    sequence = Sequence("a", list(range(3, 19)), SamplingParams(), 256)
    assert blocks.grow(sequence, 16)
    scheduled = ScheduledBatch([ScheduledSequence(sequence, 0, 16, False)], 0)
    runner.model(build_forward_batch(scheduled, 4, group.device), runner.kv)
after = taken()
print(json.dumps([runner.loaded.weight_bytes, *(after[name] - before[name] for name in ("RssAnon", "VmHWM"))]))
"""

MIB = 1 << 20


@pytest.mark.parametrize(
    ("family", "scheme", "copies"),
    [("llama", INT4, 0), ("qwen3_moe", INT4, 0), ("llama", awq(128).config, 1)],
    ids=["dense", "experts", "packed again"],
)
def test_memory_is_that_of_the_stored_form(family: str, scheme: dict[str, Any], copies: int, tmp_path: Path) -> None:
    """A hundred megabytes, which in bfloat16 were four hundred. What lies as it is multiplied stays in the mapped file;
    what is packed in another order is copied once, and the file's pages are the system's to take."""
    config = make_config(family, **SIZES, **(EXPERTS if family != "llama" else {}), quantization_config=scheme)
    shard_checkpoint(make_checkpoint(tmp_path / "model", config), tmp_path / "shards", 1)
    ran = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "shards")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    stored, own, peak = json.loads(ran.stdout)
    assert 90 * MIB < stored < 120 * MIB
    assert own < copies * stored + 48 * MIB, (own / MIB, stored / MIB)
    assert peak < (1 + copies) * stored + 96 * MIB, (peak / MIB, stored / MIB)
