"""Packed caches for kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPE
from tpctl.kernels.attention.packed_kv import pack_reference, unpack_blocks, unpack_reference
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.layers.batch import ForwardBatch, PoolTables


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


def tables_of(lens: list[int], block_size: int) -> tuple[torch.Tensor, int]:
    """Block tables of sequences whose blocks lie anywhere, and how many blocks there are: two more than these."""
    counts = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(3)).int()
    tables = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = order[sum(counts[:s]) :][:count]
    return tables.to(DEVICE), len(order)


def cache_of(lens: list[int], kv_heads: int, head_dim: int, block_size: int):
    tables, blocks = tables_of(lens, block_size)
    k, v = (vectors(blocks, block_size, kv_heads, head_dim, seed=seed) for seed in (1, 2))
    k_rows, k_largest, k_kept = packed_cache(k)
    v_rows, v_largest, v_kept = packed_cache(v)
    exponents = torch.stack([k_largest, v_largest], -1)
    return tables, (k_rows, v_rows, exponents), (k_kept.to(DTYPE), v_kept.to(DTYPE))


def sinks_of(heads: int) -> torch.Tensor:
    return (2 * torch.randn(heads, generator=torch.Generator().manual_seed(6))).to(DEVICE, DTYPE)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def queries(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)


def starts_of(counts: list[int]) -> torch.Tensor:
    """Where runs of so many begin, and where the last one ends."""
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def check_prefill(cache_of, new, heads, kv_heads, head_dim, block_size, window, sunk) -> None:
    """Prompts over what ``cache_of`` keeps, against the reference over what that stands for."""
    lens = [count + 17 * (number % 3) for number, count in enumerate(new)]
    tables, (k, v, factors), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    starts, q = starts_of(new), queries(sum(new), heads, head_dim)
    options = {"scale": 0.1, "window": window, "sinks_N": sinks_of(heads) if sunk else None}
    got = paged_prefill(q, k, v, tables, starts, seq_lens, factors=factors, **options)
    close(got, paged_prefill_reference(q, *plain, tables, starts, seq_lens, **options))


def check_contexts(cache_of, kv_heads: int, head_dim: int, block_size: int) -> None:
    """Whole contexts as numbers, to the bit what the cache stands for."""
    lens = [5, 200, 0, 64]
    tables, (k, v, factors), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    counts = [-(-length // block_size) for length in lens]
    starts = starts_of(counts)[:-1]
    out = torch.full((2, sum(counts), block_size, kv_heads, head_dim), 7.0, dtype=DTYPE, device=DEVICE)
    unpack_blocks(k, v, factors, tables, seq_lens, starts, max(lens), (out[0], out[1]))
    for s, count in enumerate(counts):
        for j in range(count):
            for side in range(2):
                assert torch.equal(out[side, int(starts[s]) + j], plain[side][int(tables[s, j])].to(DTYPE))


def prompts_over(tables: torch.Tensor, new: list[int], lens: list[int]) -> ForwardBatch:
    """A step of two decodes, and then prompts."""
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    ids, seq_lens = torch.zeros(sum(new), dtype=torch.int64), torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    pools = (PoolTables(empty, tables),)
    return ForwardBatch(ids, empty, pools, new, lens, 2, empty, starts_of(new), seq_lens)
