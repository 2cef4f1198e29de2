"""Quantised checkpoints that are damaged, old or unknown: one line each; and flipped bits, found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.packers import PACKERS
from tests.unit.quantised_model import Quantised, quantise
from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.safetensors import read_header
from tpctl.distributed import TPGroup
from tpctl.engine.runners.loading import load
from tpctl.errors import PartitionError, ShardFolderError, TpctlError, UnsupportedModelError
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards
from tpctl.wire.settings import EngineConfig

Q = "model.layers.0.self_attn.q_proj"
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 1}
MIXTURE: dict[str, Any] = {**SIZES, "num_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2}


def model(packer: str) -> Quantised:
    return quantise(make_config(**SIZES), PACKERS[packer])


def removed(suffix: str) -> Callable[[Quantised], object]:
    return lambda made: made.tensors.pop(Q + suffix)


def put(suffix: str, tensor: torch.Tensor, at: str = Q) -> Callable[[Quantised], object]:
    return lambda made: made.tensors.__setitem__(at + suffix, tensor)


def told(**changes: Any) -> Callable[[Quantised], object]:
    return lambda made: made.config.update(quantization_config={**made.packer.config, **changes})


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}}

DAMAGED: list[tuple[str, Callable[[Quantised], object], str]] = [
    ("fp8", removed(".weight_scale_inv"), rf"has no tensor {Q}\.weight_scale_inv \(1 x 1 expected"),
    ("fp8 of other blocks", put(".weight_scale_inv", torch.ones(4, 7)), r"is 4 x 7 in the checkpoint but 4 x 8 by"),
    ("fp8 of other blocks", told(weight_block_size=[32, 8]), r"weight_scale_inv is 4 x 8 in the checkpoint but 2 x 8"),
    ("fp8", put(".weight_scale_inv", torch.ones(1, 1).int()), r"is I32, but its format has F32 or BF16 or F16 or F8_E"),
    ("fp8", put(".weight", torch.ones(64, 64).bfloat16()), rf"{Q}\.weight is BF16, but its format has F8_E4M3"),
    ("fp8", lambda made: made.config.pop("quantization_config"), r"is quantised \(FP8 in blocks: .* has no quantizati"),
    ("fp8", put(".weight_scale_inv", torch.ones(1, 1), "lm_head"), r"holds lm_head\.weight_scale_inv .*\(as lm_head\)"),
    ("fp8 of vllm", removed(".input_scale"), rf"has no tensor {Q}\.input_scale \(1 expected"),
    ("fp8 by tensor", removed(".weight_scale_inv"), rf"has no tensor {Q}\.weight_scale_inv"),
    ("awq", removed(".scales"), rf"has no tensor {Q}\.scales \(2 x 64 expected"),
    ("awq", told(group_size=64), r"q_proj\.qzeros is 2 x 8 in the checkpoint but 1 x 8 by config\.json"),
    ("awq", put(".qzeros", torch.ones(2, 4).int()), r"q_proj\.qzeros is 2 x 4 in the checkpoint but 2 x 8"),
    ("gptq", removed(".g_idx"), rf"has no tensor {Q}\.g_idx \(64 expected"),
    (
        "gptq",
        put(".g_idx", torch.arange(64).flip(0).int() // 32),
        rf"{Q}\.g_idx has input 0 in group 1, but in groups of 32 .* desc_act false .* it is in group 0",
    ),
    (
        "gptq by channel",
        put(".g_idx", torch.arange(64).int() // 32),
        r"g_idx has input 32 in group 1, but in one group",
    ),
    (
        "gptq in order of activation",
        put(".g_idx", torch.arange(64).int() // 16),
        rf"{Q}\.g_idx puts input 32 into group 2, but by config\.json there are groups 0 to 1; the checkpoint is dam",
    ),
    (
        "ct int4 in order of activation",
        put(".weight_g_idx", torch.arange(64).int() // 32 - 1),
        rf"{Q}\.weight_g_idx puts input 0 into group -1",
    ),
    ("gptq", told(bits=8), r"q_proj\.qweight is 8 x 64 in the checkpoint but 16 x 64"),
    ("gptq", told(group_size=-1), r"q_proj\.qzeros is 2 x 8 in the checkpoint but 1 x 8"),
    ("ct int4", removed(".weight_scale"), rf"has no tensor {Q}\.weight_scale \(64 x 2 expected"),
    (
        "ct int4",
        put(".weight_shape", torch.tensor([64, 65])),
        rf"{Q}\.weight_shape says that the weight is 64 x 65, but",
    ),
    ("ct int4", put(".weight_shape", torch.tensor([64])), rf"{Q}\.weight_shape is I64 \[1\], but holds a shape"),
    ("ct int4", told(config_groups={"a": GROUP}), r"weight_scale is 64 x 2 in the checkpoint but 64 x 1 by config"),
    ("ct int4 with zeros", removed(".weight_zero_point"), rf"has no tensor {Q}\.weight_zero_point \(8 x 2 expected"),
    (
        "ct int4",
        put(".weight_zero_point", torch.ones(8, 2).int()),
        r"q_proj\.weight_zero_point .* it has no such tensor",
    ),
    ("ct nvfp4", removed(".weight_global_scale"), rf"has no tensor {Q}\.weight_global_scale \(1 expected"),
    ("modelopt nvfp4", removed(".weight_scale_2"), rf"has no tensor {Q}\.weight_scale_2 \(1 expected"),
    (
        "modelopt nvfp4",
        told(ignore=["*q_proj"]),
        "stored as one, but .*q_proj is a float, .*k_proj is ModelOpt's NVFP4",
    ),
    ("ct int8 by channel", put(".weight", torch.ones(64, 64).byte()), r"q_proj\.weight is U8, but its format has I8"),
]


@pytest.mark.parametrize(("packer", "damage", "message"), DAMAGED)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, packer: str, damage: Callable[[Quantised], object], message: str
) -> None:
    made = model(packer)
    damage(made)
    with pytest.raises(TpctlError, match=message) as caught:
        shard_checkpoint(made.save(tmp_path / "model"), tmp_path / "out", 2)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


OUT = "model.layers.0.self_attn.o_proj"
UNSCALED = [("fp8", f"{OUT}.weight"), ("fp8", "lm_head.weight"), ("ct fp8 by channel", "model.embed_tokens.weight")]


@pytest.mark.parametrize(("packer", "name"), UNSCALED)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_codes_without_a_scale_are_refused_by_name(
    tmp_path: Path, packer: str, name: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(packer)
    if name.startswith(OUT):
        told(modules_to_not_convert=[OUT])(made)
        del made.tensors[f"{OUT}.weight_scale_inv"]
    made.tensors[name] = made.tensors[name].to(torch.float8_e4m3fn)
    source, out = made.save(tmp_path / "model"), tmp_path / "out"
    said = rf"^{name} is F8_E4M3 without a scale beside it, and by the quantization_config of config\.json it is not"
    with pytest.raises(UnsupportedModelError, match=said):
        shard_checkpoint(source, out, 2, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=said):
        plan_model(read_metadata(str(source)), Budget(), dtype=dtype or "auto")
    assert not out.exists()
    if dtype is None:  # a folder that was cut before they were refused
        monkeypatch.setattr("tpctl.sharding.cutting.shard.check_scaled", lambda *given: None)
        shard_checkpoint(source, out, 1)
        with pytest.raises(UnsupportedModelError, match=said):
            load(EngineConfig(out, 1, out), TPGroup())


def group(kind: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    return {"format": kind, "config_groups": {"g": {"targets": ["Linear"], "weights": args}}}


def inputs(**changes: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, **changes}
    weights = {"num_bits": 8, "strategy": "channel"}
    targets = {"targets": ["Linear"], "weights": weights, "input_activations": args}
    return {"format": "int-quantized", "config_groups": {"g": targets}}


UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    ("compressed-tensors", group("marlin-24"), '"g" is in the format "marlin-24" of compressed-tensors, tpctl knows'),
    ("compressed-tensors", group("sparse-24-bitmask"), "sparse-24-bitmask"),
    ("compressed-tensors", group("mixed-precision"), '"mixed-precision"'),
    ("compressed-tensors", group("mxfp8-quantized"), '"mxfp8-quantized"'),
    (
        "compressed-tensors",
        group("mxfp4-pack-quantized"),
        'weights of "g" are INT4 in groups of 32 in the format mxfp4',
    ),
    ("compressed-tensors", group("dense"), '"dense"'),
    ("compressed-tensors", group(num_bits=3), 'weights of "g" are INT3 in groups of 32 in the format pack-quantized'),
    ("compressed-tensors", group(type="float"), 'weights of "g" are FP4 in groups of 32 in the format pack-quantized'),
    ("compressed-tensors", group(type="complex"), '4 bits of "complex"'),
    ("compressed-tensors", group(strategy="token"), 'scaled by "token", tpctl knows tensor, channel, group'),
    ("compressed-tensors", group(actorder="sideways"), 'actorder of "g" is "sideways"'),
    ("compressed-tensors", group(group_size=0), "group_size is 0, but a whole number"),
    (
        "compressed-tensors",
        group("nvfp4-pack-quantized", type="float"),
        'weights of "g" are FP4 in groups of 32 in the f',
    ),
    ("compressed-tensors", group("int-quantized", strategy="block", block_structure=[8]), 'block_structure of "g" is'),
    ("compressed-tensors", {**group(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("compressed-tensors", {**group(), "transform_config": {"config_groups": {"r": {}}}}, "transform_config"),
    (
        "compressed-tensors",
        {**group(), "moe_sparsity_config": {"method": "prune", "num_experts": [None, 129]}},
        'compressed with moe_sparsity_config "prune", which tpctl does not know',
    ),
    ("compressed-tensors", inputs(strategy="channel"), 'inputs of "g" are 8 bits of "int", scaled by "channel"; tpctl'),
    ("compressed-tensors", inputs(type="complex"), 'inputs of "g" are 8 bits of "complex", scaled by "token"'),
    ("compressed-tensors", inputs(num_bits="8"), 'inputs of "g" are "8" bits of "int"'),
    ("compressed-tensors", inputs(dynamic="always"), 'dynamic of "g" is "always", tpctl knows true, false and "local"'),
    ("compressed-tensors", {**group(), "ignore": ["re:(["]}, r'"re:\(\[" is no pattern'),
    ("compressed-tensors", {"format": "pack-quantized"}, "have no config_groups"),
    ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, r'config_groups has \["Linear"\] for "W4A16"'),
    ("awq", {"bits": 3}, "AWQ of 3 bits, tpctl knows 4"),
    ("awq", {"version": "gemv"}, 'AWQ of version "gemv", tpctl knows gemm'),
    ("awq", {"zero_point": False}, "AWQ without zero points"),
    ("awq", {"group_size": 0}, "group_size is 0"),
    ("gptq", {"bits": 2}, "GPTQ of 2 bits, tpctl knows 4 and 8"),
    ("gptq", {"bits": 3}, "GPTQ of 3 bits"),
    ("gptq", {}, "bits is null"),
    ("gptq", {"bits": 4, "lm_head": True}, "GPTQ has quantised lm_head"),
    ("gptq", {"bits": 4, "rotation": "hadamard"}, 'have rotation "hadamard", which turns inputs, too; use a checkp'),
    ("gptq", {"bits": 4, "adapter": {"name": "lora"}}, "have adapter .*, which tpctl does not apply; use a checkpoint"),
    ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, 'GPTQ in the format "marlin"'),
    ("gptq", {"bits": 4, "dynamic": {"+:.*q_proj": {"bits": 3}}}, "GPTQ of 3 bits"),
    ("gptq", {"bits": 4, "dynamic": {"-:(": {}}}, r'dynamic has "-:\(", which is no pattern'),
    (
        "gptq",
        {"bits": 4, "dynamic": {"-:.*q_proj": {}}},
        "stored as one, but .*q_proj is a float, .*k_proj is GPTQ of 4",
    ),
    ("fp8", {"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    ("fp8", {"activation_scheme": "sometimes"}, '"sometimes", tpctl knows dynamic and static'),
    ("fp8", {"scale_fmt": "ue4m0"}, 'scale_fmt of the quantised weights is "ue4m0"'),
    ("fp8", {"fmt": "e5m2"}, 'fmt of the quantised weights is "e5m2", tpctl knows e4m3 and float8_e4m3fn'),
    ("fp8", {"fmt": "float8_e5m2"}, 'fmt of the quantised weights is "float8_e5m2"'),
    ("fp8", {"expert_dtype": "fp4"}, 'expert_dtype of the quantised weights is "fp4", tpctl knows fp8'),
    ("fp8", {"modules_to_convert": ["embed_tokens"]}, 'modules_to_convert names "embed_tokens"'),
    ("fp8", {"modules_to_not_convert": ["(("]}, r'modules_to_not_convert has "\(\(", which is no pattern'),
    (
        "modelopt",
        {"quant_algo": "FP8_PB_WO"},
        r"quant_algo of ModelOpt's weights is \"FP8_PB_WO\", tpctl knows NVFP4",
    ),
    ("modelopt", {}, r"quant_algo of ModelOpt's weights is null, tpctl knows NVFP4, W4A16_NVFP4, FP8; use"),
    (
        "modelopt",
        {"quant_algo": "NVFP4", "group_size": 32},
        "NVFP4 weights are in groups of 32, tpctl knows groups of 16",
    ),
    (
        "modelopt_fp4",
        {"quant_algo": "nvfp4", "config_groups": {"a": {"weights": {"group_size": 32}}}},
        "NVFP4 weights are in groups of 32, tpctl knows groups of 16",
    ),
    ("modelopt", {"quant_algo": "NVFP4", "ignore": "lm_head"}, "ignore is .*lm_head.*, but a list of names"),
    ("modelopt_mixed", {"quant_algo": "MIXED_PRECISION"}, "by NVIDIA's ModelOpt; use the model as compressed-tensors"),
    ("bitsandbytes", {"load_in_4bit": True}, "made while a model is loaded; shard its unquantised original"),
    ("hqq", {}, "made while a model is loaded"),
    ("fbgemm_fp8", {}, "by FBGEMM; use the model as compressed-tensors"),
    ("quark", {}, "by AMD's Quark"),
    ("torchao", {}, "by torchao"),
    ("auto-round", {}, "export it as auto_gptq, auto_awq"),
    ("aqlm", {}, "in codebooks"),
    ("mxfp4", {}, "MXFP4, which tpctl knows of stacked experts alone, as gpt_oss has them"),
    (
        "my-own",
        {},
        r'\("my-own"\), .*tpctl knows awq, compressed-tensors, fp8, gptq, modelopt, modelopt_fp4, mxfp4',
    ),
]


@pytest.mark.parametrize(("method", "fields", "message"), UNKNOWN)
def test_what_is_not_known_is_refused_by_name(method: str, fields: dict[str, Any], message: str) -> None:
    config = make_config(quantization_config={"quant_method": method, **fields})
    with pytest.raises(TpctlError, match=message) as caught:
        ModelConfig.from_dict(config)
    assert "\n" not in str(caught.value)


def test_a_border_inside_of_a_word_is_refused_with_the_sizes_that_fit() -> None:
    config = make_config(**{**SIZES, "head_dim": 6, "hidden_size": 24, "num_attention_heads": 8})
    config["quantization_config"] = {"quant_method": "awq", "group_size": 8}
    message = (
        r"qkv_proj\.qweight: at tp 8 a border would fall on element 6, inside of a word that packs 8 values; use --tp "
    )
    with pytest.raises(PartitionError, match=f"{message}1$"):
        build_plan(ModelConfig.from_dict(config), 8)
    config["num_key_value_heads"] = 1
    with pytest.raises(PartitionError, match=f"{message}1, 2$"):
        build_plan(ModelConfig.from_dict(config), 8)


@pytest.mark.parametrize(
    ("packer", "said"),
    [
        ("awq", r"qkv_proj\.qweight packs 8 features in a word, but v begins at feature 84, inside of one; such fused"),
        ("gptq", r"qkv_proj\.qzeros packs 8 features in a word, but v begins at feature 84, inside of one; such fused"),
        ("ct int4 with zeros", r"qkv_proj\.weight_zero_point packs 8 features in a word, but v begins at feature 84"),
    ],
)
def test_a_part_that_begins_inside_of_a_word_is_refused(packer: str, said: str) -> None:
    sizes = {"hidden_size": 64, "head_dim": 14, "intermediate_size": 96, "num_hidden_layers": 1}
    config = make_config("phi3", **sizes, quantization_config=PACKERS[packer].config)
    with pytest.raises(UnsupportedModelError, match=said):
        build_plan(ModelConfig.from_dict(config), 1)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=3)
    | st.just("re:(")
    | st.sampled_from(["group", "tensor", "int", "static", "dynamic", "nvfp4-pack-quantized", "Linear", "128x128"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
MORE = (
    "ignored_layers",
    "dynamic",
    "modules_in_block_to_quantize",
    "lm_head",
    "scale_fmt",
    "kv_cache_scheme",
    "version",
)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields in an object."""
    inner = [places(one, (*path, key)) for key, one in value.items()] if isinstance(value, dict) else []
    return [path, *(place for found in inner for place in found)]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(list(PACKERS)), data=st.data())
def test_junk_in_any_field_is_accepted_or_refused_in_one_line(name: str, data: st.DataObject) -> None:
    quantization = copy.deepcopy({**dict.fromkeys(MORE), **PACKERS[name].config})
    *path, last = data.draw(st.sampled_from(places(quantization)[1:]))
    inner = quantization
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(junk)
    try:
        build_plan(ModelConfig.from_dict(make_config("qwen3_moe", **MIXTURE, quantization_config=quantization)), 2)
    except TpctlError as error:
        assert "\n" not in str(error)


FLIPPED = [
    ("fp8", "weight_scale_inv"),
    ("fp8 by tensor", "activation_scale"),
    ("awq", "qzeros"),
    ("awq", "scales"),
    ("gptq", "qweight"),
    ("gptq in order of activation", "g_idx"),
    ("ct int4 with zeros", "weight_zero_point"),
    ("ct int4 with zeros", "weight_packed"),
    ("ct nvfp4", "weight_global_scale"),
    ("modelopt nvfp4", "weight_scale_2"),
]


@pytest.mark.parametrize(("packer", "entry"), FLIPPED)
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, packer: str, entry: str) -> None:
    shard_checkpoint(model(packer).save(tmp_path / "model"), tmp_path / "out", 2)
    path, name = tmp_path / "out" / "model-rank-1-part-0.safetensors", f"model.layers.0.mlp.down_proj.{entry}"
    raw, info = bytearray(path.read_bytes()), read_header(path).tensors[name]
    for place in (info.start, info.stop - 1):
        raw[place] ^= 4
        path.write_bytes(raw)
        with pytest.raises(ShardFolderError, match=rf"{name} of rank 1"):
            inspect_shards(tmp_path / "out", verify=True)
        raw[place] ^= 4


def test_a_flipped_bit_of_a_shape_that_no_rank_has_is_found(tmp_path: Path) -> None:
    shard_checkpoint(model("ct int4").save(tmp_path / "model"), tmp_path / "out", 2)
    path, name = tmp_path / "out" / "tpctl-extra.safetensors", f"{Q}.weight_shape"
    raw, info = bytearray(path.read_bytes()), read_header(path).tensors[name]
    raw[info.start] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardFolderError, match=name):
        inspect_shards(tmp_path / "out", verify=True)
