"""Shards for vLLM against the parameters that vLLM 0.32.0 makes, frozen in ``vllm_state.json``.

The file has a config and rank 0's parameters at tp 2 (those of rank 1 are alike) for every family and format, as
``examples/engine_state.py`` found them; ``*`` stands for every layer's number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.synthetic import folder_bytes, source_shapes, source_tensors
from tpctl.arch.compat import check_compat
from tpctl.arch.config import ModelConfig
from tpctl.arch.proven import ENGINES
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import checked_source_plan
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving.expected import Expected
from tpctl.sharding.showing.inspect import inspect_shards

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vllm_state.json").read_text())


MAY_LACK = ("_proj.bias", ".input_zero_point")
"""What a checkpoint in a format may have and these have not; no model of them has biases of its own."""


def label(case: dict[str, Any]) -> str:
    scheme = case["config"].get("quantization_config", {})
    return f"{case['config']['model_type']} {scheme.get('format', scheme.get('quant_method', 'floats'))}"


def held_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint; one scale for a weight of FP8 has vLLM's name there."""
    shapes = source_shapes(config)
    scheme = config.get("quantization_config", {})
    if scheme.get("quant_method") == "fp8" and "weight_block_size" not in scheme:
        scales = [name for name in shapes if name.endswith("_scale_inv")]
        for name in scales:
            del shapes[name]
            module = name.removesuffix(".weight_scale_inv")
            shapes |= {f"{module}.weight_scale": (1,), f"{module}.input_scale": (1,)}
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("activation_scale")}
    if scheme:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(MAY_LACK)}
    packed = [name.removesuffix("packed") for name in shapes if name.endswith(".weight_packed")]
    return {**shapes, **{f"{name}shape": (2,) for name in packed}}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_rank_has_vllms_parameters(case: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(case["config"], cutting=Cutting(engine="vllm"))
    shapes = held_shapes(case["config"])
    plan = checked_source_plan(config, shapes, 2)
    check_compat("vllm", config, plan)
    wanted = {
        name.replace("*", str(layer)): tuple(shape)
        for name, shape in case["tensors"].items()
        for layer in (range(config.num_layers) if "*" in name else range(1))
    }
    for shard in Expected.of(config, plan, "vllm").shards:
        assert {name: tensor.shape for name, tensor in shard.items()} == wanted


def test_every_proven_family_is_among_them() -> None:
    assert {case["config"]["model_type"] for case in CASES} == ENGINES["vllm"].families.keys()


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of random bytes, but for what has to be right: shapes of weights, and groups in order."""
    parsed, shapes = ModelConfig.from_dict(config), held_shapes(config)
    held = {one.name: one for one in source_tensors(config)}
    header = build_header(held.get(name, TensorSpec(name, "I64", shape)) for name, shape in shapes.items())
    constants, groups = parsed.blueprint.constants(shapes), parsed.blueprint.ordered(shapes)
    rng, data = np.random.default_rng(0), []
    for name, info in header.tensors.items():
        if name in constants:
            data.append(np.array(constants[name], "<i8").tobytes())
        elif name in groups:
            data.append((np.arange(info.shape[0], dtype="<i4") // groups[name]).tobytes())
        else:
            data.append(rng.integers(0, 256, info.nbytes, dtype=np.uint8).tobytes())
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(header.raw + b"".join(data))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MERGED = [case for case in CASES if label(case) in ("deepseek_v3 fp8", "qwen3_5_moe_text pack-quantized", "llama gptq")]


@pytest.mark.parametrize("case", MERGED, ids=label)
def test_what_vllm_stores_otherwise_goes_back(case: dict[str, Any], tmp_path: Path) -> None:
    """Linears that it merges, groups that it does not store, shapes of packed weights that it does."""
    source = write(tmp_path / "model", case["config"])
    shard_checkpoint(source, tmp_path / "one", 1, compat="vllm")
    shard_checkpoint(source, tmp_path / "two", 2, compat="vllm")
    inspect_shards(tmp_path / "two", verify=True, source=source)
    merge_shards(tmp_path / "two", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    reshard(tmp_path / "two", tmp_path / "again", 1)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "one")
