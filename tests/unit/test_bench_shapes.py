"""Random checkpoints for benchmarks: of every shape a small one is cut, and its weights are of the usual size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tpctl.arch.block import linears
from tpctl.arch.config import ModelConfig
from tpctl.arch.held import HeldLinear
from tpctl.arch.source_plan import build_plan
from tpctl.bench.shapes import COMMON, SHAPES
from tpctl.bench.synthetic import _write
from tpctl.kernels.common.codes import decode
from tpctl.layers.weights.stored import to_codes
from tpctl.sharding.cutting.shard import shard_checkpoint

SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_one(shape: str, tmp_path: Path) -> None:
    made = {**COMMON, **SHAPES[shape]}
    made |= {key: value for key, value in SMALL.items() if key in made}
    config = ModelConfig.from_dict(made)
    _write(made, config, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 1)
    (file,) = (tmp_path / "shards").glob("model-rank-0-*.safetensors")
    tensors = load_file(file)
    plan, blueprint = build_plan(config, 1), config.blueprint
    seen = 0
    for linear in (one for part in blueprint.layers[0].parts for one in linears(part)):
        held = HeldLinear.of(linear, plan, 0, blueprint.prefix.format(0), tensors.keys())
        own = {kind: tensors[held.name + kind] for kind in held.shapes}
        if held.is_dense:
            found = own["weight"].float()
        else:
            (codes,) = to_codes(held, own)
            found = decode(codes if held.experts is None else codes.of_expert(1))
            seen += 1
        assert 0.015 < float(found.std()) < 0.025 and abs(float(found.mean())) < 0.005, held.name
        assert bool(torch.isfinite(found).all())
    assert bool(seen) == ("quantization_config" in made)
