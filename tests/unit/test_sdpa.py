"""The plain-torch attention backend against attention written out token by token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.attention_cases import BLOCK, CASES, SINKS, written_out
from tpctl.arch.rope import RopeConfig
from tpctl.layers.attention import sdpa_prompts
from tpctl.layers.attention.base import AttentionPlan, AttentionSpec
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.layers.batch import ForwardBatch, PoolTables
from tpctl.layers.rotary import RotaryTable


def attend(lengths: list[tuple[int, int]], heads: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the backend computes for random tokens, stored in two steps (prefix, then new), and what it should."""
    torch.manual_seed(0)
    backend = SdpaBackend([heads, heads], BLOCK)
    counts = [-(-length // BLOCK) for _, length in lengths]
    ids = torch.randperm(sum(counts) + 3)[: sum(counts)].int()
    kv = backend.allocate(sum(counts) + 3, dtype, torch.device("cpu"))[1]
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, own in enumerate(ids.split(counts)):
        tables[row, : len(own)] = own
    total = [torch.randn(length, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim) for _, length in lengths]
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]

    def batch(ranges: list[tuple[int, int]]) -> tuple[ForwardBatch, list[Tensor]]:
        slots = [
            tables[row, at // BLOCK].item() * BLOCK + at % BLOCK
            for row, (start, end) in enumerate(ranges)
            for at in range(start, end)
        ]
        tokens = torch.cat([x[start:end] for x, (start, end) in zip(total, ranges, strict=True)]).to(dtype)
        forward = ForwardBatch(
            input_ids=torch.zeros(len(slots), dtype=torch.int64),
            rope_positions=torch.zeros(len(slots), dtype=torch.int64),
            pools=(PoolTables(torch.tensor(slots, dtype=torch.int64), tables),),
            query_lens=[end - start for start, end in ranges],
            seq_lens=[end for _, end in ranges],
            num_decodes=sum(new == 1 for new, _ in lengths),
            logits_rows=torch.zeros(0, dtype=torch.int64),
        )
        return forward, list(tokens.split(sizes, dim=1))

    prefix, (_, k, v) = batch([(0, length - new) for new, length in lengths])
    backend.store(k, v, kv, backend.begin(prefix))
    forward, (q, k, v) = batch([(length - new, length) for new, length in lengths])
    plan = backend.begin(forward)
    backend.store(k, v, kv, plan)
    found = backend.attend(q, k, v, kv, plan, SINKS.to(dtype) if heads.sinks else None)
    expected = []
    for x, (new, length) in zip(total, lengths, strict=True):
        q_all, k_all, v_all = x.to(dtype).split(sizes, dim=1)
        for at in range(length - new, length):
            expected.append(written_out(q_all[at], k_all[: at + 1], v_all[: at + 1], heads))
    return found, torch.stack(expected).flatten(1)


@pytest.mark.parametrize("most_scores", [1 << 23, 2000])  # 2,000: fewer sequences and queries at a time
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [
        *((None, None, sinks) for sinks in (False, True)),
        *((20, None, sinks) for sinks in (False, True)),
        *((1, None, False), (100, None, False), (None, 2.0, False), (20, 0.5, True)),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_attention_written_out(
    case: str,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    most_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sdpa_prompts, "MOST_SCORES", most_scores)
    heads = AttentionSpec(6, 2, 12, 1 / math.sqrt(12), window, softcap, sinks)
    found, expected = attend(CASES[case], heads, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [3, 6, 8, 64])  # rows of 6, 12, 16 and 128 bytes
def test_rows_of_any_width_are_stored_whole(head_dim: int) -> None:
    heads = AttentionSpec(num_heads=3, num_kv_heads=3, head_dim=head_dim, scale=0.3)
    found, expected = attend(CASES["all together"], heads, torch.bfloat16)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


def test_the_scores_held_at_once_stay_bounded_when_the_context_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_prompts, "MOST_SCORES", 20_000)
    widest = 0
    multiply = torch.baddbmm

    def watched(*args: Tensor, **options: float) -> Tensor:
        nonlocal widest
        scores = multiply(*args, **options)
        widest = max(widest, scores.numel())
        return scores

    monkeypatch.setattr(torch, "baddbmm", watched)
    heads = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=4, scale=0.5)
    attend([(200, 300)] * 3, heads, torch.float32)
    assert 0 < widest <= 20_000


def test_a_tables_angles_are_never_anothers() -> None:
    """Also where one is made at the address of another that is gone."""
    batch: Any = SimpleNamespace(rope_positions=torch.arange(4))
    plan = AttentionPlan(batch)
    for theta in range(2, 40):
        config = RopeConfig("default", float(theta), 8, 16, 16)
        found = plan.angles(RotaryTable(config, 16, "cpu"), torch.float32)
        assert found is not None
        torch.testing.assert_close(found, RotaryTable(config, 16, "cpu").angles(batch.rope_positions, torch.float32))
