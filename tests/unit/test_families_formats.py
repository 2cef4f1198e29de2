"""Every family in every quantised format: what the ranks hold, unpacked and multiplied, and shards of it.

There are hundreds of pairs. A run takes some formats of each family, others every day, so that all have had their turn
within a month; ``--whole-grid`` takes all of them, and with it a test's id finds one again.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sampling import today
from tests.unit.packers import PACKERS, mxfp4, read_mxfp4
from tests.unit.packing import Packer
from tests.unit.quantised_model import Quantised, check, quantise
from tests.unit.synthetic import folder_bytes, make_config
from tpctl.arch.block import Experts
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.metadata import read_metadata
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "global_head_dim": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_experts": 3,
    "num_local_experts": 3,
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "top_k_experts": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "hidden_size_per_layer_input": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
COMMON = ("hidden_size", "head_dim", "intermediate_size", "num_hidden_layers")
HEADS = 4
TEXTS = sorted(name for name, family in FAMILIES.items() if family.inner is None)
FORMATS = sorted(PACKERS)
STACKED = ("fp8 e8m0", "fp8 of other blocks")
"""Formats in which experts are stacked here, where a family has both forms."""
A_DAY = {"test_sums_of_ranks_are_the_layers": 2, "test_shards_are_proven_planned_merged_and_cut_anew": 1}
"""Formats of each family that a run takes."""
FEW = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba", "shared_expert_gate")
"""Linears of a row or two a head, or of one, which no published model packs: a border would be inside of a word."""
MXFP4 = Packer(
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
    ("weight", (0, 1), (1, 32)),
    mxfp4,
    read_mxfp4,
)
"""Of gpt-oss alone, whose stacks have no other form but FP8."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "packing" not in metafunc.fixturenames:
        return
    count = len(FORMATS) if metafunc.config.getoption("--whole-grid") else A_DAY[metafunc.function.__name__]
    first = today() * count
    pairs = [
        (family, FORMATS[(7 * place + first + turn) % len(FORMATS)])
        for place, family in enumerate(TEXTS)
        for turn in range(count)
    ]
    metafunc.parametrize(("family", "packing"), [*pairs, ("gpt_oss", "mxfp4")])


def made(family: str, packing: str) -> Quantised:
    known = FAMILIES[family].defaults
    sizes = {key: value for key, value in SIZES.items() if key in COMMON or key in known}
    if family == "gemma4_unified_text":
        sizes["hidden_size_per_layer_input"] = 0
    if family == "gemma4_text":  # with a global layer, and one that reads the keys of the first
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        sizes |= {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 1, "enable_moe_block": True}
        sizes |= {"num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 96}
    if "qk_nope_head_dim" in known:  # latent attention has no other size of a head
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = HEADS
    config = make_config(family, **sizes)
    assert config["num_attention_heads"] == HEADS
    if packing == "mxfp4":
        return quantise({**config, "intermediate_size": 128}, MXFP4, stacked=True)
    kept = (*FEW, "mlp.experts") if family == "gpt_oss" else FEW
    return quantise(config, without(PACKERS[packing], kept), stacked=packing in STACKED)


def without(packer: Packer, modules: tuple[str, ...]) -> Packer:
    """``packer`` of a config that leaves those ``modules`` as floats, if it packs values along outputs."""
    method = packer.config["quant_method"]
    if method == "fp8":
        return packer
    pattern = rf".*\.({'|'.join(modules)})(\..*)?$"
    left: dict[str, dict[str, Any]] = {
        "awq": {"modules_to_not_convert": list(modules)},
        "gptq": {"dynamic": {f"-:{pattern}": {}}},
        "compressed-tensors": {"ignore": ["lm_head", f"re:{pattern}"]},
        "modelopt": {"ignore": ["lm_head", *modules]},
    }
    return replace(packer, config={**packer.config, **left[method]})


def has_experts(model: Quantised) -> bool:
    return any(isinstance(part, Experts) for layer in model.held().layers for part in layer.parts)


@pytest.mark.daily(2)
def test_sums_of_ranks_are_the_layers(family: str, packing: str) -> None:
    """At every size, and with experts dealt, or borders inside of blocks."""
    model = made(family, packing)
    for tp in range(1, HEADS + 1):
        check(model, tp)
    check(model, 3, Cutting(even=True))
    if has_experts(model):
        check(model, 4, Cutting(2))


@pytest.mark.daily(2)
def test_shards_are_proven_planned_merged_and_cut_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, packing: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    model = made(family, packing)
    source, before = model.save(tmp_path / "source"), None
    for tp, cutting in [(1, Cutting()), (3, Cutting()), (2, Cutting(2) if has_experts(model) else Cutting(even=True))]:
        out = tmp_path / f"tp{tp}"
        report = shard_checkpoint(source, out, tp, cutting=cutting)
        verified = inspect_shards(out, verify=True, source=source).verified
        assert verified is not None and verified.compared_bytes == verified.hashed_bytes
        merge_shards(out, tmp_path / "merged", force=True)
        assert folder_bytes(tmp_path / "merged") == folder_bytes(source)
        planned = plan_model(
            read_metadata(str(source)), Budget(), tp_size=tp, cutting=lambda size, cutting=cutting: cutting
        )
        assert {rank.rank: rank.file_bytes for rank in planned.ranks} == report.bytes_per_rank
        if before is not None:
            reshard(before, tmp_path / "again", tp, cutting=cutting, force=True)
            assert folder_bytes(tmp_path / "again") == folder_bytes(out)
        before = out
