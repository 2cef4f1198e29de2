"""Paged prefill attention against its reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET, relative_error
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,block_size,window",
    [
        *(() if INTERPRET else [(16, 8, 128, 64, None)]),
        (4, 1, 128, 256, 100),
        (9, 3, 64, 16, None),
        (6, 2, 80, 32, 70),
        (3, 1, 96, 128, None),
        (2, 2, 64, 128, 33),
        (4, 2, 256, 128, None),
    ],
)
@pytest.mark.parametrize("batch", ["short", "mixed"] if INTERPRET else ["short", "mixed", "long"])
@pytest.mark.parametrize("sunk", [False, True])
def test_matches_reference(sunk, batch, heads, kv_heads, head_dim, block_size, window, dtype):
    torch.manual_seed(heads)
    pairs = {  # (new tokens, cached prefix)
        "short": [(1, 0), (5, 130), (17, 64), (1, 40), (33, 3)],
        "mixed": [(70, 0), (3, 200), (129, 1)],
        "long": [(700, 300), (257, 0), (128, 128), (1, 900)],
    }[batch]
    lens = [new + cached for new, cached in pairs]
    counts = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(counts) + 2)[: sum(counts)].int()
    tables = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
    start = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[start : start + count]
        start += count
    caches = []
    for _ in range(2):
        cache = torch.randn(sum(counts) + 2, block_size, kv_heads, head_dim)
        for row, length in enumerate(lens):
            if length % block_size:
                cache[tables[row, counts[row] - 1], length % block_size :] = float("nan")
        caches.append(cache.to(DEVICE, dtype))
    starts = torch.tensor([0, *torch.tensor([new for new, _ in pairs]).cumsum(0).tolist()], dtype=torch.int32)
    arguments = (tables.to(DEVICE), starts.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE))
    q = torch.randn(int(starts[-1]), heads, head_dim).to(DEVICE, dtype)
    options = {"window": window, "sinks_N": (3 * torch.randn(heads)).to(DEVICE, dtype) if sunk else None}
    want = paged_prefill_reference(q.double(), caches[0].double(), caches[1].double(), *arguments, **options)
    out = paged_prefill(q, *caches, *arguments, **options, out=torch.full_like(q, float("nan")))
    assert relative_error(out, want) < (1e-5 if dtype is torch.float32 else 8e-3)


@pytest.mark.parametrize("block_size,window", [(16, 40), (16, 1), (32, 100), (64, 70), (128, 33)])
def test_blocks_that_every_window_has_passed_are_not_read(block_size: int, window: int) -> None:
    """Their memory is another pool's by then; here it holds NaN."""
    torch.manual_seed(1)
    pairs = [(5, 130), (70, 0), (33, 200), (3, 257)]
    lens = [new + cached for new, cached in pairs]
    counts = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(counts)).int() + 1
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    caches = [torch.randn(sum(counts) + 1, block_size, 2, 64).to(DEVICE, DTYPES[0]) for _ in range(2)]
    starts = torch.tensor([0, *torch.tensor([new for new, _ in pairs]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), 4, 64).to(DEVICE, DTYPES[0])
    others = (starts.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE))
    wide = [one.double() for one in (q, *caches)]
    want = paged_prefill_reference(*wide, tables.to(DEVICE), *others, window=window)
    for row, (_, cached) in enumerate(pairs):
        tables[row, : max(0, cached - window + 1) // block_size] = 0
    for cache in caches:
        cache[0] = float("nan")
    out = paged_prefill(q, *caches, tables.to(DEVICE), *others, window=window)
    assert relative_error(out, want) < (1e-5 if DTYPES[0] is torch.float32 else 8e-3)
