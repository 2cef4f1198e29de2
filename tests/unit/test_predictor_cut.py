"""A layer that predicts one token more, as tensors: cut, proven, planned, loaded where it drafts, refused where it is
missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint, make_mixture
from tests.tiny_predicting import PREDICTING, make_copying, make_predicting
from tests.unit.generating import PROMPTS, run
from tests.unit.generating import requests as greedy
from tests.unit.test_families_mixtures import HEADS, round_trip
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.metadata import read_metadata
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners.loading import LoadedModel, load
from tpctl.errors import ShardFolderError, TpctlError, UnsupportedModelError
from tpctl.manifest.manifest import Manifest
from tpctl.planning.fit import Budget, plan_model
from tpctl.quantizing.schemes import Method
from tpctl.quantizing.writer import quantise_checkpoint
from tpctl.sharding.cache import ensure_sharded
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards
from tpctl.wire.settings import EngineConfig

OLD = Cutting(predicts=False)
"""As an older tpctl has cut it: what predicts more tokens is left out."""


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def loaded(shards: Path, tp_size: int = 1, **settings: Any) -> list[LoadedModel]:
    def rank(group: TPGroup) -> LoadedModel:
        return load(EngineConfig(shards, tp_size, block_size=4, **settings), group)

    return run_ranks(tp_size, torch.inference_mode()(rank))


@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", PREDICTING)
def test_between_all_sizes(name: str, stacked: bool, tmp_path: Path) -> None:
    make_predicting(name, tmp_path / "model", stacked=stacked)
    sizes = (1, 2, 5) if stacked else range(1, HEADS + 1)
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in sizes])
    manifest = Manifest.load(tmp_path / "2-1")
    held = [name for name in manifest.tensors(1) if name.startswith("mtp.")]
    assert manifest.predicts and "mtp.layers.0.self_attn.o_proj.weight" in held and "mtp.fc.weight" in held
    assert manifest.tensors(1)["mtp.fc.weight"].shape == (64, 64)
    left = {} if manifest.extra is None else manifest.extra.tensors
    copies = set() if name.startswith("qwen") else {"embed_tokens.weight", "shared_head.head.weight"}
    assert {one.removeprefix("model.layers.3.") for one in left} == copies


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3"])
def test_whole_experts_by_rank(name: str, tmp_path: Path) -> None:
    make_copying(name, tmp_path / "model")
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting(2)), (4, Cutting(2)), (3, Cutting(3))])
    requests = greedy("", PROMPTS[:3], max_tokens=12)
    tokens, stats = run(tmp_path / "2-2", 2, [requests], speculate="mtp")
    assert stats.accepted_tokens > 0
    assert tokens == run(tmp_path / "2-2", 2, [requests])[0]


def test_beside_a_tower(tmp_path: Path) -> None:
    """Of a model that sees: the layer keeps its names, whatever the text model's are."""
    make_predicting("qwen3_5_text", tmp_path / "text")
    make_mixture("qwen3_5_text", tmp_path / "model", sees=True)
    path = tmp_path / "model" / "model.safetensors"
    of_layer = {
        name: x for name, x in load_file(tmp_path / "text/model.safetensors").items() if name.startswith("mtp.")
    }
    save_file({**load_file(path), **of_layer}, path, {"format": "pt"})
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in (1, 3)], text_only=True)
    manifest = Manifest.load(tmp_path / "3-1")
    assert manifest.predicts and manifest.extra is not None
    assert all(name.startswith("model.visual.") for name in manifest.extra.tensors)


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe"])
def test_shards_of_an_older_tpctl(name: str, tmp_path: Path) -> None:
    """They are what they were: proven, merged, cut anew without the layer; and run, with n-grams."""
    make_predicting(name, tmp_path / "model")
    round_trip(tmp_path / "model", tmp_path, [(2, OLD), (3, OLD)])
    old = tmp_path / "2-1"
    manifest = Manifest.load(old)
    assert not manifest.predicts and manifest.extra is not None
    assert ("mtp.fc.weight" if name == "qwen3_next" else "model.layers.3.eh_proj.weight") in manifest.extra.tensors
    asked = greedy("", PROMPTS[:2], max_tokens=6)
    assert run(old, 2, [asked], speculate="auto")[0] == run(old, 2, [asked])[0]

    def kind(speculate: str) -> str:
        config = EngineConfig(old, 2, block_size=4, kv_cache_memory=1 << 20, speculate=speculate)
        with torch.inference_mode():
            return run_ranks(2, lambda group: Engine(config, group).info().speculation)[1]

    assert (kind("auto"), kind("off")) == ("ngram", "off")
    tensors = r"mtp\.\*" if name == "qwen3_next" else r"model\.layers\.3\.\*"
    with pytest.raises(
        UnsupportedModelError, match=rf"tensors named {tensors}, shard it again, or use --speculate ngram"
    ):
        kind("mtp")


def test_a_layer_that_one_host_has_and_another_has_not(tmp_path: Path) -> None:
    make_predicting("glm4_moe", tmp_path / "model")
    for name, cutting in (("new", Cutting()), ("old", OLD)):
        shard_checkpoint(tmp_path / "model", tmp_path / name, 2, cutting=cutting)

    def rank(group: TPGroup) -> bool:
        shards = tmp_path / ("new", "old")[group.rank]
        return load(EngineConfig(shards, 2, block_size=4, speculate="auto"), group).model.mtp is not None

    assert run_ranks(2, torch.inference_mode()(rank)) == [False, False]


def test_models_that_have_none(tmp_path: Path) -> None:
    make_checkpoint("llama2", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 1)
    with pytest.raises(UnsupportedModelError, match="do not hold: a llama model has none, or use --speculate ngram"):
        loaded(tmp_path / "shards", speculate="mtp")
    make_predicting("glm4_moe", tmp_path / "other")
    shard_checkpoint(tmp_path / "other", tmp_path / "vllm", 1, compat="vllm")
    assert not Manifest.load(tmp_path / "vllm").predicts
    with pytest.raises(UnsupportedModelError, match="those for vllm have none; shard the model again without --compat"):
        loaded(tmp_path / "vllm", speculate="mtp")
    reshard(tmp_path / "vllm", tmp_path / "none", 2, compat="none")
    assert not Manifest.load(tmp_path / "none").predicts
    shard_checkpoint(tmp_path / "other", tmp_path / "plain", 2)
    with pytest.raises(UnsupportedModelError, match=r"\(mtp\.\*\), which vllm does not load .* with --compat vllm"):
        reshard(tmp_path / "plain", tmp_path / "again", 1, compat="vllm")


def test_a_layer_of_which_a_tensor_is_missing_is_left_out(tmp_path: Path) -> None:
    make_predicting("glm4_moe", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.enorm.weight"]
    save_file(tensors, path, {"format": "pt"})
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 2)
    manifest = Manifest.load(tmp_path / "shards")
    assert not manifest.predicts and manifest.extra is not None
    assert "model.layers.3.eh_proj.weight" in manifest.extra.tensors


@pytest.mark.parametrize("name", PREDICTING)
def test_who_does_not_draft_with_it_does_not_pay_for_it(name: str, tmp_path: Path) -> None:
    """Plan and engine count alike: weights and KV bytes without, and what comes on top."""
    make_predicting(name, tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 2)
    report = plan_model(read_metadata(tmp_path / "model"), Budget(gpu_memory=1 << 30), tp_size=2)
    manifest = Manifest.load(tmp_path / "shards")
    off = loaded(tmp_path / "shards", 2, speculate="off")
    own = loaded(tmp_path / "shards", 2, speculate="mtp")
    for fit, one, other in zip(report.ranks, off, own, strict=True):
        assert one.weight_bytes == fit.weight_bytes
        assert other.weight_bytes - one.weight_bytes == fit.predictor_bytes > 0
        assert one.slab_bytes == 4 * fit.kv_bytes_per_token
        assert other.slab_bytes - one.slab_bytes == 4 * fit.predictor_kv_bytes_per_token > 0
        assert sum(part.size for part in manifest.shard(fit.rank).parts) == fit.file_bytes
        kept = other.predictor_cache(6)
        assert kept.k.numel() * kept.k.element_size() > 0
    assert one.model.mtp is None and one.state_bytes == other.state_bytes


def test_the_plan_of_a_model_without_it_says_nothing(tmp_path: Path) -> None:
    make_mixture("glm4_moe", tmp_path / "model")
    report = plan_model(read_metadata(tmp_path / "model"), Budget(gpu_memory=1 << 30), tp_size=2)
    assert {(rank.predictor_bytes, rank.predictor_kv_bytes_per_token) for rank in report.ranks} == {(0, 0)}


FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("floats", "kinds"),
    [
        ((), ("fp8", "fp8", "fp8")),
        (("mtp.fc",), ("dense", "fp8", "fp8")),
        (("mtp.",), ("dense", "dense", "dense")),
    ],
)
def test_what_has_no_scale_is_a_float(floats: tuple[str, ...], kinds: tuple[str, ...], tmp_path: Path) -> None:
    """DeepSeek's projection, and layers that quantisers leave alone without saying so."""
    make_predicting("qwen3_next", tmp_path / "model")
    raw = {**json.loads((tmp_path / "model/config.json").read_text()), "quantization_config": FP8}
    config = ModelConfig.from_dict(raw)
    names = set()
    for name, x in load_file(tmp_path / "model" / "model.safetensors").items():
        names.add(name)
        if x.ndim == 2 and "gate." not in name and not name.startswith(("lm_head", "model.embed", *floats)):
            names.add(f"{name}_scale_inv")
    predictor = as_held(config, names).blueprint.predictor
    assert predictor is not None
    attention, mlp = predictor.block.attention, predictor.block.mlp
    found = (predictor.projection, attention.qkv, mlp.gate_up)  # type: ignore[union-attr]
    assert tuple("fp8" if "FP8" in one.storage.format.upper() else one.storage.format for one in found) == kinds


SMALL: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
"""Sizes that groups of 32 divide."""


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        ("glm4_moe", Method.INT4_G32, {}),
        ("qwen3_next", Method.FP8, {"shared_expert_intermediate_size": 32}),
        ("deepseek_v3", Method.FP8_BLOCK, {"head_dim": 4}),
    ],
)
def test_quantised(name: str, method: Method, changes: dict[str, int], tmp_path: Path) -> None:
    """Of Qwen's nothing is quantised, of others the linears of the block."""
    make_copying(name, tmp_path / "model", 0.02, **{**SMALL, **changes})
    (tmp_path / "quantised").mkdir()
    quantise_checkpoint(CheckpointFolder.open(tmp_path / "model"), tmp_path / "quantised", method)
    _drafts_with(tmp_path / "quantised", tmp_path, name != "qwen3_next")


@pytest.mark.parametrize("cells", ["channel", "block"])
def test_a_quantised_projection(cells: str, tmp_path: Path) -> None:
    """It is cut along its inputs: of blocks of 24 both ranks have the scale that is beside their border."""
    make_copying("qwen3_5_text", tmp_path / "model", 0.02)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    scales = {"channel": (64, 1), "block": (3, 6)}[cells]
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].to(torch.float8_e4m3fn)
    tensors["mtp.fc.weight_scale"] = torch.ones(scales)
    save_file(tensors, path, {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": cells, "symmetric": True, "dynamic": False}
    weights |= {"block_structure": [24, 24]} if cells == "block" else {}
    group = {"targets": [r"re:mtp\.fc"], "weights": weights, "input_activations": None, "output_activations": None}
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    _drafts_with(tmp_path / "model", tmp_path, True)


def _drafts_with(model: Path, folder: Path, quantised: bool) -> None:
    requests = greedy("", PROMPTS[:4], max_tokens=16)
    round_trip(model, folder, [(1, Cutting()), (2, Cutting())])
    for tp_size in (1, 2):
        shards = folder / f"{tp_size}-1"
        held = Manifest.load(shards).tensors(0)
        assert quantised == any(name.startswith("mtp.") and "scale" in name for name in held)
        tokens, stats = run(shards, tp_size, [requests], speculate="mtp")
        assert tokens == run(shards, tp_size, [requests])[0]
        assert stats.accepted_tokens > stats.draft_tokens / 10 > 0


def test_shards_in_the_cache_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    make_predicting("glm4_moe", tmp_path / "model")
    folder = ensure_sharded(ResolvedSource(tmp_path / "model", "a/model", None), 2)
    assert Manifest.load(folder).predicts
    assert ensure_sharded(ResolvedSource(tmp_path / "model", "a/model", None), 2) == folder


def test_ranks_are_not_added_to_shards_that_lack_it(tmp_path: Path) -> None:
    make_predicting("glm4_moe", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 2, ranks=[0], cutting=OLD)
    with pytest.raises(TpctlError, match="cut by the rules of another tpctl"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 2, ranks=[1])


def test_a_changed_byte_of_it_is_found(tmp_path: Path) -> None:
    make_predicting("qwen3_next", tmp_path / "model")
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 2)
    file = tmp_path / "out" / "model-rank-1-part-0.safetensors"
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + header])["mtp.fc.weight"]["data_offsets"][0]
    raw[8 + header + start] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ShardFolderError, match=r"mtp\.fc\.weight"):
        inspect_shards(tmp_path / "out", verify=True)
