"""Folders for other engines: even splits only, and vLLM's four scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch.quantised import Cutting
from tpctl.errors import PartitionError, UnsupportedModelError, UsageError
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

SCALES = {
    f"model.layers.{layer}.self_attn.attn.{name}"
    for layer in range(2)
    for name in ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config())


def test_vllm_gets_its_scales_and_sglang_does_not(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "vllm", 2, compat="vllm")
    shard_checkpoint(source, tmp_path / "sglang", 2, compat="sglang")
    shard_checkpoint(source, tmp_path / "plain", 2)
    for rank in range(2):
        name = f"model-rank-{rank}-part-0.safetensors"
        vllm, plain = load_file(tmp_path / "vllm" / name), load_file(tmp_path / "plain" / name)
        assert vllm.keys() == plain.keys() | SCALES
        assert (tmp_path / "sglang" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        for scale in SCALES:
            assert torch.equal(vllm[scale], torch.tensor(1.0))
        save_file(vllm, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "vllm" / name).read_bytes()


def test_scales_are_verified_left_out_by_merge_and_kept_by_reshard(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "two", 2, compat="vllm")
    shard_checkpoint(source, tmp_path / "four", 4, compat="vllm")
    inspect_shards(tmp_path / "two", verify=True, source=source)
    merge_shards(tmp_path / "two", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    reshard(tmp_path / "two", tmp_path / "two-to-four", 4)
    assert folder_bytes(tmp_path / "two-to-four") == folder_bytes(tmp_path / "four")


def test_folders_with_scales_are_shown(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tpctl.cli.inspect_shards import inspect_shards as command

    shard_checkpoint(source, tmp_path / "two", 2, compat="vllm")
    command(tmp_path / "two", html=tmp_path / "page.html")
    assert "_k_scale" not in capsys.readouterr().out
    assert "qkv_proj" in (tmp_path / "page.html").read_text()
    command(tmp_path / "two", rank=1)
    assert "the constant 1, which another engine expects" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_uneven_splits_are_refused_with_the_sizes_that_work(source: Path, tmp_path: Path, engine: str) -> None:
    with pytest.raises(PartitionError, match=rf"{engine} loads only even splits, but at tp 3 .*use --tp 1, 2, 4$"):
        shard_checkpoint(source, tmp_path / "out", 3, compat=engine)
    assert not (tmp_path / "out").exists()


def test_nine_heads_over_three_kv_heads(tmp_path: Path) -> None:
    config = make_config(num_attention_heads=9, num_key_value_heads=3, intermediate_size=36, vocab_size=192)
    source = make_checkpoint(tmp_path / "model", config)
    with pytest.raises(PartitionError, match=r"use --tp 1, 3$"):
        shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")
    shard_checkpoint(source, tmp_path / "out", 3, compat="vllm")


def test_an_unknown_engine(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--compat llama is unknown; use vllm or sglang"):
        shard_checkpoint(source, tmp_path / "out", 2, compat="llama")


def test_experts_have_the_names_of_vllms_modules_and_go_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "experts", make_config("qwen3_moe", **EXPERTS))
    shard_checkpoint(source, tmp_path / "vllm", 2, compat="vllm")
    shard_checkpoint(source, tmp_path / "plain", 2)
    theirs, ours = (load_file(tmp_path / name / "model-rank-1-part-0.safetensors") for name in ("vllm", "plain"))
    at = "model.layers.1.mlp"
    for name, own in (
        ("experts.routed_experts.w13_weight", "experts.w13_weight"),
        ("experts.routed_experts.w2_weight", "experts.w2_weight"),
        ("experts.gate.weight", "gate.weight"),
    ):
        one, other = theirs.pop(f"{at}.{name}"), ours.pop(f"{at}.{own}")
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))  # random bits, NaN among them
        assert f"{at}.{own}" not in theirs
    inspect_shards(tmp_path / "vllm", verify=True, source=source)
    merge_shards(tmp_path / "vllm", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    shard_checkpoint(source, tmp_path / "four", 4, compat="vllm")
    for name in ("vllm", "plain"):
        reshard(tmp_path / name, tmp_path / f"{name}-to-four", 4, compat="vllm")
        assert folder_bytes(tmp_path / f"{name}-to-four") == folder_bytes(tmp_path / "four")


def test_what_only_other_names_show_to_be_unknown(tmp_path: Path) -> None:
    """A router of several tensors gets other names there, and is looked for under its own."""
    for family, fields in {
        "deepseek_v3": {"num_key_value_heads": 4},
        "gemma4_text": {
            **EXPERTS,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "vocab_size_per_layer_input": 70,
        },
    }.items():
        source = make_checkpoint(tmp_path / family, make_config(family, **fields))
        with pytest.raises(UnsupportedModelError, match="--compat vllm is not known to work for a model that has"):
            shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")


@pytest.mark.parametrize(
    ("changes", "engine", "cutting", "why"),
    [
        ({}, "sglang", Cutting(), "a mixture of experts"),
        ({}, "vllm", Cutting(2), "experts that are dealt to the ranks"),
        ({"quantization_config": FP8}, "vllm", Cutting(), r"quantised weights \(FP8 in blocks of 16 x 8\)"),
    ],
)
def test_what_nobody_has_seen_an_engine_load_is_refused(
    tmp_path: Path, changes: dict[str, Any], engine: str, cutting: Cutting, why: str
) -> None:
    source = make_checkpoint(tmp_path / "experts", make_config("qwen3_moe", **EXPERTS, **changes))
    with pytest.raises(
        UnsupportedModelError, match=f"--compat {engine} is not known to work for a model that has {why}"
    ):
        shard_checkpoint(source, tmp_path / "out", 2, compat=engine, cutting=cutting)
    assert not (tmp_path / "out").exists()
