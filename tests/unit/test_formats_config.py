"""Which linears a ``quantization_config`` means, held against the libraries that wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.packers import PACKERS
from tests.unit.quantised_model import check, quantise, read_shard
from tests.unit.synthetic import folder_bytes, make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.fields import Fields
from tpctl.arch.formats import read_scheme
from tpctl.arch.formats.skipped import Skipped
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held, build_plan, checked_source_plan
from tpctl.arch.storage import Storage
from tpctl.checkpoint.metadata import ModelMetadata, read_metadata
from tpctl.errors import CheckpointError
from tpctl.partition.split import source_shapes
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 1}
MIXTURE: dict[str, Any] = {**SIZES, "num_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
MODULES = [
    "lm_head",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.shared_expert.down_proj",
    "model.layers.1.mlp.shared_expert_gate",
    "model.layers.1.mlp.gate",
    "model.visual.blocks.3.mlp.fc1",
]
KEYS = [
    *MODULES,
    *("gate", "mlp.gate", "fc1", "visual", "model.visual", "model.layers.1", "model.layers.*", "self_attn", "mlp"),
    *(r"model\.layers\.(1|2)\..*gate", "model.layers.1.mlp.(gate|gate_proj)", "q", "", ".*", "model.layers.1."),
    *("a|model.layers.11", "experts", "model.layers.1.mlp.experts"),
]


@given(keys=st.lists(st.sampled_from(KEYS), max_size=4), module=st.sampled_from(MODULES))
def test_skipped_modules_are_those_of_transformers(keys: list[str], module: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert (module in Skipped(tuple(keys)).check("key")) is not should_convert_module(module, keys)


@given(keys=st.lists(st.sampled_from(KEYS), max_size=4), expert=st.integers(0, 20))
def test_experts_are_one_module_there(keys: list[str], expert: int) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    name = f"model.layers.1.mlp.experts.{expert}.up_proj"
    converts = should_convert_module(name, keys) and should_convert_module("model.layers.1.mlp.experts", keys)
    assert (name in Skipped(tuple(keys))) is not converts


TARGETS = ["Linear", "re:.*q_proj", "re:.*self_attn.*", "re:model.layers.1.*", "re:.*mlp.*", *MODULES[:4], "Conv1d"]


@settings(deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3), min_size=1, max_size=3),
    ignored=st.lists(st.sampled_from(["lm_head", "re:.*gate.*", "re:.*layers.11.*", MODULES[1]]), max_size=2),
    module=st.sampled_from(MODULES),
)
def test_targets_are_those_of_the_library(groups: list[list[str]], ignored: list[str], module: str) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    linear = torch.nn.Linear(1, 1)
    by_target = {target: number for number, targets in enumerate(groups) for target in targets}
    expected = None
    if match.is_match(module, linear, by_target, ignored):
        expected = by_target[match.match_targets(module, linear, by_target)[0]]
    config = {
        f"group_{number}": {"targets": targets, "weights": {"group_size": 8 * (number + 1), "num_bits": 4}}
        for number, targets in enumerate(groups)
    }
    whole = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": config}
    found = stored(module, **whole, ignore=ignored)
    assert (None if found is None else found.inp_unit // 8 - 1) == expected


def stored(*names: str, **config: Any) -> Storage | None:
    scheme = read_scheme(Fields({"quantization_config": config}))
    assert scheme is not None
    return scheme.storage(names)


def test_several_groups_each_in_its_own_format() -> None:
    config = {
        "format": "mixed-precision",
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {
                "targets": ["re:.*self_attn.*"],
                "format": "float-quantized",
                "weights": {"type": "float", "strategy": "channel"},
            },
            "b": {"targets": ["Linear"], "format": "pack-quantized", "weights": {"num_bits": 4, "group_size": 32}},
        },
    }
    plan = build_plan(ModelConfig.from_dict(make_config(**SIZES, quantization_config=config)), 2)
    assert plan.shape(0, "model.layers.0.self_attn.qkv_proj.weight_scale") == (64, 1)
    assert plan.shape(0, "model.layers.0.mlp.gate_up_proj.weight_packed") == (128, 8)
    assert plan.shape(1, "model.layers.0.mlp.gate_up_proj.weight_packed") == (64, 8)
    assert plan.shape(1, "model.layers.0.mlp.down_proj.weight_scale") == (64, 1)


CHANNEL, FLOAT = {"strategy": "channel"}, {"type": "float", "dynamic": True}
BLOCKS = {"type": "float", "strategy": "block", "block_structure": [128, 128]}


@pytest.mark.parametrize(
    "form,weights,inputs,rounds",
    [
        (
            "float-quantized",
            {"type": "float", "strategy": "channel"},
            {"num_bits": 8, "type": "float", "dynamic": True},
            True,
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "dynamic": True}, True),
        ("float-quantized", {"type": "float", "strategy": "channel"}, None, False),
        ("pack-quantized", {"num_bits": 4, "group_size": 32}, {"num_bits": 8, "dynamic": True}, False),
        # Of these, rounding as tpctl does it is finer than what is said, or the same.
        ("int-quantized", CHANNEL, {"dynamic": True, "strategy": "token", "symmetric": True}, True),
        ("int-quantized", {**CHANNEL, "num_bits": 4}, {"num_bits": 8, "dynamic": True, "strategy": "token"}, True),
        ("float-quantized", BLOCKS, {**FLOAT, "strategy": "group", "group_size": 128}, True),
        ("float-quantized", BLOCKS, {**FLOAT, "strategy": "token"}, True),
        # And of these coarser, or another: asymmetric, other numbers than the weights', groups within a token.
        ("int-quantized", CHANNEL, {"dynamic": True, "strategy": "token", "symmetric": False}, False),
        ("int-quantized", CHANNEL, {"num_bits": 16, "dynamic": True, "strategy": "token"}, False),
        ("int-quantized", CHANNEL, {**FLOAT, "strategy": "token"}, False),
        ("float-quantized", {"type": "float", **CHANNEL}, {"dynamic": True, "strategy": "token"}, False),
        ("float-quantized", {"type": "float", **CHANNEL}, {**FLOAT, "strategy": "group", "group_size": 128}, False),
        ("float-quantized", BLOCKS, {**FLOAT, "strategy": "group", "group_size": 64}, False),
    ],
)
def test_inputs_are_rounded_where_a_format_says_so(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, rounds: bool
) -> None:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    found = stored("model.x", quant_method="compressed-tensors", format=form, config_groups={"a": group})
    assert found is not None and found.coding is not None and found.coding.rounds == rounds


@pytest.mark.parametrize("block", [None, [128, 128]])
def test_fp8_rounds_inputs(block: list[int] | None) -> None:
    found = stored("model.x", quant_method="fp8", weight_block_size=block)
    assert found is not None and found.coding is not None and found.coding.rounds


@pytest.mark.parametrize("form", ["compression_config", "nested"])
def test_older_configs_of_compressed_tensors(form: str) -> None:
    inner = {"format": "int-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": {}}}}
    inner["config_groups"]["a"]["weights"] = {"num_bits": 8, "strategy": "channel"}
    config = {"compression_config": inner}
    if form == "nested":
        config = {"quantization_config": {"quant_method": "compressed-tensors", "quantization_config": inner}}
    plan = build_plan(ModelConfig.from_dict(make_config(**SIZES, **config)), 1)
    assert plan.shape(0, "model.layers.0.self_attn.o_proj.weight_scale") == (64, 1)


def test_gptq_rules_by_module() -> None:
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "dynamic": {"-:.*attn.*": {}, "+:.*down_proj": {"bits": 8, "group_size": 64}, "lm_head": {}},
    }
    assert stored("model.layers.0.self_attn.q_proj", **config) is None
    down, up = (stored(f"model.layers.0.mlp.{name}_proj", **config) for name in ("down", "up"))
    assert down is not None and up is not None
    assert (down.inp_word, down.inp_unit, up.inp_word, up.inp_unit) == (4, 64, 8, 32)
    only = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]}
    assert stored("model.layers.0.self_attn.q_proj", **only) is None
    assert stored("model.layers.0.mlp.up_proj", **only) is not None


@pytest.mark.parametrize("old", [False, True])
def test_modelopt_names_modules_and_patterns_of_a_shell(old: bool) -> None:
    left = ["lm_head", "model.layers.1.self_attn*", "*shared_expert*", "mlp.gate"]
    config: dict[str, Any] = {"quant_algo": "NVFP4", "exclude_modules" if old else "ignore": left}
    config = {"quant_method": "modelopt", **({"quantization": config} if old else config)}
    floats = {module for module in MODULES if stored(module, **config) is None}
    assert floats == {
        *("lm_head", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate"),
        *("model.layers.1.mlp.shared_expert.down_proj", "model.layers.1.mlp.shared_expert_gate"),
    }


def test_fp8_of_modelopt_has_the_tensors_that_vllm_names() -> None:
    found = stored("model.x", quant_method="modelopt", quant_algo="FP8")
    usual = stored("model.x", quant_method="fp8", activation_scheme="static")
    assert found is not None and usual is not None
    other = usual.others[0]
    assert [one.name for one in found] == [one.name for one in other] == ["weight", "weight_scale", "input_scale"]
    assert (found.coding, found.entries[:2]) == (other.coding, other.entries[:2])


def test_awq_lists_mean_what_is_inside_too() -> None:
    config = {"quant_method": "awq", "modules_to_not_convert": ["self_attn", "mlp.gate"]}
    assert stored("model.layers.0.self_attn.q_proj", **config) is None
    assert stored("model.layers.0.mlp.gate_proj", **config) is not None
    assert stored("model.layers.0.mlp.shared_expert_gate", **config) is None


@pytest.mark.parametrize("name", ["fp8", "awq", "ct int4"])
def test_modules_that_stay_floats(tmp_path: Path, name: str) -> None:
    packer = PACKERS[name]
    kept = {"fp8": "modules_to_not_convert", "awq": "modules_to_not_convert"}.get(name, "ignore")
    names = [f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"]
    model = quantise(make_config(**SIZES), replace(packer, config={**packer.config, kept: [*names, "lm_head"]}))
    source = model.save(tmp_path / "model")
    shard_checkpoint(source, tmp_path / "out", 2)
    assert read_shard(tmp_path / "out", 1)["model.layers.0.self_attn.qkv_proj.weight"].dtype is torch.bfloat16
    merge_shards(tmp_path / "out", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_experts_that_a_checkpoint_stacks_are_stored_as_those_that_it_does_not(tmp_path: Path) -> None:
    each = quantise(make_config("qwen3_moe", **MIXTURE), PACKERS["fp8 of other blocks"])
    shard_checkpoint(each.save(tmp_path / "each"), tmp_path / "out", 2)
    where, stacked = "model.layers.0.mlp.experts", quantise(make_config("qwen3_moe", **MIXTURE), each.packer)
    for suffix, end in ((".weight", ""), (".weight_scale_inv", "_scale_inv")):
        gate, up, down = (
            torch.stack([stacked.tensors.pop(f"{where}.{n}.{name}_proj{suffix}").float() for n in range(4)])
            for name in ("gate", "up", "down")
        )
        dtype = torch.float32 if end else torch.float8_e4m3fn
        stacked.tensors[f"{where}.gate_up_proj{end}"] = torch.cat([gate, up], 1).to(dtype)
        stacked.tensors[f"{where}.down_proj{end}"] = down.to(dtype)
    source = stacked.save(tmp_path / "stacked")
    shard_checkpoint(source, tmp_path / "again", 2)
    for rank in range(2):
        expected, found = read_shard(tmp_path / "out", rank), read_shard(tmp_path / "again", rank)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name].float(), found[name].float()) for name in expected)
    merge_shards(tmp_path / "again", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_shapes_of_packed_experts_belong_to_the_form_that_a_checkpoint_has() -> None:
    """Gemma 4's experts, which are stacked as floats, one by one."""
    changes = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "hidden_size_per_layer_input": 0}
    changes |= {**SIZES, "moe_intermediate_size": 64, "quantization_config": PACKERS["ct int4"].config}
    config = ModelConfig.from_dict(make_config("gemma4_text", **changes))
    held = as_held(config, {"model.layers.0.experts.0.gate_proj.weight_packed"})
    shapes = source_shapes(held.blueprint.splits())
    packed = [name for name in shapes if name.endswith("weight_packed")]
    assert "model.layers.0.experts.1.down_proj.weight_packed" in packed
    shapes |= {name.replace("weight_packed", "weight_shape"): (2,) for name in packed}
    assert checked_source_plan(config, shapes, 2).source_shapes.keys() < shapes.keys()


def test_other_names_are_found_in_any_form_of_experts_and_beside_the_layers() -> None:
    """Gemma 4 in FP8 as vLLM names its scales, which its config does not tell."""
    changes = {**SIZES, "enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 64}
    model = quantise(make_config("gemma4_text", **changes), PACKERS["fp8 of vllm"])
    assert "model.layers.0.experts.1.down_proj.weight_scale" in model.tensors
    assert "model.per_layer_model_projection.weight_scale" in model.tensors
    check(model, 2)


def test_scales_of_a_cache_are_kept_for_merge_alone(tmp_path: Path) -> None:
    model = quantise(make_config(**SIZES), PACKERS["ct fp8 by tensor"])
    model.config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    for name in ("k_scale", "v_scale"):
        model.tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(1)
    source = model.save(tmp_path / "model")
    shard_checkpoint(source, tmp_path / "out", 2)
    assert not [name for name in read_shard(tmp_path / "out", 0) if name.endswith(("k_scale", "v_scale"))]
    merge_shards(tmp_path / "out", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)


def test_scales_are_copied_where_heads_end_inside_a_block() -> None:
    config = make_config(**{**SIZES, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4})
    model = quantise(config, PACKERS["fp8"])
    plan = check(model, 4)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    assert [plan.shards[rank][scale].pieces[0].start for rank in range(4)] == [(0, 0), (0, 0), (0, 1), (0, 1)]
    assert plan.shape(0, scale) == (1, 1)


def test_zeros_and_scales_are_whole_where_inputs_are_reordered() -> None:
    model = quantise(make_config(**SIZES), PACKERS["gptq in order of activation"])
    plan = check(model, 3)
    down = "model.layers.0.mlp.down_proj"
    assert [plan.shape(rank, f"{down}.qweight") for rank in range(3)] == [(4, 64)] * 3
    assert [plan.shape(rank, f"{down}.scales") for rank in range(3)] == [(3, 64)] * 3
    assert [plan.shape(rank, f"{down}.bias") for rank in range(3)] == [(64,)] * 3


def test_a_cast_leaves_quantised_values_and_scales_as_they_are(tmp_path: Path) -> None:
    source = quantise(make_config(**SIZES), PACKERS["ct fp8 by channel"]).save(tmp_path / "model")
    shard_checkpoint(source, tmp_path / "out", 2, dtype="float16")
    found = {name.rpartition("layers.0.")[2]: one.dtype for name, one in read_shard(tmp_path / "out", 0).items()}
    assert found["self_attn.qkv_proj.weight"] is torch.float8_e4m3fn
    assert found["self_attn.qkv_proj.weight_scale"] is torch.float32
    assert found["input_layernorm.weight"] is torch.float16


@pytest.mark.parametrize("name", ["fp8 of vllm", "gptq in order of activation", "ct int4 with zeros"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_planner_counts_what_is_written(tmp_path: Path, name: str, family: str) -> None:
    source = quantise(make_config(family, **(SIZES if family == "llama" else MIXTURE)), PACKERS[name]).save(
        tmp_path / "model"
    )
    sizes = plan_model(read_metadata(str(source)), Budget()).sizes
    for size in sizes:
        shard_checkpoint(source, tmp_path / "out", size.tp_size, force=True)
        ranks = [read_shard(tmp_path / "out", rank).values() for rank in range(size.tp_size)]
        assert size.weight_bytes == max(sum(tensor.nbytes for tensor in tensors) for tensors in ranks)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "fp8"),
        ("qwen3_moe", "ct int4 with zeros"),
        ("qwen3_moe", "gptq of 8 bits"),
        ("llama", "awq"),
        ("gemma4_text", "ct nvfp4"),
    ],
)
def test_parameters_are_weights_whatever_they_are_stored_as(tmp_path: Path, family: str, name: str) -> None:
    """Of what is shown as of what is planned: no scales, and all of the values that a word packs."""
    config = make_config(family, **(MIXTURE if family == "qwen3_moe" else SIZES))
    source = quantise(config, PACKERS[name]).save(tmp_path / "model")
    packed, whole = read_metadata(str(source)), plan_model(config_alone(tmp_path / "floats", config), Budget())
    planned = plan_model(packed, Budget(), tp_size=2)
    assert planned.parameters == whole.parameters
    shard_checkpoint(source, tmp_path / "out", 2)
    found = {rank.rank: rank.parameters for rank in inspect_shards(tmp_path / "out").ranks}
    assert found == {rank.rank: rank.parameters for rank in planned.ranks}


def config_alone(folder: Path, config: dict[str, Any]) -> ModelMetadata:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return read_metadata(str(folder))


@pytest.mark.parametrize(
    "given", [{"bits": 4, "group_size": 128}, {"format": "pack-quantized"}, {"quant_method": None}]
)
def test_a_quantization_config_without_a_method_is_refused_plainly(given: dict[str, Any]) -> None:
    said = (
        r"^config\.json: quantization_config has no quant_method, which says how the weights are stored; add the right "
        r"one of awq, compressed-tensors, fp8, gptq, modelopt, modelopt_fp4, mxfp4, or use the unquantised original$"
    )
    with pytest.raises(CheckpointError, match=said):
        ModelConfig.from_dict(make_config(quantization_config=given))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("cutting", [Cutting(), Cutting(even=True)], ids=["blocks", "even"])
def test_weights_with_one_scale_are_cut_evenly_though_the_config_could_mean_blocks(
    tmp_path: Path, family: str, cutting: Cutting
) -> None:
    sizes = {**MIXTURE, "moe_intermediate_size": 200} if family == "qwen3_moe" else {**SIZES, "intermediate_size": 200}
    model = quantise(make_config(family, **sizes), PACKERS["fp8 of vllm"])
    source, name = model.save(tmp_path / "model"), {"llama": "down_proj", "qwen3_moe": "experts.w2_"}[family]
    plan = check(model, 2, cutting)
    widths = [plan.shards[rank][found].shape[-1] for rank in range(2) for found in plan.shards[rank] if name in found]
    assert {width for width in widths if width > 4} == {100}
    planned = plan_model(read_metadata(str(source)), Budget(), tp_size=2, cutting=lambda tp: cutting)
    assert planned.checks[1].verdict == "even"
    written = shard_checkpoint(source, tmp_path / "out", 2, cutting=cutting)
    assert {rank.rank: rank.file_bytes for rank in planned.ranks} == written.bytes_per_rank
    if family == "qwen3_moe":
        check(model, 4, replace(cutting, expert_parallel=2))


def test_blocks_that_only_the_tensors_tell_are_planned_as_they_are_cut(tmp_path: Path) -> None:
    """With a border inside of a block, where that is asked for."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    made = quantise(make_config(**{**SIZES, "intermediate_size": 384}), replace(PACKERS["fp8"], config=config))
    source, even = made.save(tmp_path / "model"), Cutting(even=True)
    plan = check(made, 2, even)
    assert [plan.shape(rank, "model.layers.0.mlp.down_proj.weight") for rank in range(2)] == [(64, 192)] * 2
    planned = plan_model(read_metadata(str(source)), Budget(), tp_size=2, cutting=lambda tp: even)
    written = shard_checkpoint(source, tmp_path / "out", 2, cutting=even)
    assert {rank.rank: rank.file_bytes for rank in planned.ranks} == written.bytes_per_rank
