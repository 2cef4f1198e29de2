"""Experts that a checkpoint stacks, quantised as a linear each: what compressed-tensors makes of those, to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_checkpoint, make_mixture
from tests.unit.quantising_folders import MEASURE, quantise, write
from tests.unit.synthetic import folder_bytes, make_config, source_shapes
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.errors import CheckpointError
from tpctl.planning.fit import Budget, plan_model
from tpctl.quantizing import writer
from tpctl.quantizing.linears import ignored, linears
from tpctl.quantizing.planned import quantised_metadata
from tpctl.quantizing.schemes import Method
from tpctl.quantizing.stacks import unstacked
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
SHARED: dict[str, Any] = {**WIDE, "shared_expert_intermediate_size": 128, "head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": SHARED,
    "qwen3_next": SHARED,
    "qwen3_moe": {**WIDE, "head_dim": 64},
    "glm4_moe": {**WIDE, "head_dim": 64},
    "mixtral": {key: value for key, value in WIDE.items() if key != "moe_intermediate_size"} | {"head_dim": 64},
    "minimax_m2": {**WIDE, "head_dim": 64},
    "gemma4-text-moe": {**WIDE, "head_dim": 32, "global_head_dim": 48, "num_attention_heads": 8},
}
"""With all linears of 128 inputs, or a multiple."""


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def make(name: str, folder: Path, *, stacked: bool = True) -> Any:
    """A checkpoint of transformers' class, in float32; the model."""
    pytest.importorskip("transformers")
    if name.startswith("gemma4"):
        return make_checkpoint(name, folder, **MODELS[name])
    return make_mixture(name, folder, stacked=stacked, **MODELS[name])


def as_bfloat16(model: Any, folder: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gemma4-text-moe", "qwen3_moe"])
def test_files_are_those_of_linears_one_by_one(tmp_path: Path, name: str, method: Method) -> None:
    """Weights and config byte for byte as of a model whose experts are linears before it is quantised."""
    pytest.importorskip("compressed_tensors")
    from tests.unit.quantising import save_quantised, with_linear_experts

    model = make(name, tmp_path / "source")
    as_bfloat16(model, tmp_path / "source")
    assert any(one.endswith("experts.gate_up_proj") for one in CheckpointFolder.open(tmp_path / "source").tensors)
    report = quantise(tmp_path / "source", tmp_path / "ours", method)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    kept = config["quantization_config"].pop("ignore")
    linear = {key for key, module in model.named_modules() if type(module).__name__ == "Linear"}
    save_quantised(with_linear_experts(model), method, tmp_path / "theirs", kept, save_original_format=False)
    ours, theirs = (tmp_path / one / "model.safetensors" for one in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text())
    # In another order, for the packer goes by modules; and with others that are none of its linears.
    assert not linear & ({*expected["quantization_config"].pop("ignore")} ^ {*kept})
    assert config == expected
    assert {one.shape[1] for one in report.tensors if ".experts." in one.name} == {128}


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"gemma4-text-moe"}))
def test_a_stack_becomes_what_is_made_of_experts_one_by_one(tmp_path: Path, name: str, method: Method) -> None:
    """Mixtral's and MiniMax's under the names of their published checkpoints, routers too."""
    make(name, tmp_path / "stacked")
    make(name, tmp_path / "apart", stacked=False)
    for one in ("stacked", "apart"):
        quantise(tmp_path / one, tmp_path / f"{one}-{method}", method)
    assert folder_bytes(tmp_path / f"stacked-{method}") == folder_bytes(tmp_path / f"apart-{method}")


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gemma4-text-moe", "mixtral"])
@pytest.mark.parametrize("method", Method)
def test_it_is_cut_planned_proven_and_merged(tmp_path: Path, name: str, method: Method) -> None:
    make(name, tmp_path / "source")
    made = tmp_path / "made"
    quantise(tmp_path / "source", made, method)
    for tp, cutting in ((1, Cutting()), (2, Cutting()), (2, Cutting(2))):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        report = shard_checkpoint(made, tmp_path / "cut", tp, cutting=cutting)
        verified = inspect_shards(tmp_path / "cut", verify=True, source=made).verified
        assert verified is not None and verified.compared_bytes == verified.hashed_bytes
        merge_shards(tmp_path / "cut", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(made)
        wanted = [report.bytes_per_rank[rank] for rank in range(tp)]
        assert planned_bytes(tmp_path / "source", method, tp, cutting) == wanted


def planned_bytes(source: Path, method: Method, tp: int, cutting: Cutting) -> list[int]:
    with quantised_metadata(read_metadata(str(source)), method) as described:
        report = plan_model(described, Budget(max_model_len=64), tp_size=tp, cutting=lambda size: cutting)
    return [rank.file_bytes for rank in report.ranks]


def test_the_text_model_of_one_that_sees(tmp_path: Path) -> None:
    """Its towers stay as they are."""
    pytest.importorskip("transformers")
    make_mixture("qwen3_5_moe_text", tmp_path / "source", stacked=True, sees=True, **SHARED)
    quantise(tmp_path / "source", tmp_path / "made", Method.FP8)
    found = CheckpointFolder.open(tmp_path / "made").tensors
    assert "model.language_model.layers.0.mlp.experts.5.up_proj.weight_scale" in found
    kept = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name.removesuffix(".weight") for name in found if "visual.blocks.0.attn" in name and "bias" not in name} < {
        *kept
    }
    shard_checkpoint(tmp_path / "made", tmp_path / "cut", 2, text_only=True)
    merge_shards(tmp_path / "cut", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(tmp_path / "made")


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "gemma4_text"])
def test_a_config_alone_is_enough_to_plan(tmp_path: Path, family: str) -> None:
    """Whichever form is the usual one of the family's floats."""
    sizes = {**WIDE, "num_experts": 4, "head_dim": 32}
    if family == "gemma4_text":
        sizes |= {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
    else:
        sizes |= {"shared_expert_intermediate_size": 128}
    config = make_config(family, **sizes)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, "BF16", shape) for name, shape in source_shapes(config).items()]
    quantise(write(tmp_path / "source", specs, config=config), tmp_path / "made", Method.INT4)
    report = shard_checkpoint(tmp_path / "made", tmp_path / "cut", 2)
    for folder in ("bare", "source"):
        found = planned_bytes(tmp_path / folder, Method.INT4, 2, Cutting())
        assert found == [report.bytes_per_rank[0], report.bytes_per_rank[1]]


@pytest.mark.parametrize("method", [Method.FP8, Method.INT4])
def test_transformers_reads_it_into_stacks_again(tmp_path: Path, method: Method) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    import transformers

    model = make("qwen3_5_moe_text", tmp_path / "source")
    report = quantise(tmp_path / "source", tmp_path / "ours", method)
    options = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", quantization_config=options)
    losses = {one.name: one for one in report.tensors}
    for number, layer in enumerate(model.model.layers):
        found = loaded.model.layers[number].mlp.experts
        for expert in range(len(found.down_proj)):
            stacks = {**dict(zip(("gate", "up"), found.gate_up_proj[expert].chunk(2), strict=True))}
            stacks["down"] = found.down_proj[expert]
            wanted = dict(zip(("gate", "up"), layer.mlp.experts.gate_up_proj[expert].chunk(2), strict=True))
            wanted["down"] = layer.mlp.experts.down_proj[expert]
            for label, weight in stacks.items():
                loss = losses[f"model.layers.{number}.mlp.experts.{expert}.{label}_proj.weight"]
                difference = (weight.float() - wanted[label].float()).detach()
                assert float(difference.abs().max()) == pytest.approx(loss.largest, rel=1e-2)
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, torch.Tensor)


def test_bands_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("qwen3_moe", tmp_path / "source")
    for method in Method:
        with monkeypatch.context() as patched:
            quantise(tmp_path / "source", tmp_path / "whole", method)
            patched.setattr(writer, "_BAND", 1)
            quantise(tmp_path / "source", tmp_path / "bands", method)
        assert folder_bytes(tmp_path / "bands") == folder_bytes(tmp_path / "whole")


def test_stacks_of_further_layers_stay_and_are_ignored_for_every_expert(tmp_path: Path) -> None:
    """vLLM asks whether ``mtp.layers.0.mlp.experts.0.gate_proj`` is ignored."""
    config = make_config("qwen3_5_moe_text", **SHARED)
    further = [
        TensorSpec("mtp.layers.0.mlp.experts.gate_up_proj", "BF16", (6, 256, 128)),
        TensorSpec("mtp.layers.0.mlp.experts.down_proj", "BF16", (6, 128, 128)),
        TensorSpec("mtp.fc.weight", "BF16", (128, 256)),
    ]
    specs = [TensorSpec(name, "BF16", shape) for name, shape in source_shapes(config).items()]
    quantise(write(tmp_path / "source", [*specs, *further], config=config), tmp_path / "made", Method.FP8)
    made = CheckpointFolder.open(tmp_path / "made")
    assert all(made.tensors[one.name][1].dtype == "BF16" for one in further)
    kept = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["ignore"]
    assert kept[:2] == ["mtp.fc", r"re:mtp\.layers\.0\.mlp\.experts\..*"]
    shard_checkpoint(tmp_path / "made", tmp_path / "cut", 2)  # which reads that list
    assert ModelConfig.load(tmp_path / "made").scheme is not None


def test_layers_that_predict_more_tokens_are_quantised_but_for_what_is_theirs() -> None:
    layer = "model.layers.46."
    shapes = {"eh_proj": (128, 256), "shared_head.head": (70, 128), "embed_tokens": (70, 128)}
    kept = {
        f"{layer}{name}.weight": TensorSpec(f"{layer}{name}.weight", "BF16", shape) for name, shape in shapes.items()
    }
    down = TensorSpec(f"{layer}mlp.experts.0.down_proj.weight", "BF16", (128, 128))
    tensors = {**kept, down.name: down}
    assert list(linears(tensors, Method.FP8)) == [down.name]
    assert ignored(tensors) == [*sorted(name.removesuffix(".weight") for name in kept), "lm_head"]


def test_embeddings_for_each_layer_have_linears(tmp_path: Path) -> None:
    """Gemma 4 E2B and E4B; vLLM gives them the model's format."""
    pytest.importorskip("transformers")
    make_checkpoint("gemma4-text-edge", tmp_path / "source", **WIDE)
    report = quantise(tmp_path / "source", tmp_path / "made", Method.FP8)
    found = {one.name for one in report.tensors if ".layers.0." in one.name}
    assert {f"model.layers.0.per_layer_{one}.weight" for one in ("input_gate", "projection")} <= found
    shard_checkpoint(tmp_path / "made", tmp_path / "cut", 2)
    merge_shards(tmp_path / "cut", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(tmp_path / "made")


@pytest.mark.parametrize("method", Method)
def test_gpt_oss_is_refused_by_name(tmp_path: Path, method: Method) -> None:
    make_mixture("gpt_oss", tmp_path / "source", stacked=True)
    with pytest.raises(
        CheckpointError,
        match=rf"^model\.layers\.0\.mlp\.experts\.gate_up_proj is a stack of experts, which --quantize {method} "
        r"divides into one tensor an expert, but gpt_oss has no such form that other engines read; leave out --quant",
    ):
        quantise(tmp_path / "source", tmp_path / "out", method)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stack_of_another_shape_or_alone_is_refused(tmp_path: Path) -> None:
    config = make_config("qwen3_moe", num_experts=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    mlp = "model.layers.0.mlp.experts."
    found = {f"{mlp}gate_up_proj": (4, 40, 24), f"{mlp}down_proj": (4, 24, 20)}
    assert len(unstacked(tmp_path, found, Method.FP8).weights[f"{mlp}gate_up_proj"]) == 8
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \[3, 40, 24\] in the checkpoint but \[4, 40, 24\] by"):
        unstacked(tmp_path, {**found, f"{mlp}gate_up_proj": (3, 40, 24)}, Method.FP8)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.experts\.down_proj; it is incomplete"):
        unstacked(tmp_path, {f"{mlp}gate_up_proj": (4, 40, 24)}, Method.FP8)


def test_an_expert_that_groups_do_not_divide_is_named(tmp_path: Path) -> None:
    config = make_config("qwen3_moe", **{**WIDE, "moe_intermediate_size": 192, "num_experts": 4})
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 384, 128),
        "model.layers.0.mlp.experts.down_proj": (4, 128, 192),
    }
    source = write(tmp_path / "source", [TensorSpec(*one) for one in _typed(shapes)], config=config)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight has 192 columns"):
        quantise(source, tmp_path / "out", Method.INT4)


def _typed(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "BF16", shape) for name, shape in shapes.items()]


def test_not_a_number_is_refused_by_the_experts_name(tmp_path: Path) -> None:
    config = make_config("qwen3_moe", **WIDE, num_experts=4)
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 256, 128),
        "model.layers.0.mlp.experts.down_proj": (4, 128, 128),
    }
    source = write(tmp_path / "source", [TensorSpec(*one) for one in _typed(shapes)], config=config)
    file, info = CheckpointFolder.open(source).tensors["model.layers.0.mlp.experts.gate_up_proj"]
    data = bytearray(file.path.read_bytes())
    at = info.start + 2 * ((2 * 256 + 128) * 128 + 7)  # expert 2, first row of up
    data[at : at + 2] = b"\x80\x7f"
    file.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight holds NaN"):
        quantise(source, tmp_path / "out", Method.FP8)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak so")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Of a stack of 403 MB."""
    config = make_config("qwen3_moe", **{**WIDE, "num_experts": 64, "hidden_size": 2048, "moe_intermediate_size": 512})
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (64, 1024, 2048),
        "model.layers.0.mlp.experts.down_proj": (64, 2048, 512),
    }
    header = build_header(TensorSpec(*one) for one in _typed(shapes))
    (tmp_path / "source").mkdir()
    with (tmp_path / "source" / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        file.truncate(header.file_size)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "out"), "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 100  # MiB, Python and numpy among them
