"""Models with more in their attention than Llama's: sinks, norms over all heads at once, layers without RoPE.

The logits of the mixtures among them equal transformers' at every position (those of the dense ones do in
``test_models.py``); what they answer, ``test_families_tokens.py`` has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

from tests.tiny import YARN_ROPE, make_mixture
from tests.unit.test_models import logits_of
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.layers.rotary import attention_scale, inverse_frequencies
from tpctl.sharding.cutting.shard import shard_checkpoint

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("gpt_oss", {"sliding_window": 7, "rope_parameters": {**YARN_ROPE, "truncate": False}}),
    "gpt_oss-full": ("gpt_oss", {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 6}),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 12, "rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.5}},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: a checkpoint, and the model of it; each made when first asked for."""

    class Made(dict[str, tuple[Path, Any]]):
        def __missing__(self, name: str) -> tuple[Path, Any]:
            folder = tmp_path_factory.mktemp(name) / "model"
            kind, changes = MIXTURES[name]
            self[name] = folder, make_mixture(kind, folder, **changes)
            return self[name]

    return Made()


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize(("tp_size", "groups"), [(1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("name", MIXTURES)
def test_logits_equal_transformers(name: str, tp_size: int, groups: int, made: Any, tmp_path: Path) -> None:
    folder, model = made[name]
    shard_checkpoint(folder, tmp_path / "shards", tp_size, cutting=Cutting(groups))
    prompts = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = model(prompts).logits
    found = logits_of(tmp_path / "shards", tp_size, prompts.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"rope_parameters": None, "rope_scaling": ...}])
@pytest.mark.parametrize(
    ("name", "table"), [("gpt-oss-20b", GptOssRotaryEmbedding), ("MiniMax-M2", MiniMaxM2RotaryEmbedding)]
)
def test_published_files_rotate_as_transformers_does(name: str, table: Any, changes: dict[str, Any]) -> None:
    raw = json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "quantization_config")}
    expected = table(CONFIG_MAPPING[raw["model_type"]](**fields))
    rope = ModelConfig.from_dict(raw).blueprint.blocks[0].attention.rope
    assert rope is not None
    torch.testing.assert_close(inverse_frequencies(rope), expected.inv_freq, rtol=1e-6, atol=0)
    assert attention_scale(rope) == pytest.approx(expected.attention_scaling)


def test_every_second_layer_of_gpt_oss_has_a_window() -> None:
    blueprint = ModelConfig.from_dict({"model_type": "gpt_oss"}).blueprint
    assert blueprint.windows == (128, None) * 18
    assert {block.attention.sinks.size for block in blueprint.blocks if block.attention.sinks} == {64}
