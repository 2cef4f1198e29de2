"""Folders for other engines: even splits only, vLLM's four scales, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch import vllm
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.errors import PartitionError, ShardFolderError, UnsupportedModelError, UsageError
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
BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BY_TENSOR: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    },
    "ignore": ["lm_head"],
}
AWQ = {"quant_method": "awq", "group_size": 32}
WIDE: dict[str, Any] = {"head_dim": 64, "num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 512}


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
    with pytest.raises(
        PartitionError,
        match=rf"{engine} loads only even splits, but at tp 3 .*use --tp 1, 2, 4, or leave --compat out$",
    ):
        shard_checkpoint(source, tmp_path / "out", 3, compat=engine)
    assert not (tmp_path / "out").exists()


def test_nine_heads_over_three_kv_heads(tmp_path: Path) -> None:
    config = make_config(num_attention_heads=9, num_key_value_heads=3, intermediate_size=36, vocab_size=192)
    source = make_checkpoint(tmp_path / "model", config)
    with pytest.raises(PartitionError, match=r"use --tp 1, 3, or leave --compat out$"):
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
    round_trip(source, tmp_path / "vllm", tmp_path)
    reshard(tmp_path / "plain", tmp_path / "plain-to-four", 4, compat="vllm")
    assert folder_bytes(tmp_path / "plain-to-four") == folder_bytes(tmp_path / "other")


def round_trip(source: Path, shards: Path, scratch: Path, tp_size: int = 4) -> None:
    """Check that shards for vLLM are proven, merged, and cut for another size as ``source`` is."""
    inspect_shards(shards, verify=True, source=source)
    merge_shards(shards, scratch / "merged")
    assert folder_bytes(scratch / "merged") == folder_bytes(source)
    shard_checkpoint(source, scratch / "other", tp_size, compat="vllm")
    reshard(shards, scratch / "to-other", tp_size)
    assert folder_bytes(scratch / "to-other") == folder_bytes(scratch / "other")


def test_reshard_makes_a_folder_for_no_engine_and_says_how(tmp_path: Path) -> None:
    mixture = make_config("qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, vocab_size=64)
    source = make_checkpoint(tmp_path / "experts", mixture)
    shard_checkpoint(source, tmp_path / "vllm", 2, compat="vllm")
    with pytest.raises(PartitionError, match=r"loads only even splits, .*; use --tp 1, 2, 4, or give --compat none$"):
        reshard(tmp_path / "vllm", tmp_path / "x", 3)
    for tp_size, cutting in ((2, Cutting(2)), (3, None)):
        made, wanted = tmp_path / f"none-{tp_size}", tmp_path / f"wanted-{tp_size}"
        if cutting is not None:
            with pytest.raises(UnsupportedModelError, match=r"experts that are dealt .*; give --compat none$"):
                reshard(tmp_path / "vllm", made, tp_size, cutting=cutting)
        reshard(tmp_path / "vllm", made, tp_size, cutting=cutting, compat="none")
        shard_checkpoint(source, wanted, tp_size, cutting=cutting or Cutting())
        assert folder_bytes(made) == folder_bytes(wanted)
    with pytest.raises(UnsupportedModelError, match=r"experts that are dealt to the ranks; leave --compat out$"):
        shard_checkpoint(source, tmp_path / "x", 2, compat="vllm", cutting=Cutting(2))


def test_a_tied_head_has_the_name_that_vllms_model_has(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "gemma", make_config("gemma2", tie_word_embeddings=True))
    shard_checkpoint(source, tmp_path / "vllm", 2, compat="vllm")
    shard_checkpoint(source, tmp_path / "plain", 2)
    theirs, ours = (load_file(tmp_path / name / "model-rank-1-part-0.safetensors") for name in ("vllm", "plain"))
    one, other = theirs["model.embed_tokens.weight"], ours["lm_head.weight"]
    assert "lm_head.weight" not in theirs
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))
    round_trip(source, tmp_path / "vllm", tmp_path)


def test_a_tied_head_by_the_name_of_older_releases_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_checkpoint(tmp_path / "gemma", make_config("gemma2", tie_word_embeddings=True)), tmp_path / "old"
    with monkeypatch.context() as older:
        older.setitem(vllm._FAMILIES, "gemma2", vllm._USUAL)
        shard_checkpoint(source, out, 2, compat="vllm")
    said = (
        r"old/tpctl\.json was made by an older tpctl: the shards hold lm_head\.weight, which vllm only loads as "
        r"model\.embed_tokens\.weight; shard the model again$"
    )
    for use in (
        lambda: inspect_shards(out),
        lambda: inspect_shards(out, verify=True, source=source),
        lambda: merge_shards(out, tmp_path / "x"),
        lambda: reshard(out, tmp_path / "x", 4),
    ):
        with pytest.raises(ShardFolderError, match=said):
            use()


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt_oss", {}, r"model_type gpt_oss \(it is for cohere2, "),
        ("gemma4_text", {}, "model_type gemma4_text"),
        ("qwen3_moe", {**EXPERTS, "attention_bias": True}, r"a bias of self_attn.o_proj \(layer 0\)"),
        ("gemma2", {}, "a head of its own, which the engine's model lacks"),
        ("llama", {"quantization_config": {**BLOCKS, "weight_block_size": [16, 8]}}, "FP8 in blocks of 16 x 8"),
        ("qwen3_moe", {**EXPERTS, "quantization_config": BLOCKS}, "a router that its config does not leave"),
        ("mixtral", {"quantization_config": BY_TENSOR}, r"\(FP8 by tensor of experts\)"),
        ("mixtral", {**WIDE, "quantization_config": AWQ}, r"\(AWQ in groups of 32\) and is mixtral"),
        ("phi3", {"quantization_config": BY_TENSOR}, "fused in the checkpoint, with one scale"),
    ],
)
def test_models_that_vllm_does_not_load(tmp_path: Path, family: str, changes: dict[str, Any], why: str) -> None:
    source = make_checkpoint(tmp_path / family, make_config(family, **changes))
    with pytest.raises(UnsupportedModelError, match=f"--compat vllm is not known to work for a model that has .*{why}"):
        shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")
    assert not (tmp_path / "out").exists()


def test_scales_of_a_cache_are_refused_since_vllm_would_read_them(tmp_path: Path) -> None:
    scale = TensorSpec("model.layers.1.self_attn.k_proj.k_scale", "F32", ())
    source = make_checkpoint(tmp_path / "model", make_config(**WIDE, quantization_config=BLOCKS), extra=[scale])
    with pytest.raises(UnsupportedModelError, match=r"scales of its cache \(model.layers.1.self_attn.k_proj.k_scale\)"):
        shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")


def test_a_scale_that_two_ranks_would_share_is_refused(tmp_path: Path) -> None:
    """At tp 4 a head of 64 features is half a block, which tpctl alone gives a copy of the scale."""
    source = make_checkpoint(tmp_path / "model", make_config(**WIDE, quantization_config=BLOCKS))
    with pytest.raises(
        PartitionError,
        match=r"at tp 4 a border in .*qkv_proj would be inside .*; use --tp 1, 2, or leave --compat out$",
    ):
        shard_checkpoint(source, tmp_path / "out", 4, compat="vllm")
    shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")


def test_key_heads_of_a_delta_net_that_ranks_would_share_are_refused(tmp_path: Path) -> None:
    config = make_config("qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=4)
    source = make_checkpoint(tmp_path / "model", config)
    with pytest.raises(PartitionError, match=r"key heads of model.layers.0.gated delta net layers, 2 in number"):
        shard_checkpoint(source, tmp_path / "out", 4, compat="vllm")


@pytest.mark.parametrize(
    ("family", "changes", "cutting", "why"),
    [
        ("qwen3_moe", EXPERTS, Cutting(2), "experts that are dealt to the ranks"),
        ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}, Cutting(), r"a layer without experts \(0\)"),
        ("llama", {"quantization_config": BLOCKS, **WIDE}, Cutting(), "quantised weights"),
        ("llama", {"mlp_bias": True}, Cutting(), "a bias of mlp.gate_up_proj"),
        ("seed_oss", {}, Cutting(), "model_type seed_oss"),
    ],
)
def test_models_that_sglang_does_not_load(
    tmp_path: Path, family: str, changes: dict[str, Any], cutting: Cutting, why: str
) -> None:
    source = make_checkpoint(tmp_path / "model", make_config(family, **changes))
    with pytest.raises(
        UnsupportedModelError, match=f"--compat sglang is not known to work for a model that has .*{why}"
    ):
        shard_checkpoint(source, tmp_path / "out", 2, compat="sglang", cutting=cutting)
    assert not (tmp_path / "out").exists()
