"""Gemma 4, Ministral 3, and models that see: names, shapes, bytes and what a config may not say."""

from __future__ import annotations

import json
import os
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_dense import ALONE, SEEING, make_either
from tests.unit.synthetic import folder_bytes
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan, checked_source_plan, towers
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.metadata import read_metadata
from tpctl.errors import CheckpointError, TpctlError, UnsupportedModelError
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint

ALL = [*ALONE, *SEEING]
TOWERS = ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio", "vision_embedder")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name, each made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp(name) / "model"
            make_either(name, folder)
            self[name] = folder
            return folder

    return Made()


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_has_the_names_and_shapes_of_its_plan(name: str, checkpoints: dict[str, Path]) -> None:
    config, held = ModelConfig.load(checkpoints[name]), CheckpointFolder.open(checkpoints[name]).shapes
    plan = checked_source_plan(config, held, 1)
    assert {one: held[one] for one in plan.source_shapes} == plan.source_shapes
    rest = held.keys() - plan.source_shapes.keys()
    assert rest == set(towers(config, held)) == {one for one in held if any(tower in one for tower in TOWERS)}
    assert bool(rest) == (name in SEEING)


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ALL)
def test_merge_and_reshard_are_exact_at_every_size(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    source, seen = checkpoints[name], name in SEEING
    raw = json.loads((source / "config.json").read_text())
    most = raw.get("text_config", raw)["num_attention_heads"]
    sizes = sorted({1, 2, *range(3 + ALL.index(name) % 2, most, 2), most})  # with another's, all
    for tp in sizes:
        shard_checkpoint(source, tmp_path / f"{tp}", tp, text_only=seen)
        merge_shards(tmp_path / f"{tp}", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(source), tp
    for tp, other in zip(sizes, sizes[1:] + sizes[:1], strict=True):
        reshard(tmp_path / f"{tp}", tmp_path / "other", other, force=True)
        assert folder_bytes(tmp_path / "other") == folder_bytes(tmp_path / f"{other}"), (tp, other)
    with pytest.raises(TpctlError, match=f"{most + 1}.*{most}"):
        shard_checkpoint(source, tmp_path / "more", most + 1, text_only=seen)


@pytest.mark.parametrize("name", SEEING)
def test_what_sees_has_to_be_left_out_by_word(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cut the text model with --text-only"):
        shard_checkpoint(checkpoints[name], tmp_path / "out", 2)


@pytest.mark.parametrize("name", ALL)
def test_planned_bytes_are_what_sharding_writes(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints[name]
    for tp in (1, 3, 8):
        written = shard_checkpoint(source, tmp_path / f"{tp}", tp, text_only=name in SEEING)
        report = plan_model(read_metadata(str(source)), Budget(), tp_size=tp)
        assert {rank.rank: rank.file_bytes for rank in report.ranks} == written.bytes_per_rank


def test_what_attention_has_beside_runs_on_gpus(checkpoints: dict[str, Path]) -> None:
    for name in ALONE:
        ModelConfig.load(checkpoints[name]).blueprint.check_runs("cuda")


FIELDS = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "tie_word_embeddings", "attention_bias", "mlp_bias", "layer_types", "attention_k_eq_v"),
    *("num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
    *("enable_moe_block", "per_layer_config", "rms_norm_eps", "layer_norm_eps", "sliding_window", "rope_parameters"),
]


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("key", ["", *FIELDS])
def test_a_missing_field_is_what_transformers_takes_it_for(name: str, key: str, checkpoints: dict[str, Path]) -> None:
    """The tensors of a config without one of its fields are those that transformers makes of it."""
    raw = json.loads((checkpoints[name] / "config.json").read_text())
    if key and key not in raw:
        return
    raw.pop(key, None)
    try:
        expected = _by_transformers(raw)
    except Exception:  # of fields that tpctl does not need, such as a window
        return
    try:
        config = ModelConfig.from_dict(raw)
    except TpctlError as error:
        assert "is no multiple of num_attention_heads" in str(error)  # transformers rounds down
        return
    assert dict(build_plan(config, 1).source_shapes) == expected


@pytest.mark.parametrize(
    "kind",
    sorted(
        kind
        for kind, family in FAMILIES.items()
        if kind
        in {
            "cohere2",
            "gemma2",
            "gemma4_text",
            "gemma4_unified_text",
            "glm4",
            "granite",
            "ministral3",
            "olmo2",
            "olmo3",
            "seed_oss",
            "smollm3",
        }
    ),
)
def test_a_config_of_its_type_alone(kind: str) -> None:
    raw = {"model_type": kind, "num_hidden_layers": 6}
    assert dict(build_plan(ModelConfig.from_dict(raw), 1).source_shapes) == _by_transformers(raw)
    eos, bos = ModelConfig.from_dict(raw).eos_token_ids, ModelConfig.from_dict(raw).bos_token_id
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert (list(eos), bos, ModelConfig.from_dict(raw).max_position_embeddings) == (
        ends,
        config.bos_token_id,
        config.max_position_embeddings,
    )


def _by_transformers(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a config as transformers makes the model, without their values."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[raw["model_type"]](**{key: deepcopy(raw[key]) for key in raw if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(one.shape) for name, one in model.state_dict().items() if name not in tied}


def test_keys_and_values_that_nobody_reads_come_back(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Published E2B files hold them for the layers that read those of others."""
    from safetensors.torch import load_file, save_file

    for name in ("gemma4-text-edge", "gemma4-edge"):
        source = tmp_path / name
        shutil.copytree(checkpoints[name], source)
        weights = load_file(source / "model.safetensors")
        root = "model." if name in ALONE else "model.language_model."
        layer = f"{root}layers.{{}}.self_attn."
        assert not any(one.startswith(layer.format(4) + "k") for one in weights)
        for number in (3, 4, 5):
            for own in ("k_proj", "v_proj", "k_norm"):
                weights[f"{layer.format(number)}{own}.weight"] = torch.randn(3, 5)
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        shard_checkpoint(source, tmp_path / f"{name}-2", 2, text_only=True)
        merge_shards(tmp_path / f"{name}-2", tmp_path / f"{name}-merged")
        assert folder_bytes(tmp_path / f"{name}-merged") == folder_bytes(source)
        weights[f"{layer.format(2)}v_norm.weight"] = torch.randn(3)
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"does not use: .*layers\.2\.self_attn\.v_norm"):
            shard_checkpoint(source, tmp_path / "no", 2, text_only=True)


def test_layers_that_read_the_keys_of_others_are_not_recurrent(checkpoints: dict[str, Path]) -> None:
    report = plan_model(read_metadata(str(checkpoints["gemma4-text-edge"])), Budget())
    assert report.recurrent == 0
    assert not any(one.rule == "key heads" for check in report.checks for one in (*check.vllm, *check.sglang))


def test_experts_apart_are_cut_as_stacked_ones(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As quantised files of Gemma 4 have them; and dealt to groups of ranks."""
    from safetensors.torch import load_file, save_file

    stacked, apart = checkpoints["gemma4-text-moe"], tmp_path / "apart"
    shutil.copytree(stacked, apart)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(stacked / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = weight
            continue
        inside, kind = name.rsplit(".", 1)
        for expert, own in enumerate(weight):
            labels = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for label, rows in zip(labels, own.chunk(len(labels)), strict=True):
                weights[f"{inside}.{expert}.{label}.weight"] = rows.contiguous()
    save_file(weights, apart / "model.safetensors", {"format": "pt"})
    for tp, groups in ((3, 1), (4, 2), (8, 4), (5, 5)):
        for source in (stacked, apart):
            shard_checkpoint(source, tmp_path / f"{source.name}-{tp}", tp, cutting=Cutting(groups))
            merge_shards(tmp_path / f"{source.name}-{tp}", tmp_path / "merged", force=True)
            assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
        one, other = (folder_bytes(tmp_path / f"{source.name}-{tp}") for source in (stacked, apart))
        assert {name: one[name] for name in one if "rank" in name} == {
            name: other[name] for name in other if "rank" in name
        }


def test_a_format_reaches_what_stands_beside_the_embedding(checkpoints: dict[str, Path]) -> None:
    raw = json.loads((checkpoints["gemma4-text-edge"] / "config.json").read_text())
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    names = set(build_plan(ModelConfig.from_dict({**raw, "quantization_config": scheme}), 2).source_shapes)
    assert "model.per_layer_model_projection.weight_scale_inv" in names
    assert "model.layers.0.per_layer_input_gate.weight_scale_inv" in names
    assert not any(name.startswith("model.embed_tokens") and "scale" in name for name in names)


def test_published_fields_of_gemma_4_say_what_transformers_writes(checkpoints: dict[str, Path]) -> None:
    raw = json.loads((checkpoints["gemma4-text-moe"] / "config.json").read_text())
    written = ModelConfig.from_dict(raw)
    del raw["per_layer_config"]
    published = ModelConfig.from_dict({**raw, "global_head_dim": 16, "num_global_key_value_heads": 2})
    assert published.blueprint == written.blueprint
    other = ModelConfig.from_dict({**raw, "global_head_dim": 16, "attention_k_eq_v": False})
    assert [layer.mixer.num_kv_heads for layer in written.blueprint.layers] == [4, 2, 4, 2]
    assert [layer.mixer.num_kv_heads for layer in other.blueprint.layers] == [4] * 4


def test_the_outer_config_says_whether_the_head_is_tied(checkpoints: dict[str, Path]) -> None:
    raw = json.loads((checkpoints["mistral3"] / "config.json").read_text())
    assert raw["tie_word_embeddings"] and not raw["text_config"]["tie_word_embeddings"]
    assert ModelConfig.from_dict(raw).blueprint.tied
    del raw["tie_word_embeddings"]
    assert not ModelConfig.from_dict(raw).blueprint.tied


def test_names_of_transformers_5_are_known_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("gemma3", "mistral3-untied"):
        source = tmp_path / name
        shutil.copytree(checkpoints[name], source)
        weights = {
            re.sub(r"^(?:language_model\.(lm_head)|(language_model)\.model|(?=vision|multi))", _renamed, one): weight
            for one, weight in load_file(source / "model.safetensors").items()
        }
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        shard_checkpoint(source, tmp_path / f"{name}-3", 3, text_only=True)
        merge_shards(tmp_path / f"{name}-3", tmp_path / f"{name}-merged")
        assert folder_bytes(tmp_path / f"{name}-merged") == folder_bytes(source)


def _renamed(found: re.Match[str]) -> str:
    return found[1] or f"model.{found[2] or ''}"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ministral3", {"vocab_size": 0}, "vocab_size is 0, but a whole number"),
        ("gemma4-text", {"hidden_activation": "relu"}, 'activation "relu" is not supported'),
        ("gemma4-text", {"layer_types": ["chunked_attention"] * 4}, 'layer type "chunked_attention" is not supported'),
        ("gemma4-text", {"layer_types": ["full_attention"]}, "layer_types has 1 kind for 4 layers"),
        ("gemma4-text", {"per_layer_config": {"4": {"head_dim": 8}}}, 'per_layer_config has "4", but the layers are 0'),
        ("gemma4-text", {"per_layer_config": {"1": {"rope": 8}}}, 'per_layer_config of layer 1 has "rope"'),
        ("gemma4-text", {"per_layer_config": {"1": {"head_dim": "8"}}}, 'head_dim is "8", but a whole number'),
        ("gemma4-text", {"per_layer_config": 3}, "per_layer_config is 3, but an object"),
        ("gemma4-text", {"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4, but the 0 layers before those"),
        ("gemma4-text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3, but the 1 layers before those"),
        ("gemma4-text", {"enable_moe_block": True}, "num_experts is null, but a whole number"),
        ("gemma4-text-moe", {"top_k_experts": 9}, "top_k_experts is 9, but a whole number from 1 to 5"),
        ("gemma4-text-edge", {"vocab_size_per_layer_input": -1}, "vocab_size_per_layer_input is -1, but"),
        ("gemma4-text-edge", {"use_double_wide_mlp": None}, "use_double_wide_mlp is null, but true or false"),
        ("mistral3", {"text_config": []}, r"text_config is \[\], but an object is needed"),
        ("mistral3", {"text_config": {"model_type": "llama"}}, 'model_type "llama" of text_config is not supported'),
        ("gemma3", {"text_config": {"model_type": "gemma2"}}, 'model_type "gemma2" of text_config is not supported'),
        (
            "gemma3",
            {"text_config": {"final_logit_softcapping": 30.0}},
            "final_logit_softcapping is 30.0, which",
        ),
        ("gemma4-moe", {"architectures": ["Gemma4ForCausalLM"]}, "tpctl runs Gemma4ForConditionalGeneration"),
    ],
)
def test_wrong_fields_are_named(name: str, changes: dict[str, Any], said: str, checkpoints: dict[str, Path]) -> None:
    raw = json.loads((checkpoints[name] / "config.json").read_text())
    with pytest.raises(TpctlError, match=said):
        ModelConfig.from_dict({**raw, **changes})
