"""The kinds of weights in a report, and their pictures in the terminal."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.pictured import MOE
from tests.unit.reports import make_report, report_of
from tests.unit.shown import mixed
from tests.unit.synthetic import RUN, make_checkpoint, make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.safetensors import read_header, tensor_nbytes
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.bands import Band, bands, copied_bytes
from tpctl.sharding.showing.extra import apart
from tpctl.sharding.showing.kinds import Kind, flat, kinds
from tpctl.sharding.showing.picture import NAMES, draw
from tpctl.sharding.showing.report import ExtraReport, InspectReport

NINE = make_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=54, num_hidden_layers=4)


def found(config: dict[str, Any], tp_size: int, **options: Any) -> dict[str, Kind]:
    report, _ = make_report(config, tp_size, **options)
    return {kind.title: kind for kind in kinds(report)}


def picture(config: dict[str, Any], tp_size: int, **options: Any) -> str:
    return drawn(*make_report(config, tp_size, **options))


def drawn(report: InspectReport, model: ModelConfig) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(draw(kinds(report), model.blueprint, report.tp_size), soft_wrap=True)
    return capture.get()


def block(text: str, title: str) -> list[str]:
    """The lines of one kind's picture."""
    return next(part for part in text.split("\n\n") if part.startswith(f"{title} ")).splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells inside the boxes, a list of boxes a line."""
    return [line.split("│")[1::2] for line in lines if "│" in line]


def test_layers_that_are_cut_alike_are_one_kind() -> None:
    kinds_of = found(NINE, 2)
    assert kinds_of["self_attn.qkv_proj"].layers == (0, 1, 2, 3)
    assert kinds_of["norm"].layers == ()
    assert len(kinds_of) == 9
    two = found(make_config(num_hidden_layers=80), 4)
    assert len(two) == 9


@pytest.mark.parametrize("family", RUN)
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_bands_cover_every_source(family: str, tp_size: int) -> None:
    config = make_config(family)
    report, _ = make_report(config, tp_size)
    covered = 0
    for kind in flat(kinds(report)):
        for source in kind.sources:
            stops = [source.bands[0].start, *(band.stop for band in source.bands)]
            assert [band.start for band in source.bands] == stops[:-1]
            assert all(band.ranks for band in source.bands)
            assert source.shape[kind.dim] == stops[-1] - stops[0]
            covered += prod(source.shape) * max(1, len(kind.layers)) * max(1, kind.count)
    assert covered == sum(prod(shape) for shape in report.source_shapes.values())


def test_qkv_shows_heads_copies_and_unevenness() -> None:
    lines = block(picture(NINE, 4), "self_attn.qkv_proj")
    assert lines[0] == "self_attn.qkv_proj  layers 0-3  UNEVEN COPIES"
    assert "whole heads" in lines[1]
    cells = rows(lines)
    # 9 query heads as 2, 1, 3, 3; the first KV head on ranks 0 and 1, the others on one rank each.
    assert [set(line[0]) for line in cells] == [{"0"}, {"1"}, {"2"}, {"2"}, {"3"}, {"3"}]
    assert [set(line[1]) for line in cells] == [{"0", "1"}] * 2 + [{"2"}] * 2 + [{"3"}] * 2
    assert "  1 stores [18, 54]: q 12:18, k 0:6, v 0:6  (1 query, 1 KV heads)" in lines


def test_row_parallel_is_cut_upright_and_column_parallel_across() -> None:
    text = picture(make_config(), 2)
    down = rows(block(text, "mlp.down_proj"))
    assert {line[0] for line in down} == {"0" * 11 + "1" * 11}
    gate_up = rows(block(text, "mlp.gate_up_proj"))
    assert [set(line[0]) for line in gate_up] == [{"0"}] * 3 + [{"1"}] * 3
    assert all(len(line) == 2 for line in gate_up)
    assert "UNEVEN" not in text and "COPIES" not in text


def test_replicated_weights_name_every_rank() -> None:
    lines = block(picture(make_config(), 3), "input_layernorm")
    assert "whole on every rank" in lines[1]
    assert set(rows(lines)[0][0]) == {"0", "1", "2"}


def test_padding_is_said() -> None:
    lines = block(picture(make_config(vocab_size=70), 2), "lm_head")
    assert "  1 stores [64, 24]: 64:70 + 58 rows of zeros" in lines


def test_missing_ranks_are_dots() -> None:
    text = picture(NINE, 3, ranks=[1])
    assert "· not in this folder" in " ".join(text.split("\n\n")[0].split())
    cells = rows(block(text, "self_attn.qkv_proj"))
    assert [line[1][0] for line in cells] == ["·", "·", "1", "1", "·", "·"]
    down = rows(block(text, "mlp.down_proj"))
    assert set(down[0][0]) == {"·", "1"}


def test_many_ranks_stay_readable() -> None:
    config = make_config(num_attention_heads=128, num_key_value_heads=8, hidden_size=256, intermediate_size=2048)
    text = picture(config, 128)
    lines = block(text, "mlp.gate_up_proj")
    assert len(lines) < 40 and "… and " in lines[-2]
    assert f"from 61 on drawn as {NAMES[-1]}" in " ".join(text.split("\n\n")[0].split())


def test_experts_are_one_picture_times_their_number() -> None:
    lines = block(picture(MOE, 2), "mlp.experts.w13")
    assert lines[0] == "mlp.experts.w13  layers 1-2  UNEVEN"
    assert lines[1] == "  8 experts, all cut alike; column-parallel: output rows divided, gate and up alike"
    assert lines[2] == "  FP8 in blocks of 128 x 128: w13_weight F8_E4M3"
    assert "gate [384, 256] x 8" in lines[3] and "up [384, 256] x 8" in lines[3]
    assert [set(line[0]) for line in rows(lines)] == [{"0"}] * 4 + [{"1"}] * 2
    assert lines[-3:] == [
        "  0 stores [8, 512, 256]: gate 0:256, up 0:256",
        "  1 stores [8, 256, 256]: gate 256:384, up 256:384",
        "  with w13_weight_scale_inv F32 [3, 2] + [3, 2] x 8, one for a block of 128 x 128; cut with the weight",
    ]


def test_scales_that_both_sides_hold_are_counted() -> None:
    text = picture(MOE, 2, cutting=Cutting(even=True))
    assert block(text, "mlp.experts.w13")[-1].endswith("; cut with the weight, 2 of 6 rows copied: on 2 ranks")
    assert block(text, "mlp.experts.w2")[-1].endswith("; cut with the weight, 1 of 3 columns copied: on 2 ranks")
    assert "UNEVEN" not in block(text, "mlp.experts.w13")[0]


def test_dealt_experts_say_who_has_which() -> None:
    lines = block(picture(MOE, 4, cutting=Cutting(4)), "mlp.experts.w2")
    assert lines[1] == "  8 experts, dealt to the ranks, each of them whole"
    assert "experts [8]" in lines[3] and all(len(line) == 1 for line in rows(lines))
    assert "  3 stores [2, 256, 384]: experts 6:8, columns 0:384" in lines
    assert lines[-1].endswith("one for a block of 128 x 128; with its expert")


def test_experts_that_are_dealt_and_cut_are_drawn_both_ways() -> None:
    lines = block(picture(MOE, 4, cutting=Cutting(2, even=True)), "mlp.experts.w2")
    assert lines[1].startswith("  8 experts, dealt to 2 groups of ranks, and in each group cut alike; row-parallel: ")
    assert "down_proj [256, 384], one of 4" in lines[3]
    assert [set(line[0]) for line in rows(lines)] == [{"0", "1"}] * 3 + [{"2", "3"}] * 3
    assert all(set(line[1]) == {"0", "1"} for line in rows(lines))
    assert "  3 stores [4, 256, 192]: experts 4:8, columns 192:384" in lines
    missing = rows(block(picture(MOE, 4, cutting=Cutting(2), ranks=[2]), "mlp.experts.w2"))
    assert [set(line[0]) for line in missing] == [{"·"}] * 3 + [{"2"}] * 3


def test_words_beside_each_other_and_vectors_by_head() -> None:
    text = drawn(report_of(mixed(), 4), mixed())
    lines = block(text, "self_attn.qkv_proj")
    assert lines[1] == "  column-parallel: outputs divided in whole heads (outputs lie across here)"
    assert lines[2] == "  AWQ, 4 bits, groups of 32: qweight I32, an entry holds 8 packed values"
    assert rows(lines)[0][0].startswith("0000") and set(rows(lines)[0][1]) == {"0", "1", "2", "3"}
    assert "  1 stores [256, 16]: q 8:16, k 0:4, v 0:4  (2 query, 1 KV heads)" in lines
    assert (
        "with qzeros I32 [8, 32] + [8, 8] + [8, 8], an entry holds 8 packed values, each of a group of 32" in lines[-2]
    )
    assert "with scales F16 [8, 256] + [8, 64] + [8, 64], one for a group of 32 inputs" in lines[-1]
    lines = block(text, "linear_attn.A_log")
    assert lines[1] == "  divided by heads or channels" and lines[2].startswith("  A_log [8]")
    assert "  3 stores [64, 1, 4]: 192:256" in block(text, "linear_attn.conv1d")


def test_bands_of_ranges_that_overlap() -> None:
    assert bands({(0, 2): [0], (1, 3): [1, 2], (4, 5): [3]}, 0, 6) == (
        *(Band(0, 1, (0,)), Band(1, 2, (0, 1, 2)), Band(2, 3, (1, 2))),
        *(Band(3, 4, ()), Band(4, 5, (3,)), Band(5, 6, ())),
    )


@pytest.mark.parametrize(
    ("cutting", "tp_size"), [(Cutting(), 3), (Cutting(even=True), 4), (Cutting(2), 4), (Cutting(4), 4)]
)
def test_copied_bytes_are_what_shards_have_beyond_the_source(cutting: Cutting, tp_size: int, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", {**MOE, "num_hidden_layers": 2})
    shard_checkpoint(model, tmp_path / "out", tp_size, cutting=cutting)
    shards = Manifest.load(tmp_path / "out").shards.values()
    stored = sum(tensor_nbytes(one.dtype, one.shape) for shard in shards for one in shard.tensors.values())
    padding = 2 * 256 * 2 * (128 - 70)  # rows of zeros of embedding and head
    whole = sum(info.nbytes for info in read_header(model / "model.safetensors").tensors.values())
    assert copied_bytes(shard.tensors for shard in shards) == stored - padding - whole


def test_what_is_beside_the_model_is_grouped() -> None:
    extra = [ExtraReport(f"mtp.layers.{n}.fc.weight", "BF16", (2, 3), 12) for n in range(3)]
    extra += [ExtraReport("visual.blocks.7.norm", "F32", (4,), 16), ExtraReport("mtp.norm", "BF16", (), 2)]
    assert [(one.name, one.dtype, one.shape, one.count, one.nbytes) for one in apart(extra)] == [
        ("mtp.layers.N.fc.weight", "BF16", "[2, 3]", 3, 36),
        ("visual.blocks.7.norm", "F32", "[4]", 1, 16),
        ("mtp.norm", "BF16", "[]", 1, 2),
    ]
