"""The engine on one GPU with gated delta nets: tokens against transformers, graphs against eager launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.test_engine import most_behind, prompts_of, run
from tests.tiny import make_mixture
from tpctl.sharding.cutting.shard import shard_checkpoint

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
def test_bfloat16_stays_near_float32(name: str, tmp_path: Path) -> None:
    """In captured steps, and equal to those launched one by one."""
    model = make_mixture(name, tmp_path / "hf", **SIZES).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1, dtype="bfloat16")
    prompts = prompts_of(517, (1, 2, 17, 64, 65, 130, 33, 450))
    settings: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    found, eager = (run(tmp_path / "tp1", prompts, enforce_eager=one, **settings) for one in (False, True))
    assert found == eager
    assert most_behind(model, prompts, found) < 0.5
