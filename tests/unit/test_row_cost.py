"""What rows and drafts are held to cost on a GPU, beside steps of an H200 (docs/log/2026-11-30-mtp-on-a-gpu.md)."""

from __future__ import annotations

import pytest

from tpctl.bench.synthetic import shape_config
from tpctl.engine.runners.row_cost import cost_of, predicted_cost
from tpctl.engine.scheduling.speculation import RowCost, best_count

QWEN3 = {(1, 0): 0.648, (2, 0): 0.751, (4, 0): 0.949, (8, 0): 1.066, (1, 3): 1.043, (1, 7): 1.142, (2, 7): 1.228}
"""Milliseconds of a step of Qwen3-0.6B with so many sequences, each with so many drafts."""


def test_steps_as_they_were_measured() -> None:
    cost = cost_of(shape_config("qwen3-0.6b").blueprint, 1_192_099_840)
    one = QWEN3[1, 0] / cost.time(1, False)
    for (sequences, drafts), took in QWEN3.items():
        assert one * cost.time(sequences * (1 + drafts), drafts > 0) == pytest.approx(took, rel=0.08)


def test_what_reads_for_long_drafts_more() -> None:
    """Of drafts that seldom hold, a large model takes some, and a small one, which rows cost more, none."""
    large, small = shape_config("llama-3.1-8b").blueprint, shape_config("qwen3-0.6b").blueprint
    chances = [0.3] * 4
    assert best_count(chances, cost_of(large, 16_060_522_496), 1, 4) >= 1
    assert best_count(chances, cost_of(small, 1_192_099_840), 1, 4) == 0
    assert best_count([0.95] * 8, cost_of(small, 1_192_099_840), 1, 8) == 8


def test_a_row_of_a_mixture_reads_its_experts() -> None:
    blueprint = shape_config("qwen3-30b-a3b").blueprint
    cost = cost_of(blueprint, 61_064_245_248)
    chosen = 48 * 8 * 3 * 768 * 2048
    shared = 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048 + 128 * 2048) + 151_936 * 2048
    assert predicted_cost(RowCost(0, 0), blueprint).row == pytest.approx(chosen / shared, rel=1e-3)
    assert 0.3 < cost.row < chosen / shared
    assert best_count([0.5] * 4, cost, 1, 4) == 0
