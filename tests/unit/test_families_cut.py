"""Families that tpctl cuts and does not run: checkpoints of transformers' own classes, to shards, back, and in between.

That a checkpoint can be sharded says that its names and shapes are those that the family expects, all of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import CUT, make_cut
from tests.unit.synthetic import folder_bytes
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.errors import PartitionError, UsageError
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

HEADS = 6
SEEING = ("qwen3_5_text", "qwen3_5_moe_text")
WITH_EXPERTS = sorted(CUT.keys() - {"qwen3_5_text"})


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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_between_all_sizes(tmp_path: Path, name: str, stacked: bool) -> None:
    make_cut(name, tmp_path / "model", stacked=stacked)
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in range(1, HEADS + 1)])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_whole_experts_by_rank(tmp_path: Path, name: str, stacked: bool) -> None:
    make_cut(name, tmp_path / "model", stacked=stacked)
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting(2)), (4, Cutting(2)), (3, Cutting(3)), (6, Cutting(6))])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", SEEING)
def test_the_text_model_of_one_that_sees(tmp_path: Path, name: str, stacked: bool) -> None:
    make_cut(name, tmp_path / "model", stacked=stacked, sees=True)
    with pytest.raises(UsageError, match=r"tensors of what sees or hears, such as model\.visual\..* --text-only"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 2)
    round_trip(tmp_path / "model", tmp_path, [(tp, Cutting()) for tp in range(1, HEADS + 1)], text_only=True)
    manifest = Manifest.load(tmp_path / "2-1")
    assert manifest.extra is not None and all(one.startswith("model.visual.") for one in manifest.extra.tensors)
    assert not any("visual" in one for one in manifest.tensors(0))
    # The same weights, cut from a checkpoint of the text class, are the same shards.
    make_cut(name, tmp_path / "text", stacked=stacked)
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
    make_cut(name, tmp_path / "model")
    add(tmp_path / "model", **further)
    round_trip(tmp_path / "model", tmp_path, [(2, Cutting()), (3, Cutting())])
    extra = Manifest.load(tmp_path / "2-1").extra
    assert extra is not None and set(extra.tensors) == {one.replace("__", ".") for one in further}


@pytest.mark.parametrize("name", CUT)
def test_more_ranks_than_heads(tmp_path: Path, name: str) -> None:
    make_cut(name, tmp_path / "model")
    with pytest.raises(PartitionError, match=r"7 does not fit .*; use --tp 1 to 6"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 7)


def test_key_heads_that_hold_their_value_heads_limit_the_ranks(tmp_path: Path) -> None:
    make_cut("qwen3_next", tmp_path / "model", linear_num_key_heads=3, linear_num_value_heads=6)
    shard_checkpoint(tmp_path / "model", tmp_path / "out", 3)
    with pytest.raises(PartitionError, match="4 does not fit gated delta net layers of 3 heads; use --tp 1 to 3"):
        shard_checkpoint(tmp_path / "model", tmp_path / "out", 4, force=True)


@pytest.mark.parametrize(("values", "tp"), [(32, 32), (64, 32), (64, 16), (48, 24), (48, 5)])
def test_value_heads_beyond_the_key_heads(values: int, tp: int) -> None:
    """16 key heads, as all of Qwen3.5 have: more ranks share them, as they share KV heads."""
    from tpctl.arch.source_plan import build_plan

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
