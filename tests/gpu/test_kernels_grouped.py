"""The experts of many tokens against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DTYPES, INTERPRET
from tests.gpu.random_experts import CLAMPED, check_launch, coded_experts, random, random_experts, random_routed, wanted
from tpctl.kernels.experts.grouped import grouped
from tpctl.kernels.experts.tile_config import TileConfig, pick_block_m, pick_tile

pytestmark = pytest.mark.gpu

CONFIGS = [None, (TileConfig(16, 16, 32, 4, 2), TileConfig(16, 64, 16, 2, 3))]


def check(routed, experts, error: float, *, configs=None, shared: bool = False, residual: bool = False) -> None:
    want, more = wanted(routed, experts), {}
    if shared:
        more["shared_TH"] = random(*routed.x.shape, dtype=routed.x.dtype)
        want = want + more["shared_TH"].double() * (1 if routed.factors is None else routed.factors.double()[:, None])
    check_launch(grouped, routed, experts, want, error, residual=residual, configs=configs, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True),
                                                       ("gelu_tanh", True, False)])  # fmt: skip
@pytest.mark.parametrize("configs", CONFIGS)
@pytest.mark.parametrize("parts", ["plain", "shared", "residual", "all"])
@pytest.mark.parametrize(
    "rows,count,per_token,hidden,width",
    [(2, 8, 8, 48, 96), (16, 5, 2, 72, 36), (40, 6, 3, 40, 24), (17, 3, 1, 64, 40)],
)
def test_grouped(rows, count, per_token, hidden, width, parts, configs, activation, biases, interleaved, dtype) -> None:
    torch.manual_seed(rows)
    experts = random_experts(
        count, hidden, width, dtype, biases=biases, activation=activation, interleaved=interleaved, first=2
    )
    routed = random_routed(rows, hidden, count, per_token, dtype, factors=parts == "all")
    routed = routed._replace(ids=routed.ids + 2)
    error = 1e-5 if dtype is torch.float32 else 1e-2
    check(routed, experts, error, configs=configs, shared=parts in ("shared", "all"), residual=parts != "plain")


@pytest.mark.parametrize("rows", [3, 20])
def test_experts_of_other_ranks_add_nothing(rows: int) -> None:
    torch.manual_seed(rows)
    experts = random_experts(4, 48, 32, DTYPES[0], biases=True, first=4)
    routed = random_routed(rows, 48, 12, 3, DTYPES[0])
    check(routed, experts, 1e-5 if INTERPRET else 1e-2)
    nobody = routed._replace(ids=routed.ids % 4)
    assert (grouped(nobody, experts) == 0).all()
    nothing = routed._replace(x=routed.x[:0], ids=routed.ids[:0], weights=routed.weights[:0])
    assert grouped(nothing, experts).shape == (0, 48)


def test_in_float32_a_result_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    experts = random_experts(5, 72, 40, torch.float32)
    routed = random_routed(33, 72, 5, 3, torch.float32)
    whole = grouped(routed, experts)
    if not INTERPRET:  # whose products are numpy's
        large = (TileConfig(32, 16, 32, 4, 2), TileConfig(32, 32, 16, 4, 2))
        assert torch.equal(whole, grouped(routed, experts, configs=large))
    for start, stop in ((0, 1), (1, 9), (9, 33)):
        part = routed._replace(**{name: getattr(routed, name)[start:stop] for name in ("x", "ids", "weights")})
        assert torch.equal(grouped(part, experts), whole[start:stop])


CODES = [
    ("e4m3", {"unit": 32, "rows_unit": 32}),
    ("e4m3", {"factors": True}),
    ("int8", {}),
    ("uint4", {"unit": 32, "zeros": True}),
    ("uint4", {"unit": 32, "first": 8}),
    ("e2m1", {"unit": 32, "exponents": True}),
    ("e2m1", {"unit": 16, "factors": True}),
    ("uint4", {"unit": 16, "groups": True, "zeros": True}),
    ("e4m3", {"unit": 32, "zeros": True}),
]


@pytest.mark.parametrize("kind,codes", CODES)
@pytest.mark.parametrize("rows", [4, 18])
def test_codes(rows, kind, codes) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[0]
    plain = random_experts(4, 64, 48, dtype, biases=True, activation=CLAMPED, interleaved=True)
    experts = coded_experts(4, 64, 48, kind, experts=plain, **codes)
    for configs in CONFIGS:
        check(random_routed(rows, 64, 4, 2, dtype), experts, 1e-5 if INTERPRET else 1e-2, configs=configs)


@pytest.mark.usefixtures("assembly")
@pytest.mark.parametrize("kind,codes", [CODES[0], CODES[3], CODES[5]])
def test_codes_in_bfloat16(kind, codes) -> None:
    """Whose numbers are made by bits."""
    torch.manual_seed(0)
    plain = random_experts(3, 64, 64, torch.bfloat16, biases=True)
    experts = coded_experts(3, 64, 64, kind, experts=plain, **codes)
    check(random_routed(3, 64, 3, 2, torch.bfloat16), experts, 1e-2, residual=True)


@pytest.mark.parametrize("kind,most", [("e2m1", 32), ("uint4", 32), ("int8", 128)])
def test_packed_codes_have_smaller_tiles(kind: str, most: int) -> None:
    plain = random_experts(2, 64, 64, torch.bfloat16)
    routed = random_routed(300, 64, 2, 2, torch.bfloat16)
    assert [tile.block_m for tile in plain.tiles(routed, 2)] == [128, 128]
    assert [tile.block_m for tile in coded_experts(2, 64, 64, kind, experts=plain).tiles(routed, 2)] == [most, most]
    if most == 32:
        few = random_routed(14, 64, 2, 2, torch.bfloat16)
        few = few._replace(**{name: torch.cat([getattr(few, name)] * 2) for name in ("x", "ids", "weights")})
        coded = coded_experts(2, 64, 64, kind, experts=plain)
        assert [tile.block_m for tile in coded.tiles(few, 4)] == [16, 16]
        assert [(tile.block_m, tile.block_k) for tile in coded.tiles(few, 3)] == [(32, 64)] * 2
    mixed = replace(plain, down=coded_experts(2, 64, 64, kind, experts=plain).down)
    assert [tile.block_m for tile in mixed.tiles(routed, 2)] == [most, most]


@pytest.mark.parametrize("limit", [232448, 166912, 101376])
def test_choice(limit: int) -> None:
    assert [pick_block_m(rows * 8, 128) for rows in (64, 256, 512, 8192)] == [16, 32, 64, 128]
    assert pick_tile(16, gated=True, itemsize=2, limit=232448) == TileConfig(16, 64, 128, 4, 3)
    assert pick_tile(16, gated=True, itemsize=2, limit=232448, codes=True).num_warps == 2
    for block_m in (16, 32, 64, 128):
        for gated in (False, True):
            for itemsize in (2, 4):
                config = pick_tile(block_m, gated=gated, itemsize=itemsize, limit=limit, codes=gated)
                rows = block_m + config.block_n * (1 + gated)
                assert config.num_stages * rows * config.block_k * itemsize <= limit
