"""Packed keys and values: what they stand for, and the kernels that write and read them against their references."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPE, INTERPRET
from tests.gpu.packed_cases import (
    cache_of,
    check_contexts,
    check_prefill,
    close,
    prompts_over,
    queries,
    sinks_of,
    vectors,
)
from tpctl.kernels.attention.packed_kv import pack_reference, row_bytes, unpack_blocks, unpack_reference
from tpctl.kernels.attention.paged_decode import DecodePlan, DecodeScratch, paged_decode, paged_decode_reference
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.kernels.attention.rope_cache import rope_cache, rope_cache_reference
from tpctl.layers.attention import triton as triton_backend
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import PoolTables

pytestmark = pytest.mark.gpu


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
@pytest.mark.parametrize("rope", ["halves", "neighbours", "none"])
def test_rope_cache_packs(rope: str, tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    torch.manual_seed(tokens)
    block_size, blocks = 16, 6
    qkv = vectors(tokens, (heads + 2 * kv_heads) * head_dim, seed=tokens).to(DTYPE)
    angles = torch.rand(200, head_dim // 2, device=DEVICE) * 6
    tables = None if rope == "none" else (angles.cos(), angles.sin())
    positions = torch.randint(0, 200, (tokens,), device=DEVICE)
    slots = torch.randperm(blocks * block_size, device=DEVICE)[:tokens]
    slots[tokens // 2 :: 5] = -1
    options = {"interleaved": rope == "neighbours"}
    if norm:
        options |= {name: torch.rand(head_dim, device=DEVICE).to(DTYPE) + 0.5 for name in ("q_norm", "k_norm")}
    shape = (blocks, kv_heads, block_size)
    k, v = torch.full((2, *shape, row_bytes(head_dim)), 77, dtype=torch.uint8, device=DEVICE)
    exponents = torch.full((*shape, 2), 7, dtype=torch.uint8, device=DEVICE)
    q = rope_cache(qkv, k, v, tables, positions, slots, heads, factors=exponents, **options)

    plain_k, plain_v = torch.zeros(2, blocks, block_size, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
    wanted_q = rope_cache_reference(qkv, plain_k, plain_v, tables, positions, slots, heads, **options)
    torch.testing.assert_close(q, wanted_q, rtol=2.0**-7, atol=2.0**-8)
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


def quick(tokens: list[list[int]], work: int) -> list[tuple]:
    """Each of ``tokens`` beside each shape; under the interpreter those of at most so many tokens x heads."""
    return [(one, *shape) for one in tokens for shape in SHAPES if not INTERPRET or sum(one) * shape[0] <= work]


DECODES = quick([[1], [37], [1500], [5, 200, 64, 3], [0, 90, 130], [33] * 17, [100, 20] * 40], 6000)
PREFILLS = quick([[1], [70], [3, 40, 1], [200, 5]], 400)


@pytest.mark.parametrize(("lens", "heads", "kv_heads", "head_dim", "block_size", "window"), DECODES)
@pytest.mark.parametrize("sunk", [False, True])
def test_decode(sunk, lens, heads, kv_heads, head_dim, block_size, window) -> None:
    tables, (k, v, exponents), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), heads, head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    scratch = DecodeScratch.allocate(len(lens), heads, head_dim, DEVICE)
    for long in (False, True):
        plan = DecodePlan(
            len(lens), heads, kv_heads, head_dim, block_size, scratch, window=window, long=long, packed=True
        )
        plan.update(seq_lens)
        options = {"scale": 0.1, "sinks_N": sinks_of(heads) if sunk else None}
        got = paged_decode(q, k, v, tables, seq_lens, plan, factors=exponents, **options)
        want = paged_decode_reference(q, *plain, tables, seq_lens, window=window, **options)
        live = seq_lens > 0
        torch.testing.assert_close(got[live], want[live], rtol=2e-2, atol=2e-2 * want.abs().max().item())
        assert not scratch.counters.any()


@pytest.mark.parametrize(("new", "heads", "kv_heads", "head_dim", "block_size", "window"), PREFILLS)
@pytest.mark.parametrize("sunk", [False, True])
def test_prefill(sunk, new, heads, kv_heads, head_dim, block_size, window) -> None:
    check_prefill(cache_of, new, heads, kv_heads, head_dim, block_size, window, sunk)


@pytest.mark.parametrize(("kv_heads", "head_dim", "block_size"), [(2, 128, 128), (1, 64, 16), (3, 256, 32)])
def test_contexts_are_unpacked(kv_heads: int, head_dim: int, block_size: int) -> None:
    check_contexts(cache_of, kv_heads, head_dim, block_size)


@pytest.mark.parametrize("window", [None, 30])
def test_decodes_computed_ahead(window: int | None) -> None:
    """More sequences than a plan orders as they come: a run's last one first where it goes on in the next run."""
    lens = [1 + 13 * s % 47 if s % 11 else 0 for s in range(66)]
    tables, (k, v, exponents), plain = cache_of(lens, 1, 64, 16)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), 2, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    scratch = DecodeScratch.allocate(len(lens), 2, 64, DEVICE)
    plan = DecodePlan(len(lens), 2, 1, 64, 16, scratch, window=window, packed=True)
    assert plan.config.ahead
    plan.update(seq_lens)
    got = paged_decode(q, k, v, tables, seq_lens, plan, factors=exponents, scale=0.1)
    want = paged_decode_reference(q, *plain, tables, seq_lens, scale=0.1, window=window)
    live = seq_lens > 0
    torch.testing.assert_close(got[live], want[live], rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_rope_cache_packs_the_ends_of_the_range() -> None:
    """Zeros, numbers below the smallest normal one, infinity, and vectors of small numbers alone."""
    x = torch.zeros(6, 64, dtype=torch.bfloat16)
    x[1, 3] = 2.0**-126
    x[2, :3] = torch.tensor([float("inf"), 1.0, -2.0])
    x[3] = 2.0**-130
    x[4] = torch.randn(64) * 2.0**-115
    x[5, :2] = torch.tensor([1.0, -(2.0**-14) * (1 - 2.0**-9)])
    qkv = torch.cat([torch.zeros(6, 128, dtype=torch.bfloat16), x], 1).to(DEVICE, DTYPE)
    rows = torch.zeros(2, 1, 1, 16, row_bytes(64), dtype=torch.uint8, device=DEVICE)
    exponents = torch.zeros(1, 1, 16, 2, dtype=torch.uint8, device=DEVICE)
    tables = torch.ones(1, 32, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    positions, slots = torch.zeros(6, dtype=torch.int64, device=DEVICE), torch.arange(6, device=DEVICE)
    rope_cache(qkv, rows[0], rows[1], tables, positions, slots, 1, factors=exponents)
    want_rows, want_largest = pack_reference(x.to(DEVICE))
    assert torch.equal(exponents[0, 0, :6, 1], want_largest)
    assert torch.equal(rows[1, 0, 0, :6], want_rows)


def backend_of(kv_heads: int, head_dim: int, block_size: int, layers: int = 2) -> TritonBackend:
    return TritonBackend([AttentionSpec(2 * kv_heads, kv_heads, head_dim, 0.1)] * layers, block_size, "packed")


def test_memory_is_what_is_counted() -> None:
    backend = backend_of(3, 64, 32)
    layers = backend.allocate(7, torch.bfloat16, DEVICE)
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.k, layer.v, layer.factors))
    (pool,) = backend.layer_pools(torch.bfloat16)
    assert held == 7 * pool.block_bytes
    backend.reserve(40, 60, DEVICE)  # 4 blocks, and 2 for contexts that fill no whole number of them
    assert [tensor.shape for tensor in backend._unpacked_for(backend.layers[0])] == [(6, 32, 3, 64)] * 2


@pytest.mark.parametrize("fits", [True, False])
def test_prompts_read_what_was_unpacked_for_them(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside decodes, over prefixes; where contexts are more than there is memory for, programs unpack themselves."""
    monkeypatch.setattr(triton_backend, "_MANY_ROWS", 1)
    calls = []
    monkeypatch.setattr(
        triton_backend, "unpack_blocks", lambda *args, **more: calls.append(args) or unpack_blocks(*args, **more)
    )
    lens, new = [9, 40, 70, 33], [1, 1, 30, 20]
    tables, (k, v, exponents), plain = cache_of(lens, 2, 64, 16)
    backend = backend_of(2, 64, 16)
    backend.reserve(16, 87 if fits else 34, DEVICE)
    backend._unpacked = tuple(kept.to(DTYPE) for kept in backend._unpacked)
    batch, q = prompts_over(tables, new, lens), queries(sum(new), 4, 64)
    kv = LayerKV(backend.layers[0], k, v, factors=exponents)
    plan = backend.begin(batch)
    for _ in range(2):  # two layers, which share what was prepared
        got = backend.attend_cached(q, kv, plan).view_as(q)
        close(got, paged_prefill_reference(q, *plain, tables, batch.query_start_S1, batch.seq_lens_S, scale=0.1))
    assert len(calls) == (2 if fits else 0)


def test_stored_by_the_readable_decoder() -> None:
    backend = backend_of(2, 64, 16, layers=1)
    (kv,) = backend.allocate(3, torch.bfloat16, DEVICE)
    x = vectors(2, 2, 64)
    plan: Any = SimpleNamespace(batch=SimpleNamespace(pools=[PoolTables(torch.tensor([17, -1], device=DEVICE), None)]))
    backend.store(x, -x, kv, plan)
    rows, largest = pack_reference(x[0].contiguous())
    assert torch.equal(kv.k[1, :, 1], rows)
    assert torch.equal(kv.factors[1, :, 1, 1], largest)
    kv.k[1, :, 1] = 0
    assert not kv.k.any()  # -1 is written nowhere


@pytest.mark.parametrize("block_size", [16, 128])
def test_prompts_do_not_read_behind_their_ends(block_size: int) -> None:
    """Old bytes there may stand for infinity. In one case a tile is wider than a block."""
    lens = [37, 20]
    tables, (k, v, exponents), _ = cache_of(lens, 2, 64, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    q = torch.randn(40, 4, 64, device=DEVICE).to(DTYPE)
    want = paged_prefill(q, k, v, tables, starts, seq_lens, factors=exponents)
    used = torch.zeros(exponents.shape[0], block_size, dtype=torch.bool, device=DEVICE)
    for s, length in enumerate(lens):
        for token in range(length):
            used[int(tables[s, token // block_size]), token % block_size] = True
    for cache in (k, v, exponents):
        cache[~used[:, None].expand(cache.shape[:3])] = 255
    assert torch.equal(paged_prefill(q, k, v, tables, starts, seq_lens, factors=exponents), want)
    assert torch.isfinite(want).all()


def test_nothing_but_a_context_counts() -> None:
    """Bytes behind a sequence's end, even those that stand for no number, do not reach its answer."""
    lens = [37, 300]
    tables, (k, v, exponents), _ = cache_of(lens, 2, 128, 128)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 4, 128, device=DEVICE).to(DTYPE)
    scratch = DecodeScratch.allocate(2, 4, 128, DEVICE)
    plan = DecodePlan(2, 4, 2, 128, 128, scratch, packed=True)
    plan.update(seq_lens)
    want = paged_decode(q, k, v, tables, seq_lens, plan, factors=exponents)
    for s, length in enumerate(lens):
        block = int(tables[s, length // 128])
        for cache in (k, v, exponents):
            cache[block, :, length % 128 :] = 255
    got = paged_decode(q, k, v, tables, seq_lens, plan, factors=exponents)
    assert torch.equal(got, want)
    assert math.isfinite(got.float().sum().item())
