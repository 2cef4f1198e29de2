"""Latent attention's kernels against their references: what is kept and absorbed, decodes, prompts, values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, relative_error
from tpctl.kernels.attention.latent_decode import (
    LatentPlan,
    LatentScratch,
    latent_attention_reference,
    latent_config,
    latent_decode,
)
from tpctl.kernels.attention.latent_plain import latent_plain, latent_plain_reference
from tpctl.kernels.attention.latent_prefill import latent_prefill
from tpctl.kernels.attention.latent_prepare import LatentShape, latent_prepare, latent_prepare_reference
from tpctl.kernels.attention.latent_values import latent_values, latent_values_reference

pytestmark = pytest.mark.gpu
SMALL, ODD, WIDE = LatentShape(32, 16, 8, 16), LatentShape(12, 6, 4, 5), LatentShape(512, 128, 64, 128)
SHAPES = [SMALL, ODD, WIDE]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(DEVICE, dtype)


def make_cache(lens: list[int], width: int, block_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A random cache with shuffled blocks, and block tables; what no sequence owns holds NaN."""
    counts = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(counts) + 2)[: sum(counts)]
    cache = torch.full((sum(counts) + 2, block_size, width), float("nan"))
    tables = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
    at = 0
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        tables[row, :count] = order[at : at + count].int()
        for block in range(count):
            owned = min(block_size, length - block * block_size)
            cache[order[at + block], :owned] = torch.randn(owned, width)
        at += count
    return cache.to(DEVICE, dtype), tables.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens,absorbed", [(1, 1), (5, 5), (21, 18), (4, 0)])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_and_what_is_kept(
    shape: LatentShape, heads: int, tokens: int, absorbed: int, interleaved: bool, dtype: torch.dtype
) -> None:
    rank, nope, rope, value = shape
    both = random(tokens, heads * (nope + rope) + rank + rope, dtype=dtype)  # as one linear leaves them
    q, kept = both[:, : heads * (nope + rope)], both[:, heads * (nope + rope) :]
    kv_b = random(heads * (nope + value), rank, dtype=dtype)
    norm = (torch.rand(rank).to(DEVICE, dtype) + 0.5, 1e-6)
    angles = torch.rand(40, rope // 2) * 6
    tables = (angles.cos().to(DEVICE), angles.sin().to(DEVICE))
    positions = torch.randint(0, 40, (tokens,)).to(DEVICE)
    slots = torch.randperm(48)[:tokens].to(DEVICE)
    slots[tokens // 2] = -1
    made = []
    for way in (latent_prepare, latent_prepare_reference):
        cache = torch.zeros(3, 16, rank + rope, dtype=dtype, device=DEVICE)
        found = way(q, kept, kv_b, cache, norm, tables, positions, slots, shape, num_absorbed=absorbed,
                    interleaved=interleaved)  # fmt: skip
        made.append((*found, cache))
    for got, want in zip(*made, strict=True):
        assert got.shape == want.shape
        assert not want.numel() or relative_error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 37, 70])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_sums(shape: LatentShape, heads: int, tokens: int, dtype: torch.dtype) -> None:
    sums = random(tokens, heads, shape.rank, dtype=dtype)
    kv_b = random(heads * (shape.nope + shape.value), shape.rank, dtype=dtype)
    wide = torch.zeros(tokens, heads * shape.value + 3, dtype=dtype, device=DEVICE)
    got = latent_values(sums, kv_b, shape, out=wide[:, 3:])
    assert relative_error(got, latent_values_reference(sums, kv_b, shape)) < BOUND[dtype]
    assert (wide[:, :3] == 0).all()


LENS = {"one": [70], "short": [1, 2, 3], "border": [16, 32, 33, 0, 64, 65, 0], "many": [5, 300, 0, 64, 1, 129, 17, 8]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("heads", [1, 3, 16, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: LatentShape, heads: int, lens: str, block_size: int, dtype: torch.dtype) -> None:
    lengths, width = LENS[lens], shape.rank + shape.rope
    cache, tables = make_cache(lengths, width, block_size, dtype)
    q = random(len(lengths), heads, width, dtype=dtype)
    plan = LatentPlan(len(lengths), heads, shape.rank, shape.rope, block_size,
                      LatentScratch.allocate(heads, shape.rank, DEVICE), itemsize=dtype.itemsize)  # fmt: skip
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    live = seq_lens > 0
    want = q.new_zeros(len(lengths), heads, shape.rank)
    kept = [length for length in lengths if length]
    want[live] = latent_attention_reference(
        q[live], cache, tables[live], [1] * len(kept), kept, shape.rank, scale=width**-0.5
    )
    plan.update(seq_lens)
    out = torch.full_like(want, float("nan"))
    latent_decode(q, cache, tables, seq_lens, plan, scale=width**-0.5, out=out)
    assert relative_error(out[live], want[live]) < BOUND[dtype]
    assert out[~live].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("new,lens", [([37], [37]), ([1, 5, 0, 20], [17, 5, 0, 52]), ([3, 2], [131, 2])])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_absorbed(
    shape: LatentShape, heads: int, new: list[int], lens: list[int], block_size: int, dtype: torch.dtype
) -> None:
    width = shape.rank + shape.rope
    cache, tables = make_cache(lens, width, block_size, dtype)
    q = random(sum(new) + 2, heads, width, dtype=dtype)
    starts = torch.tensor([1, *(1 + torch.tensor(new).cumsum(0)).tolist()], dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    out = torch.full((sum(new) + 2, heads, shape.rank), float("nan"), dtype=dtype, device=DEVICE)
    latent_prefill(q, cache, tables, starts, seq_lens, shape.rank, scale=width**-0.5, out=out)
    want = latent_attention_reference(q[1:-1], cache, tables, new, lens, shape.rank, scale=width**-0.5)
    assert relative_error(out[1:-1], want) < BOUND[dtype]
    assert out[[0, -1]].isnan().all()  # rows of no sequence are not touched


@pytest.mark.parametrize("heads", [1, 16, 20, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_all_heads_read_a_row_at_once(heads: int, itemsize: int) -> None:
    config = latent_config(heads, 512, 64, 132, itemsize, 232448)
    groups = -(-heads // config.block_m)
    assert config.num_programs * groups <= 132
    assert groups == (1 if heads <= 64 else 2) or itemsize == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new,lens", [([37], [37]), ([1, 5, 0, 70], [17, 5, 0, 102]), ([3, 2], [131, 2])])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_with_keys_that_were_made(
    shape: LatentShape, heads: int, new: list[int], lens: list[int], dtype: torch.dtype
) -> None:
    _, nope, rope, value = shape
    q = random(sum(new), heads + 1, nope + rope, dtype=dtype)[:, 1:]  # some of the heads
    rotated = random(sum(new), heads + 1, rope, dtype=dtype)[:, 1:]
    made, shared = random(sum(lens), heads * (nope + value), dtype=dtype), random(sum(lens), 64 + rope, dtype=dtype)
    starts = [torch.tensor([0, *torch.tensor(one).cumsum(0).tolist()], dtype=torch.int32) for one in (new, lens)]
    out = torch.full((sum(new), heads + 1, value), float("nan"), dtype=dtype, device=DEVICE)
    latent_plain(q, rotated, made, shared[:, 64:], *(one.to(DEVICE) for one in starts), shape, out[:, 1:], scale=0.1)
    want = latent_plain_reference(q, rotated, made, shared[:, 64:], new, lens, shape, scale=0.1)
    assert relative_error(out[:, 1:], want) < BOUND[dtype]
    assert out[:, 0].isnan().all()
