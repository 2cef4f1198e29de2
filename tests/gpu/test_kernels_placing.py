"""Pairs placed by their experts, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tpctl.kernels.experts.placing import FEW, most_tiles, place, place_reference

pytestmark = pytest.mark.gpu


def check(ids: torch.Tensor, experts: int, block_m: int, first: int = 0) -> None:
    want = place_reference(ids, experts, block_m, first=first)
    for pdl in (False,) if INTERPRET else (False, True):
        got = place(ids, experts, block_m, first=first, pdl=pdl)
        assert torch.equal(got.pairs[: len(want.pairs)], want.pairs)
        assert len(got.tiles) == len(want.tiles)
        tiles = [one[one[:, 0] >= 0] for one in (got.tiles, want.tiles)]
        assert torch.equal(*tiles)
        assert torch.all(got.tiles[:, 0] >= -1)


def chosen(tokens: int, experts: int, per_token: int) -> torch.Tensor:
    return torch.rand(tokens, experts).argsort(-1)[:, :per_token].to(DEVICE, torch.int32)


@pytest.mark.parametrize("tokens,experts,per_token", [(1, 8, 2), (17, 128, 8), (64, 60, 4), (300, 5, 2), (40, 512, 10)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_places(tokens: int, experts: int, per_token: int, block_m: int) -> None:
    torch.manual_seed(tokens)
    ids = chosen(tokens, experts, per_token)
    check(ids, experts, block_m)
    check(ids, max(1, experts // 3), block_m, first=experts // 2)


@pytest.mark.parametrize("experts,first", [(40, 0), (10, 30)])
def test_pairs_of_several_chunks(experts: int, first: int) -> None:
    torch.manual_seed(0)
    check(chosen(FEW // 4 + 100, 40, 4), experts, 128, first=first)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 33])
def test_all_of_one_expert_and_none(count: int) -> None:
    ids = torch.full((count, 1), 3, dtype=torch.int32, device=DEVICE)
    check(ids, 4, 16)
    check(ids, 3, 16)  # it is another rank's


@pytest.mark.parametrize("pairs,experts,block_m", [(20000, 8, 16), (32768, 128, 16), (16385, 17000, 16), (29999, 2, 4)])
def test_as_many_tiles_as_there_may_be(pairs: int, experts: int, block_m: int) -> None:
    used = min(pairs, experts)
    worst = [1] * (used - 1) + [pairs - used + 1]  # no expert's pairs can make more tiles than that
    assert sum(-(-length // block_m) for length in worst) == most_tiles(pairs, experts, block_m)
    few = FEW  # each expert has room of its own, whatever the others' pairs are
    assert most_tiles(few, experts, block_m) == experts + few // block_m
