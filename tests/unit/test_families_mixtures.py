"""Families that tpctl cuts and does not run: checkpoints of transformers' own classes, to shards, back, and in between.

That a checkpoint can be sharded says that its names and shapes are those that the family expects, all of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import MIXTURES, make_mixture
from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan, checked_source_plan
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.metadata import read_metadata
from tpctl.client.prepare import _check_run
from tpctl.errors import CheckpointError, PartitionError, TpctlError, UnsupportedModelError
from tpctl.manifest.manifest import Manifest
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards
from tpctl.wire.settings import EngineSettings

HEADS = 6
SEEING = ("qwen3_5_text", "qwen3_5_moe_text")
WITH_EXPERTS = sorted(MIXTURES.keys() - {"qwen3_5_text"})


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def add(folder: Path, **shapes: tuple[int, ...]) -> None:
    """Tensors beside those that transformers saved."""
    path = folder / "model.safetensors"
    more = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    save_file({**load_file(path), **more}, path, {"format": "pt"})


def round_trip(source: Path, folder: Path, cuttings: list[tuple[int, Cutting]], **options: Any) -> None:
    """Shard, verify, merge and reshard, each byte for byte."""
    wanted, cut = folder_bytes(source), []
    folder.mkdir(exist_ok=True)
    for tp, cutting in cuttings:
        out = folder / f"{tp}-{cutting.expert_parallel}"
        shard_checkpoint(source, out, tp, cutting=cutting, **options)
        assert inspect_shards(out, verify=True, source=source).verified
        merge_shards(out, folder / "merged", force=True)
        assert folder_bytes(folder / "merged") == wanted, (tp, cutting)
        cut.append(out)
    for (tp, cutting), out, other in zip(cuttings, cut, cut[1:] + cut[:1], strict=True):
        if cutting.expert_parallel == 1 and other.name.endswith("-1"):
            reshard(out, folder / "again", int(other.name[0]), force=True)
            assert folder_bytes(folder / "again") == folder_bytes(other), (tp, other)


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_between_all_sizes(tmp_path: Path, name: str, stacked: bool) -> None:
    """From any to any; of stacked experts, which are the same numbers under fewer names, from some to some."""
    make_mixture(name, tmp_path / "model", stacked=stacked)
    sizes = (1, 2, 5) if stacked else range(1, HEADS + 1)
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in sizes])


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_whole_experts_by_rank(tmp_path: Path, name: str, stacked: bool) -> None:
    make_mixture(name, tmp_path / "model", stacked=stacked)
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting(2)), (4, Cutting(2)), (3, Cutting(3)), (6, Cutting(6))])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", SEEING)
def test_the_text_model_of_one_that_sees(tmp_path: Path, name: str, stacked: bool) -> None:
    make_mixture(name, tmp_path / "model", stacked=stacked, sees=True)
    with pytest.raises(UnsupportedModelError, match=r"of what sees or hears, such as model\.visual\..* --text-only"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 2)
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in (1, 2, 5)], text_only=True)
    manifest = Manifest.load(tmp_path / "2-1")
    assert manifest.extra is not None and all(one.startswith("model.visual.") for one in manifest.extra.tensors)
    assert not any("visual" in one for one in manifest.tensors(0))
    # The same weights, cut from a checkpoint of the text class, are the same shards.
    make_mixture(name, tmp_path / "text", stacked=stacked)
    shard_checkpoint(tmp_path / "text", tmp_path / "of-text", 2)
    assert Manifest.load(tmp_path / "of-text").tensors(1).keys() == manifest.tensors(1).keys()


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("qwen3_next", {"mtp__fc__weight": (64, 128), "mtp__layers__0__mlp__gate__weight": (6, 64)}),
        ("qwen3_5_moe_text", {"mtp__fc__weight": (64, 128), "mtp__layers__0__mlp__experts__down_proj": (6, 64, 23)}),
        ("glm4_moe", {"model__layers__3__eh_proj__weight": (64, 128), "model__layers__3__enorm__weight": (64,)}),
        ("deepseek_v3", {"model__layers__3__eh_proj__weight": (64, 128), "model__layers__3__hnorm__weight": (64,)}),
    ],
)
def test_layers_that_predict_more_tokens_are_left_out(
    tmp_path: Path, name: str, further: dict[str, tuple[int, ...]]
) -> None:
    make_mixture(name, tmp_path / "model")
    add(tmp_path / "model", **further)
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting()), (3, Cutting())])
    extra = Manifest.load(tmp_path / "2-1").extra
    assert extra is not None and set(extra.tensors) == {one.replace("__", ".") for one in further}


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.6.up_proj.weight"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_a_proj_with_mqa.bias"),
    ],
)
def test_a_tensor_too_many_of_a_kind_that_the_model_has(tmp_path: Path, name: str, further: str) -> None:
    make_mixture(name, tmp_path / "model", attention_bias=False)
    add(tmp_path / "model", **{further.replace(".", "__"): (8,)})
    with pytest.raises(CheckpointError, match=f"a tensor that this architecture does not use: {further};"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 2)


@pytest.mark.parametrize("name", MIXTURES)
def test_more_ranks_than_heads(tmp_path: Path, name: str) -> None:
    make_mixture(name, tmp_path / "model")
    with pytest.raises(PartitionError, match=r"7 does not fit .*; use --tp 1 to 6"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 7)


def test_key_heads_that_hold_their_value_heads_limit_the_ranks(tmp_path: Path) -> None:
    make_mixture("qwen3_next", tmp_path / "model", linear_num_key_heads=3, linear_num_value_heads=6)
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 3)
    with pytest.raises(PartitionError, match="4 does not fit gated delta net layers of 3 heads; use --tp 1 to 3"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 4, force=True)


@pytest.mark.parametrize(("values", "tp"), [(32, 32), (64, 32), (64, 16), (48, 24), (48, 5)])
def test_value_heads_beyond_the_key_heads(values: int, tp: int) -> None:
    """16 key heads, as all of Qwen3.5 have: more ranks share them, as they share KV heads."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "vocab_size": 64,
            "linear_num_value_heads": values,
        }
    )
    assert config.blueprint.max_tp == values
    plan = build_plan(config, tp)
    at = "model.layers.0.linear_attn"
    for rank in range(tp):
        shapes = {
            name: plan.shape(rank, f"{at}.{name}") for name in ("in_proj_qkv.weight", "in_proj_z.weight", "A_log")
        }
        held = shapes["A_log"][0]
        keys = (shapes["in_proj_qkv.weight"][0] - 128 * held) // 256
        assert shapes["in_proj_z.weight"] == (128 * held, 64)
        assert held == values // 16 * keys if tp <= 16 else keys == 1
        assert plan.shape(rank, f"{at}.conv1d.weight") == (256 * keys + 128 * held, 1, 4)
        assert plan.shape(rank, f"{at}.out_proj.weight") == (64, 128 * held)


CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


@pytest.mark.daily(5)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_released_models_have_the_tensors_of_transformers(path: Path) -> None:
    """By name and shape, of the class that transformers gives the full config, without memory for a weight."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = json.loads(path.read_text())
    raw.pop("quantization_config", None)
    config = ModelConfig.from_dict(raw)
    whole = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    made_by = AutoModelForImageTextToText if "vision_config" in raw else AutoModelForCausalLM
    with torch.device("meta"):
        model = made_by.from_config(whole)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert type(model).__name__ in raw["architectures"]
    for tp in {8, config.blueprint.max_tp}:
        plan = checked_source_plan(config, shapes, tp)
        assert plan.source_shapes.items() <= shapes.items()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_files_of_released_models_are_those_of_their_format(path: Path) -> None:
    raw = json.loads(path.read_text())
    if raw.get("quantization_config", {}).get("quant_method") == "mxfp4":
        raw.pop("quantization_config")
    plan = build_plan(ModelConfig.from_dict(raw), 2)
    quantised = [name for name in plan.source_shapes if name.endswith("_scale_inv")]
    assert bool(quantised) == ("quantization_config" in raw)
    assert not any("gate.weight_scale" in name or "in_proj_a" in name or "lm_head" in name for name in quantised)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_missing_field_is_what_transformers_makes_of_it(name: str) -> None:
    """The tensors that follow from an empty config are those of the class of that config."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = name.split("-")[0]
    given = {"head_dim": 128} if model_type == "glm4_moe" else {}  # 4096 is no multiple of its 96 heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**given))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    checked_source_plan(ModelConfig.from_dict({"model_type": model_type, **given}), shapes, 2)


@pytest.mark.parametrize("name", MIXTURES)
def test_planned_bytes_are_those_that_are_written(tmp_path: Path, name: str) -> None:
    make_mixture(name, tmp_path / "model")
    for tp in (1, 2, 5):
        report = shard_checkpoint(tmp_path / "model", tmp_path / f"{tp}", tp)
        planned = plan_model(read_metadata(str(tmp_path / "model")), Budget(), tp_size=tp)
        assert {rank.rank: rank.file_bytes for rank in planned.ranks} == report.bytes_per_rank


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 5}, "num_experts is 4 and num_local_experts, .* is 5"),
        ("qwen3_moe", {"num_experts_per_tok": 999}, "num_experts_per_tok is 999, but a whole number from 1 to 128"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, r"mlp_only_layers is \[\"a\"\], but a list of whole numbers"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 48}, "tpctl knows full and linear attention"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types has 1 kind for 48 layers"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval is 0"),
        ("qwen3_5_text", {"linear_num_value_heads": 33}, "linear_num_value_heads 33 is no multiple of .* 16"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is null"),
        ("deepseek_v3", {"n_routed_experts": True}, "n_routed_experts is true"),
        ("glm4_moe", {"head_dim": 128, "first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("gpt_oss", {"architectures": ["Other"]}, 'architecture "Other" .* tpctl runs GptOssForCausalLM'),
    ],
)
def test_wrong_fields_are_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TpctlError, match=said):
        ModelConfig.from_dict({"model_type": name, **changes})


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    one, other = (ModelConfig.from_dict({"model_type": name}) for name in ("kimi_k2", "deepseek_v3"))
    assert one.blueprint == other.blueprint
    make_mixture("deepseek_v3", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2"}))
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting()), (5, Cutting()), (4, Cutting(2))])


def test_published_kimi_k2_has_experts_of_four_bits_alone() -> None:
    """K2-Thinking: its routed experts are packed, all else is as DeepSeek's."""
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    left = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": four}},
        "ignore": left,
    }
    sizes = {"num_attention_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1}
    sizes |= {"num_key_value_heads": 64, "vocab_size": 163840, "num_nextn_predict_layers": 0, "topk_group": 1}
    config = ModelConfig.from_dict(
        {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], **sizes, "quantization_config": quantised}
    )
    plan = build_plan(config, 64)
    packed = {name.split(".", 3)[3] for name in plan.shards[0] if name.endswith("weight_packed")}
    assert packed == {"mlp.experts.w13_weight_packed", "mlp.experts.w2_weight_packed"}
    assert plan.shape(63, "model.layers.60.mlp.experts.w2_weight_packed") == (384, 7168, 4)  # one group of 32


@pytest.mark.parametrize("speculate", ["off", "ngram", "mtp", "auto"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe"])
def test_gated_delta_nets_run_anywhere(name: str, device: str, speculate: str) -> None:
    _check_run(ModelConfig.from_dict(make_config(name)), EngineSettings(device=device, speculate=speculate))


FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "weight_block_size": [16, 8],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", "linear_attn.in_proj_a", "linear_attn.in_proj_b", "shared_expert_gate"],
}


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2", "qwen3_5_moe", "qwen3_next", "glm4_moe", "qwen3_moe"])
def test_fp8_in_blocks(tmp_path: Path, name: str) -> None:
    """As these are published. Heads and inner sizes end inside of blocks, so that scales are on two ranks."""
    quantised = {**FP8, "modules_to_not_convert": [*FP8["modules_to_not_convert"], "linear_attn.in_proj_ba"]}
    ends = {"linear_key_head_dim": 8} if FAMILIES[name].defaults.get("linear_key_head_dim") else {}
    config = make_config(name, quantization_config=quantised, **ends)
    source = make_checkpoint(tmp_path / "model", config, files=2)
    held = CheckpointFolder.open(source).shapes
    assert any(one.endswith("_scale_inv") for one in held)
    assert not any(("in_proj_b" in one or "mlp.gate." in one) and "scale" in one for one in held)
    round_trip(source, tmp_path, [(tp, Cutting()) for tp in (1, 2, 3, 4)])
    round_trip(source, tmp_path / "even", [(2, Cutting(1, even=True)), (3, Cutting(1, even=True))])
    round_trip(source, tmp_path / "experts", [(2, Cutting(2)), (4, Cutting(2)), (3, Cutting(3))])
