"""Attention whose scores are capped, as of Gemma 2, over every form of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu import packed_cases, test_kernels_fp8
from tests.gpu.here import DEVICE, DTYPE, INTERPRET
from tests.gpu.packed_cases import close, queries, sinks_of, starts_of, tables_of, vectors
from tpctl.kernels.attention.paged_decode import (
    DecodeConfig,
    DecodePlan,
    DecodeScratch,
    paged_decode,
    paged_decode_reference,
)
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference

pytestmark = pytest.mark.gpu

CAP, SCALE = 1.5, 0.5
"""Most scores of ``queries`` are far beyond the cap."""


def plain_cache(lens: list[int], kv_heads: int, head_dim: int, block_size: int) -> Any:
    tables, blocks = tables_of(lens, block_size)
    caches = [vectors(blocks, block_size, kv_heads, head_dim, seed=seed).to(DTYPE) for seed in (1, 2)]
    return tables, (*caches, None), caches


CACHES: dict[str, Any] = {
    "model": plain_cache,
    "packed": packed_cases.cache_of,
    "fp8": test_kernels_fp8.cache_of,
}
FORMS = pytest.mark.parametrize("form", CACHES)
WINDOWS = pytest.mark.parametrize(("window", "sunk"), [(None, False), (40, False), (None, True)])


@WINDOWS
@FORMS
@pytest.mark.parametrize(
    "config",
    [DecodeConfig(16, 7, 4, 2), DecodeConfig(16, 2, 4, 2, ahead=True), *(() if INTERPRET else [None])],
)
def test_decode(config: DecodeConfig | None, form: str, window: int | None, sunk: bool) -> None:
    """Sequences that programs divide, and sequences that they read whole."""
    lens = [5, 200, 0, 64, 3]
    tables, (k, v, factors), plain = CACHES[form](lens, 2, 64, 32)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q, scratch = queries(len(lens), 6, 64), DecodeScratch.allocate(len(lens), 6, 64, DEVICE)
    form_of = {"itemsize": DTYPE.itemsize, "packed": factors is not None}
    plan = DecodePlan(len(lens), 6, 2, 64, 32, scratch, window=window, softcap=CAP, config=config, **form_of)
    plan.update(seq_lens)
    options: dict[str, Any] = {"scale": SCALE, "sinks_N": sinks_of(6) if sunk else None}
    got = paged_decode(q, k, v, tables, seq_lens, plan, factors=factors, **options)
    options["window"] = window
    want = paged_decode_reference(q, *plain, tables, seq_lens, softcap=CAP, **options)
    live = seq_lens > 0
    close(got[live], want[live])
    uncapped = paged_decode_reference(q, *plain, tables, seq_lens, **options)
    assert (uncapped - want)[live].norm() > 0.3 * want[live].norm()


@WINDOWS
@FORMS
def test_prefill(form: str, window: int | None, sunk: bool) -> None:
    new, lens = [70, 3], [70, 90]
    tables, (k, v, factors), plain = CACHES[form](lens, 2, 64, 32)
    q, rest = queries(sum(new), 6, 64), (tables, starts_of(new), torch.tensor(lens, dtype=torch.int32, device=DEVICE))
    options: dict[str, Any] = {"scale": SCALE, "window": window, "sinks_N": sinks_of(6) if sunk else None}
    got = paged_prefill(q, k, v, *rest, factors=factors, softcap=CAP, **options)
    want = paged_prefill_reference(q, *plain, *rest, softcap=CAP, **options)
    close(got, want)
    assert (paged_prefill_reference(q, *plain, *rest, **options) - want).norm() > 0.3 * want.norm()


@pytest.mark.parametrize("cap", [0.001, 50.0])
def test_scores_at_both_ends_of_a_cap(cap: float) -> None:
    """A cap that all scores reach makes their weights alike; of one that none comes near, nothing is seen."""
    tables, (k, v, _), plain = plain_cache([70], 1, 64, 32)
    q, seq_lens = queries(1, 2, 64), torch.tensor([70], dtype=torch.int32, device=DEVICE)
    scale = 1e4 if cap < 1 else 1e-3
    plan = DecodePlan(1, 2, 1, 64, 32, DecodeScratch.allocate(1, 2, 64, DEVICE), softcap=cap, itemsize=DTYPE.itemsize)
    plan.update(seq_lens)
    got = paged_decode(q, k, v, tables, seq_lens, plan, scale=scale)
    close(got, paged_decode_reference(q, *plain, tables, seq_lens, scale=1e-9 if cap < 1 else scale))
