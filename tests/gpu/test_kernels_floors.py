"""Top-k, top-p and min-p found without sorting, against sorting; and sampling above the floors."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from tests.gpu.here import DEVICE, INTERPRET
from tpctl.kernels.common.noise import NOT_FINITE, sample_reference
from tpctl.kernels.sampling.floors import Filters, sampling_floors, sampling_floors_reference
from tpctl.kernels.sampling.sampling import sample

pytestmark = pytest.mark.gpu


# temperature, top_k, top_p, min_p
ROWS = [
    (0.6, 0, 0.95, 0.0),
    (1.0, 20, 1.0, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.3, 1, 1.0, 0.0),
    (1.0, 0, 0.05, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 50, 0.999, 0.3),
    (2.5, 0, 0.999, 0.0),
    (0.0, 20, 0.5, 0.5),  # greedy: its filters change nothing
    (1.0, 0, 1.0, 0.0),
    (1e-4, 0, 0.9, 0.0),
    (1e4, 0, 0.5, 0.0),
    (1.0, 10**6, 1.0, 0.0),  # more than there are
]


def filters(rows: list[tuple[float, int, float, float]]) -> Filters:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Filters(
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
    )


def nearly(found: Tensor, logits_WRV: Tensor, given: Filters, vocab_size: int) -> None:
    """What the floors keep: the reference's tokens, or at the edge of a top-p set one value more or fewer, where the
    sums' rounding decides."""
    want = sampling_floors_reference(logits_WRV, given, vocab_size=vocab_size)
    whole = torch.cat(list(logits_WRV), dim=1)[:, :vocab_size].float()
    for row, (logits, floor, wanted) in enumerate(zip(whole, found, want, strict=True)):
        between = logits[(logits >= min(floor, wanted)) & (logits < max(floor, wanted))]
        assert len(between.unique()) <= (given.top_p[row] < 1), row
        share = (logits / given.temperature[row].clamp(min=1e-4)).double().softmax(0)
        low = share[logits >= min(floor, wanted)].sum() - share[logits >= max(floor, wanted)].sum()
        edge = share[logits >= floor].sum() if given.top_k[row] <= 0 else given.top_p[row]
        assert not len(between) or low < 1e-3 or abs(edge - given.top_p[row]) < 1e-5, row


def made(ranks: int, rows: int, width: int, dtype: torch.dtype, spread: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(ranks, rows, width) * spread).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [0.02, 3.0])
@pytest.mark.parametrize("ranks,width,vocab_size", [(1, 5000, 5000), (2, 4200, 8100), (3, 100, 150)])
def test_floors(ranks: int, width: int, vocab_size: int, spread: float, dtype: torch.dtype) -> None:
    logits = made(ranks, len(ROWS), width, dtype, spread)
    given = filters(ROWS)
    nearly(sampling_floors(logits, given, vocab_size=vocab_size, both=True), logits, given, vocab_size)


def test_one_search_where_no_row_has_two_filters() -> None:
    rows = [row for row in ROWS if not (row[1] and row[2] < 1)]
    logits, given = made(1, len(rows), 6000, torch.bfloat16, 2.0), filters(rows)
    found = sampling_floors(logits, given, vocab_size=6000, both=False)
    nearly(found, logits, given, 6000)
    assert torch.equal(found, sampling_floors(logits, given, vocab_size=6000, both=True))


def test_ties_infinities_and_nan() -> None:
    logits = torch.full((1, 4, 4500), float("-inf"), device=DEVICE)
    logits[0, 0, 40:50] = 2.0  # ten equals
    logits[0, 1, 4400] = 1.0
    logits[0, 2, :] = 0.0
    logits[0, 2, 7] = -0.0
    logits[0, 3, :] = float("nan")
    logits[0, 3, 9] = 3.0
    for rows in ([(1.0, 3, 1.0, 0.0)] * 4, [(1.0, 0, 0.5, 0.0)] * 4, [(1.0, 3, 0.5, 0.0)] * 4):
        floors = sampling_floors(logits, filters(rows), vocab_size=4500, both=True).tolist()
        assert floors[0] == 2.0
        assert floors[1] == (1.0 if rows[0][2] < 1 else float("-inf"))
        assert floors[2] == 0.0
        assert floors[3] == (3.0 if rows[0][2] < 1 else float("-inf"))


@pytest.mark.parametrize(
    "row", [(1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 3, 0.5, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 3, 0.5, 0.1)]
)
def test_rows_that_are_not_finite_pass_their_floors(row: tuple[float, int, float, float]) -> None:
    """Whatever a floor is made of them."""
    logits = torch.randn(1, 4, 4500, device=DEVICE)
    logits[0, 1, 4400] = float("nan")
    logits[0, 2, 4400] = float("inf")
    logits[0, 3] = float("nan")
    keys = torch.randint(0, 2**32, (4, 2), device=DEVICE)
    given = filters([row] * 4)
    floors = sampling_floors(logits, given, vocab_size=4500, both=True)
    ids = sample(logits[0], given.temperature, keys, floors_T=floors)[1].tolist()
    assert ids[0] >= 0
    assert ids[1:] == [NOT_FINITE] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_reaches_its_floor_is_sampled(dtype: torch.dtype) -> None:
    rows, width = 12 if INTERPRET else 64, 6000
    logits = made(1, 1, width, dtype, 1.0).expand(1, rows, width).contiguous()
    given = filters([(0.8, 5, 1.0, 0.0)] * rows)
    keys = torch.randint(0, 2**32, (rows, 2), device=DEVICE)
    floors = sampling_floors(logits, given, vocab_size=width, both=False)
    scores, ids = sample(logits[0], given.temperature, keys, floors_T=floors)
    masked = logits[0].masked_fill(logits[0] < floors[:, None], float("-inf"))
    want_scores, want_ids = sample_reference(masked, given.temperature, keys)
    assert torch.equal(ids, want_ids)
    assert torch.allclose(scores, want_scores, rtol=1e-5, atol=1e-5)
    assert 2 <= len(ids.unique()) <= 5 + (dtype is torch.bfloat16) * 20
    # A slice that holds none of them scores lower than every other.
    low = torch.full((rows, 300), -20.0, dtype=dtype, device=DEVICE)
    scores, ids = sample(low, given.temperature, keys, vocab_start=7, floors_T=floors)
    assert torch.all(scores == float("-inf")) and torch.all(ids == NOT_FINITE)
