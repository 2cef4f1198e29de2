"""Random shards for benchmarks: of every shape a small one is made, proven, and its weights are of the usual size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tpctl.arch.block import Experts, linears
from tpctl.arch.held import HeldLinear
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import build_plan
from tpctl.bench import synthetic
from tpctl.bench.shapes import SHAPES, shape_fields
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.errors import UsageError
from tpctl.kernels.common.codes import decode
from tpctl.layers.weights.stored import to_codes
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.proving.verify import verify_digests

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
    "n_routed_experts": 4,
    "first_k_dense_replace": 0,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention"],
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape, which is a small one here."""
    name: str = request.param
    small = {key: value for key, value in SMALL.items() if key in SHAPES[name]}
    monkeypatch.setitem(SHAPES, name, SHAPES[name] | small)
    monkeypatch.setattr(synthetic, "_BLOCK", 1 << 20)  # values: more than any tensor has here
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    return name


def test_weights_of_the_usual_size(shape: str) -> None:
    config = shape_config(shape)
    folder = synthetic_shards(shape, 1).folder
    (file,) = folder.glob("model-rank-0-*.safetensors")
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
    assert bool(seen) == ("quantization_config" in SHAPES[shape])
    assert all(bool((tensor == 1).all()) for name, tensor in tensors.items() if name.endswith("norm.weight"))


def test_cut_as_their_checkpoint_would_be(shape: str, tmp_path: Path) -> None:
    """What is written without a checkpoint is what ``shard`` makes of it; and nothing else is left in the cache."""
    groups = 2 if isinstance(shape_config(shape).blueprint.blocks[0].mlp, Experts) else 1
    folder = synthetic_shards(shape, 2, groups).folder
    verify_digests(folder, Manifest.load(folder), range(2))
    merge_shards(folder, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "again", 2, cutting=Cutting(groups))
    for path in (tmp_path / "again").glob("*.safetensors"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    seen = {path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")}
    assert seen == {folder.name}
    before = (folder / "config.json").stat().st_mtime_ns
    assert (synthetic_shards(shape, 2, groups).folder / "config.json").stat().st_mtime_ns == before


def test_the_first_layers_of_a_shape() -> None:
    few, all = shape_config("gemma-3-12b:7").blueprint, shape_config("gemma-3-12b").blueprint
    assert list(few.blocks) == list(all.blocks)[:7]
    assert shape_fields("qwen3-0.6b:28") == shape_fields("qwen3-0.6b")
    for wrong in ("qwen3-0.6b:0", "qwen3-0.6b:29", "qwen3-0.6b:", "qwen3-0.6b:1:2", "qwen3-0.6b:\u0661"):
        with pytest.raises(UsageError, match=r"no number of layers; qwen3-0\.6b has 1 to 28"):
            shape_fields(wrong)
    with pytest.raises(UsageError, match="unknown shape 'qwen'; known: smollm2-135m, "):
        shape_fields("qwen:3")


def test_8_bits_round_inputs_as_published_ones_do() -> None:
    """A scale an output goes with a scale a token, found as it runs; 4 bits are of weights alone."""

    def rounds(shape: str) -> set[bool]:
        parts = shape_config(shape).blueprint.layers[0].parts
        made = (linear.storage.coding for part in parts for linear in linears(part))
        return {coding.rounds for coding in made if coding is not None}

    assert rounds("llama-3.1-8b-fp8") == rounds("llama-3.1-8b-fp8-block") == rounds("qwen3-30b-a3b-fp8") == {True}
    assert rounds("llama-3.1-8b-w4a16") == {False}
