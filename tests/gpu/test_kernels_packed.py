"""Packed keys and values: what they stand for, and the kernels that write and read them against their references."""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from tpctl.kernels.packed_kv import HEAD_DIMS, pack_reference, row_bytes, unpack_blocks, unpack_reference
from tpctl.kernels.paged_decode import DecodePlan, DecodeScratch, paged_decode, paged_decode_reference
from tpctl.kernels.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.kernels.rope_cache import rope_cache, rope_cache_reference
from tpctl.sharding.model_sizes import MOST_UNPACKED, PACKED_HEAD_DIMS

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter has no bfloat16 of its own; queries and results are float32 there.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 vectors with outliers, tiny values and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x *= torch.exp(2.0 * torch.randn(*shape[:-1], 1, generator=generator))
    x *= torch.where(torch.rand(*shape, generator=generator) < 0.02, 1e-5, 1.0)
    x *= torch.where(torch.rand(*shape, generator=generator) < 0.02, 30.0, 1.0)
    x[torch.rand(*shape, generator=generator) < 0.02] = 0.0
    return x.to(torch.bfloat16).to(DEVICE)


def packed_cache(x_BSKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [blocks, K, B, 3 D / 2] and exponents [blocks, K, B] of a plain cache, and the cache that they stand for."""
    rows, largest = pack_reference(x_BSKD.transpose(1, 2).contiguous())
    return rows, largest, unpack_reference(rows, largest).transpose(1, 2).contiguous()


def test_the_planner_knows_the_same_heads() -> None:
    from tpctl.engine.cuda_runner import _MOST_UNPACKED

    assert (PACKED_HEAD_DIMS, MOST_UNPACKED) == (HEAD_DIMS, _MOST_UNPACKED)


def test_what_is_kept() -> None:
    x = vectors(4000, 128)
    rows, largest = pack_reference(x)
    assert rows.shape == (4000, row_bytes(128))
    kept = unpack_reference(rows, largest)
    power = torch.exp2(largest.float() - 127)[:, None]
    near = x.float().abs() >= power * 2.0**-14
    assert torch.equal(kept[near], x.float()[near])
    assert ((kept - x.float()).abs() <= power * 2.0**-22).all()
    assert (kept[~near] != x.float()[~near]).any()
    assert torch.equal(kept[x == 0], torch.zeros_like(kept[x == 0]))


def test_the_ends_of_the_range() -> None:
    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    x[1, 3] = 2.0**-126
    x[2] = torch.finfo(torch.bfloat16).max
    x[3] = 2.0**-130  # less than the smallest normal number
    x[4, :2] = torch.tensor([1.0, -(2.0**-14) * (1 - 2.0**-9)])  # rounds up into the codes of normal numbers
    kept = unpack_reference(*pack_reference(x))
    assert torch.equal(kept[:3], x.float()[:3])
    assert not kept[3].any()
    assert kept[4, 1] == -(2.0**-14)


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 4, 2, 128), (7, 6, 1, 64), (70, 4, 4, 256)])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_cache_packs(tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    block_size, blocks = 16, 6
    qkv = vectors(tokens, (heads + 2 * kv_heads) * head_dim, seed=tokens).to(DTYPE)
    angles = torch.rand(200, head_dim // 2, device=DEVICE) * 6
    tables = (angles.cos(), angles.sin())
    positions = torch.randint(0, 200, (tokens,), device=DEVICE)
    slots = torch.randperm(blocks * block_size, device=DEVICE)[:tokens]
    slots[tokens // 2 :: 5] = -1
    weights = {}
    if norm:
        weights = {name: torch.rand(head_dim, device=DEVICE).to(DTYPE) + 0.5 for name in ("q_norm_D", "k_norm_D")}
    shape = (blocks, kv_heads, block_size)
    k, v = torch.full((2, *shape, row_bytes(head_dim)), 77, dtype=torch.uint8, device=DEVICE)
    exponents = torch.full((*shape, 2), 7, dtype=torch.uint8, device=DEVICE)
    q = rope_cache(qkv, k, v, tables, positions, slots, heads, exponents=exponents, **weights)

    plain_k, plain_v = torch.zeros(2, blocks, block_size, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
    wanted_q = rope_cache_reference(qkv, plain_k, plain_v, tables, positions, slots, heads, **weights)
    torch.testing.assert_close(q, wanted_q)
    written = torch.zeros(blocks * block_size, dtype=torch.bool, device=DEVICE)
    written[slots[slots >= 0]] = True
    written = written.view(blocks, 1, block_size).expand(shape)
    for index, (rows, plain) in enumerate(((k, plain_k), (v, plain_v))):
        assert (rows[~written] == 77).all()
        assert (exponents[..., index][~written] == 7).all()
        got = unpack_reference(rows, exponents[..., index])[written]
        want = plain.to(torch.bfloat16).transpose(1, 2)[written]
        if index == 1:  # values are not rotated, so nothing was rounded on the way
            assert torch.equal(got, unpack_reference(*pack_reference(want.contiguous())))
        torch.testing.assert_close(got, want.float(), rtol=2.0**-7, atol=2.0**-6)


SHAPES = [
    # query heads, kv heads, head dim, block size, window
    (4, 2, 128, 128, None),
    (6, 2, 64, 16, None),
    (8, 8, 128, 32, 40),
    (12, 1, 64, 128, None),
    (2, 2, 256, 64, 70),
]


def cache_of(lens: list[int], kv_heads: int, head_dim: int, block_size: int):
    counts = [-(-n // block_size) for n in lens]
    blocks = sum(counts) + 2
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).int()
    tables = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
    at = 0
    for s, count in enumerate(counts):
        tables[s, :count] = order[at : at + count]
        at += count
    k, v = (vectors(blocks, block_size, kv_heads, head_dim, seed=seed) for seed in (1, 2))
    k_rows, k_largest, k_kept = packed_cache(k)
    v_rows, v_largest, v_kept = packed_cache(v)
    exponents = torch.stack([k_largest, v_largest], -1)
    return tables.to(DEVICE), (k_rows, v_rows, exponents), (k_kept.to(DTYPE), v_kept.to(DTYPE))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size", "window"), SHAPES)
@pytest.mark.parametrize("lens", [[1], [37], [1500], [5, 200, 64, 3], [0, 90, 130], [33] * 17, [100, 20] * 40])
def test_decode(lens, heads, kv_heads, head_dim, block_size, window) -> None:
    if INTERPRETED and sum(lens) * heads > 6000:
        pytest.skip("slow under the interpreter")
    tables, (k, v, exponents), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), heads, head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    scratch = DecodeScratch.allocate(len(lens), heads, head_dim, DEVICE)
    for long in (False, True):
        plan = DecodePlan(
            len(lens), heads, kv_heads, head_dim, block_size, scratch, window=window, long=long, packed=True
        )
        plan.update(seq_lens)
        got = paged_decode(q, k, v, tables, seq_lens, plan, exponents=exponents, scale=0.1)
        want = paged_decode_reference(q, *plain, tables, seq_lens, scale=0.1, window=window)
        live = seq_lens > 0
        torch.testing.assert_close(got[live], want[live], rtol=2e-2, atol=2e-2 * want.abs().max().item())
        assert not scratch.counters.any()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size", "window"), SHAPES)
@pytest.mark.parametrize("new", [[1], [70], [3, 40, 1], [200, 5]])
def test_prefill(new, heads, kv_heads, head_dim, block_size, window) -> None:
    if INTERPRETED and sum(new) * heads > 400:
        pytest.skip("slow under the interpreter")
    lens = [count + 17 * (number % 3) for number, count in enumerate(new)]
    tables, (k, v, exponents), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    q = torch.randn(sum(new), heads, head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    got = paged_prefill(q, k, v, tables, starts, seq_lens, exponents=exponents, scale=0.1, window=window)
    want = paged_prefill_reference(q, *plain, tables, starts, seq_lens, scale=0.1, window=window)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize(("kv_heads", "head_dim", "block_size"), [(2, 128, 128), (1, 64, 16), (3, 256, 32)])
def test_contexts_are_unpacked(kv_heads: int, head_dim: int, block_size: int) -> None:
    lens = [5, 200, 0, 64]
    tables, (k, v, exponents), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    counts = [-(-length // block_size) for length in lens]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()[:-1]], dtype=torch.int32, device=DEVICE)
    out = torch.full((2, sum(counts), block_size, kv_heads, head_dim), 7.0, dtype=DTYPE, device=DEVICE)
    unpack_blocks(k, v, exponents, tables, seq_lens, starts, max(lens), (out[0], out[1]))
    for s, count in enumerate(counts):
        for j in range(count):
            for side in range(2):
                assert torch.equal(out[side, int(starts[s]) + j], plain[side][int(tables[s, j])].to(DTYPE))


@pytest.mark.skipif(INTERPRETED, reason="on GPUs")
def test_nothing_but_a_context_counts() -> None:
    """Bytes behind a sequence's end, even those that stand for no number, do not reach its answer."""
    lens = [37, 300]
    tables, (k, v, exponents), _ = cache_of(lens, 2, 128, 128)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 4, 128, device=DEVICE).to(DTYPE)
    scratch = DecodeScratch.allocate(2, 4, 128, DEVICE)
    plan = DecodePlan(2, 4, 2, 128, 128, scratch, packed=True)
    plan.update(seq_lens)
    want = paged_decode(q, k, v, tables, seq_lens, plan, exponents=exponents)
    for s, length in enumerate(lens):
        block = int(tables[s, length // 128])
        for cache in (k, v, exponents):
            cache[block, :, length % 128 :] = 255
    got = paged_decode(q, k, v, tables, seq_lens, plan, exponents=exponents)
    assert torch.equal(got, want)
    assert math.isfinite(got.float().sum().item())
