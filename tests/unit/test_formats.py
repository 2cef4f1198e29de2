"""Every quantised format: cut at every size, put together again, and what the ranks compute with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.packers import PACKERS
from tests.unit.quantised_model import assembled, check, quantise, read_shard
from tests.unit.synthetic import folder_bytes, make_config
from tpctl.arch.quantised import Cutting
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving import transfer
from tpctl.sharding.showing.inspect import inspect_shards

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 1}
MODELS = {
    "llama": SIZES,
    "qwen3": {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen3_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2},
}


@pytest.mark.grid(1, daily=True)
@pytest.mark.daily(2)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", PACKERS)
def test_shards_hold_the_whole_at_every_size(tmp_path: Path, name: str, family: str) -> None:
    config = make_config(family, **MODELS[family])
    model = quantise(config, PACKERS[name])
    source = model.save(tmp_path / "source")
    before = folder_bytes(source)
    for tp in range(1, config["num_attention_heads"] + 1):
        folder = tmp_path / f"tp{tp}"
        shard_checkpoint(source, folder, tp)
        check(model, tp, folder=folder)
        merge_shards(folder, tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == before
        if tp > 1:
            reshard(tmp_path / f"tp{tp - 1}", tmp_path / "again", tp, force=True)
            assert folder_bytes(tmp_path / "again") == folder_bytes(folder)


@pytest.mark.grid(1, daily=True)
@pytest.mark.daily(2)
@pytest.mark.parametrize(("head_dim", "width"), [(64, 256), (24, 104)])
@pytest.mark.parametrize("name", PACKERS)
def test_a_source_that_holds_several_parts(tmp_path: Path, name: str, head_dim: int, width: int) -> None:
    """q, k and v, and gate and up, are one tensor there; formats that transpose it have them beside each other. Parts
    may begin inside of a block, whose scale two of them then have."""
    sizes = {"hidden_size": 128, "head_dim": head_dim, "intermediate_size": width, "num_hidden_layers": 1}
    model = quantise(make_config("phi3", **sizes), PACKERS[name])
    source = model.save(tmp_path / "source")
    before = folder_bytes(source)
    for tp in range(1, 5):
        folder, plan = tmp_path / f"tp{tp}", model.plan(tp)
        shard_checkpoint(source, folder, tp)
        check(model, tp, folder=folder)
        for rank in range(tp):
            expected, found = assembled(plan, model.tensors, rank), read_shard(folder, rank)
            assert expected.keys() == found.keys()
            for stored, tensor in found.items():
                if ".layers." not in stored:
                    continue
                assert torch.equal(expected[stored].view(torch.uint8), tensor.view(torch.uint8)), stored
        assert inspect_shards(folder, verify=True, source=source).verified
        merge_shards(folder, tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == before
        if tp > 1:
            reshard(tmp_path / f"tp{tp - 1}", tmp_path / "again", tp, force=True)
            assert folder_bytes(tmp_path / "again") == folder_bytes(folder)


def test_a_scale_of_two_parts_is_stored_for_each_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bands of one row, so that what is hashed has to come in order."""
    sizes = {"hidden_size": 64, "head_dim": 12, "intermediate_size": 200, "num_hidden_layers": 1}
    model = quantise(make_config("phi3", **sizes), PACKERS["fp8"])
    source, scale = model.save(tmp_path / "source"), "model.layers.0.{}.weight_scale_inv"
    plan = model.plan(1)
    pieces = {name: plan.shards[0][scale.format(name)].pieces for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")}
    found = {name: [(piece.label, piece.start[0], piece.shape[0]) for piece in held] for name, held in pieces.items()}
    assert found == {
        "self_attn.qkv_proj": [("q", 0, 1), ("k", 0, 1), ("v", 0, 1)],
        "mlp.gate_up_proj": [("gate", 0, 2), ("up", 1, 3)],
    }
    monkeypatch.setattr(transfer, "BAND_BYTES", 1)
    for tp in (1, 3):
        shard_checkpoint(source, tmp_path / f"tp{tp}", tp)
        assert inspect_shards(tmp_path / f"tp{tp}", verify=True, source=source).verified
        merge_shards(tmp_path / f"tp{tp}", tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
    reshard(tmp_path / "tp3", tmp_path / "again", 1)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "tp1")
    assert inspect_shards(tmp_path / "tp1").replicated_bytes == 0
    assert read_shard(tmp_path / "tp1", 0)[scale.format("mlp.gate_up_proj")].shape == (5, 1)


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    width=st.sampled_from([96, 192, 231 * 8, 231 * 32, 704, 1408, 1856]),
    tp=st.integers(1, 8),
    even=st.booleans(),
    heads=st.sampled_from([(4, 2, 64), (8, 8, 16), (6, 2, 32)]),
    seed=st.integers(0, 9),
)
def test_sums_of_ranks(name: str, width: int, tp: int, even: bool, heads: tuple[int, int, int], seed: int) -> None:
    query, kv, head_dim = heads
    config = make_config(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=width,
        num_attention_heads=query,
        num_key_value_heads=kv,
        head_dim=head_dim,
        vocab_size=64,
    )
    check(quantise(config, PACKERS[name], seed), min(tp, query), Cutting(even=even))


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(width=st.sampled_from([96, 192, 352]), tp=st.sampled_from([2, 4]), even=st.booleans(), seed=st.integers(0, 9))
def test_sums_of_dealt_experts(name: str, width: int, tp: int, even: bool, seed: int) -> None:
    config = make_config("qwen3_moe", **{**MODELS["qwen3_moe"], "moe_intermediate_size": width, "num_experts": 3})
    check(quantise(config, PACKERS[name], seed), tp, Cutting(2, even))
