"""Mixtures of experts: logits equal transformers', cut inside of the experts or whole ones dealt to groups of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import YARN_ROPE, make_mixture
from tests.unit.test_models import logits_of, within
from tpctl.arch.quantised import Cutting
from tpctl.cli.engine import describe
from tpctl.engine.engine import make_runner
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig

NAMES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe-plain"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "deepseek_v3", "deepseek_v3-no-q-rank"),
)
CUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (5, 1), (6, 3))
"""Ranks, and groups that experts are dealt to: 23 and 29 rows of an expert are uneven at each size."""
MROPE = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
MSCALED = {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0}
WINDOWS: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 7},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": True, "tie_word_embeddings": True},
    "glm4_moe": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    "qwen3_next": {"norm_topk_prob": False, "decoder_sparse_step": 2, "attention_bias": True, "mlp_only_layers": [1]},
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 3, "use_cache": False, "linear_conv_kernel_dim": 2},
    "qwen3_5_moe_text": {"layer_types": ["full_attention"] * 3, "rope_parameters": MROPE},
    "deepseek_v3": {"rope_parameters": MSCALED, "rope_interleave": False, "norm_topk_prob": False, "v_head_dim": 13},
    "deepseek_v3-no-q-rank": {"rope_parameters": {**MSCALED, "mscale": 0.4}, "kv_lora_rank": 3, "n_shared_experts": 1},
    "glm4_moe-plain": {"n_shared_experts": 1, "num_experts_per_tok": 8, "head_dim": 12},
}
"""What else changes a result."""


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, bool], tuple[Path, Any]]:
    return {}


def check(name: str, folder: Path, model: Any, shards: Path, tp_size: int, groups: int) -> None:
    torch.manual_seed(7)
    prompts = torch.randint(3, 131, (2, 30))
    with torch.no_grad():
        expected = model(prompts).logits
    shard_checkpoint(folder, shards, tp_size, cutting=Cutting(groups))
    torch.testing.assert_close(logits_of(shards, tp_size, prompts.tolist()), expected, rtol=0, atol=within(name))


@pytest.mark.parametrize(("name", "tp_size", "groups"), [("qwen3_moe", 1, 1), ("deepseek_v3", 2, 2)])
def test_tokens_beside_it_change_no_more_of_a_token_than_its_last_bits(
    name: str, tp_size: int, groups: int, tmp_path: Path
) -> None:
    """Prompt and decodes of one sequence alone, and beside up to seven others, which choose other experts."""
    make_mixture(name, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", tp_size, cutting=Cutting(groups))
    prompts = torch.randint(3, 131, (8, 14), generator=torch.Generator().manual_seed(3)).tolist()
    alone, *beside = (
        logits_of(tmp_path / "shards", tp_size, prompts[:count], (9, 1, 1, 1, 1, 1))[0] for count in (1, 2, 5, 8)
    )
    for found in beside:
        torch.testing.assert_close(found, alone, rtol=0, atol=2e-6 * alone.abs().max().item())
        assert torch.equal(found.argmax(-1), alone.argmax(-1))


@pytest.mark.grid(2, daily=True, apart=True)
@pytest.mark.parametrize(
    ("name", "tp_size", "groups"),
    [(name, *cut) for name in NAMES for cut in CUTS if cut[1] == 1 or name != "qwen3_5_text"],
)
def test_logits_equal_transformers(
    name: str, tp_size: int, groups: int, made: dict[tuple[str, bool], tuple[Path, Any]], tmp_path_factory: Any
) -> None:
    stacked = (CUTS.index((tp_size, groups)) + NAMES.index(name)) % 2 == 1
    if (name, stacked) not in made:
        folder = tmp_path_factory.mktemp(name)
        made[name, stacked] = folder, make_mixture(name, folder, stacked=stacked)
    check(name, *made[name, stacked], tmp_path_factory.mktemp("cut") / "shards", tp_size, groups)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_other_windows_and_routers(name: str, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model", **WINDOWS[name])
    check(name, tmp_path / "model", model, tmp_path / "shards", 3, 1)


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_the_text_of_a_model_that_sees(name: str, tmp_path: Path) -> None:
    model = make_mixture(name, tmp_path / "model", sees=True)
    prompts = torch.randint(3, 131, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompts).logits
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 2, text_only=True)
    found = logits_of(tmp_path / "shards", 2, prompts.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=within(name))


@pytest.mark.parametrize(("groups", "said"), [(2, "tp 2, ep 2, float32, sdpa"), (1, "tp 2, float32, sdpa")])
def test_an_engine_says_what_its_experts_are_dealt_to(tmp_path: Path, groups: int, said: str) -> None:
    make_mixture("qwen3_moe", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 2, cutting=Cutting(groups))
    config = EngineConfig(tmp_path / "out", 2, kv_cache_memory=1 << 22)
    found = run_ranks(2, lambda group: torch.inference_mode()(make_runner)(config, group).info())
    assert [one.expert_parallel for one in found] == [groups, groups]
    assert describe(found[0]).startswith(said)
