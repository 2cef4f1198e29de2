"""The kinds of weights in a report, and their pictures in the terminal."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from rich.console import Console

from tests.unit.reports import make_report
from tests.unit.synthetic import RUN, make_config
from tpctl.sharding.showing.kinds import Kind, kinds
from tpctl.sharding.showing.picture import NAMES, draw

NINE = make_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=54, num_hidden_layers=4)


def found(config: dict[str, Any], tp_size: int, **options: Any) -> dict[str, Kind]:
    report, _ = make_report(config, tp_size, **options)
    return {kind.title: kind for kind in kinds(report)}


def picture(config: dict[str, Any], tp_size: int, **options: Any) -> str:
    report, model = make_report(config, tp_size, **options)
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(draw(kinds(report), model.blueprint))
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
    for kind in kinds(report):
        for source in kind.sources:
            stops = [source.bands[0].start, *(band.stop for band in source.bands)]
            assert [band.start for band in source.bands] == stops[:-1]
            assert all(band.ranks for band in source.bands)
            assert source.shape[kind.dim] == stops[-1] - stops[0]
            covered += prod(source.shape) * max(1, len(kind.layers))
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
