"""What other engines refuse, by the rules that were read from their code. ``test_uneven_cuts`` has published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import make_config
from tests.unit.test_fit import config_folder
from tpctl.arch.block import CutBlock, Gated, Mixer
from tpctl.arch.linear import Linear
from tpctl.arch.quantised import Cutting
from tpctl.arch.storage import Axis, Entry, Storage
from tpctl.checkpoint.metadata import read_metadata
from tpctl.partition.cuts import Even, Whole
from tpctl.partition.split import Part, Rule
from tpctl.planning.check import SizeCheck
from tpctl.planning.divided import Scales, axes
from tpctl.planning.fit import Budget, plan_model
from tpctl.planning.model_sizes import Cuttings, as_usual
from tpctl.planning.peers import ENGINES, RULES

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 4096,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}


def checks(folder: Path, config: dict[str, Any], cutting: Cuttings = as_usual) -> tuple[SizeCheck, ...]:
    return plan_model(read_metadata(str(config_folder(folder, config))), Budget(), cutting=cutting).checks


def rules(check: SizeCheck) -> tuple[list[str], list[str]]:
    return [one.rule for one in check.vllm], [one.rule for one in check.sglang]


def test_every_rule_has_a_line_in_a_release() -> None:
    assert {rule.engine for rule in RULES} == set(ENGINES)
    for rule in RULES:
        assert ".py:" in rule.source and rule.source.startswith(f"{rule.engine}/"), rule


def test_heads_and_the_vocabulary(tmp_path: Path) -> None:
    by_size = {check.tp_size: rules(check) for check in checks(tmp_path / "n", make_config(**SIZES))}
    assert {tp for tp, of in by_size.items() if of == ([], [])} == {1, 2, 4, 8, 16}
    assert by_size[6] == (["heads", "KV heads", "vocabulary", "width"], ["heads", "KV heads", "width"])
    assert by_size[12][0][0] == "heads" and "KV heads" not in by_size[12][0]  # 12 ranks copy 4 KV heads evenly


def test_kv_heads_that_neither_divide_nor_copy_evenly(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 4096 * 3}
    found = checks(tmp_path / "m", make_config(**{**SIZES, **heads, "intermediate_size": 3072}))
    assert rules(found[3]) == (["KV heads"], ["KV heads"])
    assert "6 KV heads are neither divided by 4" in found[3].vllm[0].why


def test_blocks_of_linears(tmp_path: Path) -> None:
    """At tp 4 a rank has one KV head of 64 of a block of 128, which SGLang checks and vLLM does not; at tp 16 64
    columns of o_proj, which both refuse."""
    found = checks(tmp_path / "m", make_config(**SIZES, quantization_config=FP8))
    assert rules(found[1]) == ([], [])
    assert rules(found[3]) == ([], ["blocks"])
    assert "64 of 256 outputs of self_attn.qkv_proj a rank end in a block of 128" in found[3].sglang[0].why
    assert rules(found[15]) == (["blocks"], ["blocks"])
    assert "64 of 1024 inputs of self_attn.o_proj" in found[15].vllm[0].why


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [128, 128],
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": None,
        }
    },
}


@pytest.mark.parametrize(("form", "loads"), [(COMPRESSED, False), (FP8, True)])
def test_experts_of_a_block_and_a_half_are_refused_at_every_size(
    tmp_path: Path, form: dict[str, Any], loads: bool
) -> None:
    """Both engines look at an expert's outputs where one rank has all of them, too; vLLM makes ``fp8`` finer."""
    config = make_config("qwen3_moe", **SIZES, **{**MOE, "moe_intermediate_size": 192}, quantization_config=form)
    for found in (checks(tmp_path / "m", config)[0], checks(tmp_path / "n", config, Cutting)[1]):
        assert rules(found) == (["Triton only" if loads else "expert blocks"], ["expert blocks"])
        assert found.vllm[0].loads is loads
        assert found.vllm[0].why.startswith("the experts' inner size 192 ends in a block of 128")
    narrow = {**config, "moe_intermediate_size": 64, "hidden_size": 128}  # one block has more than all inputs
    assert rules(checks(tmp_path / "o", narrow)[0])[1] == ["expert blocks"]


def test_merged_linears_of_compressed_tensors_are_looked_at(tmp_path: Path) -> None:
    """vLLM lets those of ``fp8`` be. On one rank the last part may be of any length, but not in SGLang's ``fp8``."""
    config = {**SIZES, "intermediate_size": 2048 + 64}
    own, other = [
        checks(tmp_path / name, make_config(**config, quantization_config=form))[0]
        for name, form in (("m", COMPRESSED), ("n", FP8))
    ]
    assert rules(own) == (["blocks"], ["blocks"]) and rules(other) == ([], ["blocks"])
    assert "2112 of 2112 outputs of mlp.gate_up_proj a rank end in a block of 128" in own.vllm[0].why
    one_head = {**SIZES, "num_key_value_heads": 1}
    own, other = [
        checks(tmp_path / name, make_config(**one_head, quantization_config=form))[0]
        for name, form in (("o", COMPRESSED), ("p", FP8))
    ]
    assert rules(own) == (["blocks"], ["blocks"]) and rules(other) == ([], ["blocks"])


def test_blocks_of_experts_and_whole_experts(tmp_path: Path) -> None:
    config = make_config(
        "qwen3_moe",
        **SIZES,
        **MOE,
        quantization_config={**FP8, "modules_to_not_convert": [f"model.layers.{n}.self_attn" for n in (0, 1)]},
    )
    found = checks(tmp_path / "m", config)
    assert [rules(found[tp - 1]) for tp in (2, 4, 8, 16)] == [
        ([], []),
        (["Triton only"], ["expert blocks"]),
        (["Triton only"], ["expert blocks"]),
        (["expert blocks"], ["expert blocks"]),
    ]
    assert found[3].vllm[0].loads and "repeated every 64" in found[3].vllm[0].why
    narrow = checks(tmp_path / "w", {**config, "moe_intermediate_size": 128})  # w2 has one block for all its inputs
    assert [rules(narrow[tp - 1])[0] for tp in (1, 4, 8)] == [[], ["Triton only"], ["expert blocks"]]
    dealt = checks(tmp_path / "n", config, Cutting)
    assert [rules(dealt[tp - 1]) for tp in (2, 4, 8)] == [([], [])] * 3
    both = checks(tmp_path / "o", config, lambda tp: Cutting(2))
    assert rules(both[3]) == ([], []) and rules(both[7]) == (["Triton only"], ["expert blocks"])


@pytest.mark.parametrize(
    ("entries", "scales"),
    [
        ((Entry("", "weight", None, Axis(0), Axis(1)),), None),
        (
            (
                Entry("", "weight", ("F8_E4M3",), Axis(0), Axis(1)),
                Entry("", "weight_scale_inv", ("F32",), Axis(0, 128), Axis(1, 128)),
            ),
            Scales("fp8 native", 128, 128),
        ),
        (
            (
                Entry("", "weight", ("F8_E4M3",), Axis(0), Axis(1)),
                Entry("", "weight_scale", None, Axis(0), None, (1,)),
            ),
            None,
        ),
        (
            (
                Entry("", "qweight", ("I32",), Axis(1, 8, packed=True), Axis(0)),
                Entry("", "qzeros", ("I32",), Axis(1, 8, packed=True), Axis(0, 64)),
            ),
            Scales("int", 1, 64),
        ),
        (
            (
                Entry("", "weight_packed", ("I32",), Axis(0), Axis(1, 8, packed=True)),
                Entry("", "weight_scale", None, Axis(0), Axis(1, 2**31 - 1)),  # one for a whole row
            ),
            None,
        ),
        (
            (
                Entry("", "weight_packed", ("U8",), Axis(0), Axis(1, 2, packed=True)),
                Entry("", "weight_scale", ("F8_E4M3",), Axis(0), Axis(1, 16)),
            ),
            Scales("nvfp4", 1, 16),
        ),
        (
            (
                Entry("", "weight", ("U8",), Axis(0), Axis(1, 32, packed=True), (16,)),
                Entry("", "weight_scale", ("U8",), Axis(0), Axis(1, 32)),
            ),
            Scales("mxfp4", 1, 32),
        ),
    ],
    ids=["dense", "blocks", "channels", "AWQ", "whole rows", "NVFP4", "MXFP4"],
)
def test_what_scales_are_of(entries: tuple[Entry, ...], scales: Scales | None) -> None:
    storage = Storage("of a test", entries)
    up = Linear("up", Rule.COLUMN, (Part("up", 512, Even()),), 256, storage=storage)
    down = Linear("down", Rule.ROW, (Part("down", 256, Whole()),), 512, Even(), storage=storage)
    layer = CutBlock(Mixer("none", (), 8, 0, 0), (Gated(up, down),))
    assert [(axis.name, axis.kind, axis.scales) for axis in axes(layer)] == [
        ("up", "columns", scales),
        ("down", "rows", scales),
    ]
