"""Paged decode attention against its reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET, relative_error
from tpctl.kernels.attention.paged_decode import (
    DecodeConfig,
    DecodePlan,
    DecodeScratch,
    decode_config,
    paged_decode,
    paged_decode_reference,
)
from tpctl.kernels.attention.paged_decode_kernels import decode_kernel
from tpctl.kernels.common.launch import is_hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_cache(lens: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype):
    """Random caches with shuffled blocks; blocks that no sequence owns hold NaN."""
    counts = [-(-length // block_size) for length in lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks - 1)[: sum(counts)] + 1
    tables = torch.full((len(lens), max(counts) + 1), 0, dtype=torch.int32)
    used = torch.zeros(num_blocks, dtype=torch.bool)
    position = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[position : position + count].int()
        used[order[position : position + count]] = True
        position += count
    caches = []
    for _ in range(2):
        cache = torch.randn(num_blocks, block_size, num_kv_heads, head_dim, dtype=torch.float32)
        cache[~used] = float("nan")
        for row, length in enumerate(lens):
            if length % block_size:
                cache[tables[row, counts[row] - 1], length % block_size :] = float("nan")
        caches.append(cache.to(DEVICE, dtype))
    return caches[0], caches[1], tables.to(DEVICE)


CASES = [
    # heads, kv heads, head_dim, block size, window
    (16, 8, 128, 64, None),
    (32, 8, 128, 256, None),
    (8, 4, 128, 64, 100),
    (9, 3, 64, 16, None),
    (6, 2, 80, 32, 50),
    (3, 1, 96, 64, None),
    (16, 1, 64, 64, None),
    (5, 5, 128, 128, None),
    (8, 4, 128, 128, 100),
    (4, 2, 256, 128, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,head_dim,block_size,window", CASES)
@pytest.mark.parametrize("batch", ["one", "few", "crowd"] if INTERPRET else ["one", "few", "crowd", "many"])
@pytest.mark.parametrize("sunk", [False, True])
def test_matches_reference(sunk, batch, heads, kv_heads, head_dim, block_size, window, dtype):
    generator = torch.Generator().manual_seed(heads * head_dim + len(batch))
    if batch == "one":
        lens = [173 if INTERPRET else 5000]
    elif batch == "few":
        lens = [0, 1, 70, 0, 257, 64, 0]
    elif batch == "crowd":
        lens = torch.randint(0, 200, (17,), generator=generator).tolist()
    else:
        lens = torch.randint(0, 2000, (67,), generator=generator).tolist()
        lens += [0, 0, 3, 0]
    k_cache, v_cache, tables = make_cache(lens, kv_heads, head_dim, block_size, dtype)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), heads, head_dim).to(DEVICE, dtype)
    scratch = DecodeScratch.allocate(len(lens), heads, head_dim, DEVICE)
    settings = {"window": window, "itemsize": dtype.itemsize}
    plan = DecodePlan(len(lens), heads, kv_heads, head_dim, block_size, scratch, **settings)
    sinks = (3 * torch.randn(heads)).to(DEVICE, dtype) if sunk else None
    wide = (q.double(), k_cache.double(), v_cache.double())
    want = paged_decode_reference(*wide, tables, seq_lens, window=window, sinks_N=sinks)
    plan.update(seq_lens)
    for _ in range(2):  # the second call finds the counters as the first left them
        out = torch.full_like(q, float("nan"))
        paged_decode(q, k_cache, v_cache, tables, seq_lens, plan, sinks_N=sinks, out=out)
        live = seq_lens > 0
        assert relative_error(out[live], want[live]) < (1e-5 if dtype is torch.float32 else 8e-3)
        behind = int(live.nonzero().max()) + 1
        assert out[behind:].isnan().all()  # rows without work at the end are not touched
    assert (scratch.counters == 0).all()


@pytest.mark.parametrize("block_size,window", [(16, 40), (16, 1), (32, 100), (64, 70), (128, 33)])
def test_blocks_that_a_window_has_passed_are_not_read(block_size: int, window: int) -> None:
    """Their memory is another pool's by then; here it holds NaN."""
    lens = [1, 40, 41, 130, 257]
    k_cache, v_cache, tables = make_cache(lens, 2, 64, block_size, DTYPES[0])
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), 4, 64).to(DEVICE, DTYPES[0])
    scratch = DecodeScratch.allocate(len(lens), 4, 64, DEVICE)
    plan = DecodePlan(len(lens), 4, 2, 64, block_size, scratch, window=window, itemsize=DTYPES[0].itemsize)
    want = paged_decode_reference(q.double(), k_cache.double(), v_cache.double(), tables, seq_lens, window=window)
    for row, length in enumerate(lens):
        tables[row, : max(0, length - window) // block_size] = 0  # which no sequence owns
    plan.update(seq_lens)
    out = paged_decode(q, k_cache, v_cache, tables, seq_lens, plan)
    assert relative_error(out, want) < (1e-5 if DTYPES[0] is torch.float32 else 8e-3)


@pytest.mark.parametrize(
    "seqs,heads,long,tile,stages,min_tiles",
    [
        (1, 32, False, 64, 2, 1),
        (1, 32, True, 32, 3, 4),
        (1, 16, True, 64, 3, 1),  # two query heads a kv head
        (2, 32, False, 64, 2, 1),
        (2, 32, True, 64, 3, 1),
        (3, 32, False, 64, 3, 1),
    ],
)
def test_a_long_sequence_has_a_configuration_of_its_own(seqs, heads, long, tile, stages, min_tiles):
    assert decode_config(seqs, heads, 8, 132, long=long) == DecodeConfig(tile, 16, 4, stages, min_tiles)


def test_large_batches_start_early_only_where_programs_fill_a_multiprocessor():
    assert decode_config(17, 32, 8, 132, wide=True) == DecodeConfig(128, 33, 4, 2)
    assert decode_config(65, 32, 8, 132, wide=True) == DecodeConfig(128, 33, 4, 2, ahead=True)
    assert decode_config(17, 32, 8, 132) == DecodeConfig(64, 33, 4, 3, early=False)
    assert decode_config(16, 32, 8, 132, wide=True) == DecodeConfig(64, 16, 4, 3)


@pytest.mark.skipif(INTERPRET or not is_hopper(DEVICE), reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads,kv_heads", [(16, 8), (32, 8), (16, 4)])
def test_programs_placed_early_cannot_pile_up_on_a_multiprocessor(heads, kv_heads, monkeypatch):
    """Two fit: with three, early ones fill some multiprocessors and leave others idle, which costs 10% of a step."""
    compiled = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: compiled.append(decode_kernel[grid](*args, **kwargs))

    monkeypatch.setattr("tpctl.kernels.attention.paged_decode.decode_kernel", Spy())
    lens = [300] * 70
    k_cache, v_cache, tables = make_cache(lens, kv_heads, 128, 128, torch.bfloat16)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), heads, 128).to(DEVICE, torch.bfloat16)
    plan = DecodePlan(70, heads, kv_heads, 128, 128, DecodeScratch.allocate(70, heads, 128, DEVICE))
    plan.update(seq_lens)
    paged_decode(q, k_cache, v_cache, tables, seq_lens, plan, pdl=True)
    (kernel,) = compiled
    registers, shared = kernel.n_regs * 32 * plan.config.num_warps, kernel.metadata.shared
    assert plan.config.early
    assert 2 * registers <= 65536 and 2 * shared <= 227 << 10
    assert 3 * registers > 65536 or 3 * shared > 227 << 10


@pytest.mark.parametrize("heads", [8, 16])
def test_one_long_sequence_matches_reference(heads):
    k_cache, v_cache, tables = make_cache([1100], 4, 64, 64, torch.float32)
    seq_lens = torch.tensor([1100], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, heads, 64).to(DEVICE)
    plan = DecodePlan(1, heads, 4, 64, 64, DecodeScratch.allocate(1, heads, 64, DEVICE), long=True)
    plan.update(seq_lens)
    want = paged_decode_reference(q.double(), k_cache.double(), v_cache.double(), tables, seq_lens)
    assert relative_error(paged_decode(q, k_cache, v_cache, tables, seq_lens, plan), want) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(64, 7, 4, 3),
        DecodeConfig(16, 5, 4, 2),
        DecodeConfig(32, 1, 4, 2),
        DecodeConfig(16, 9, 4, 2, min_tiles=4),
        DecodeConfig(16, 1, 4, 2, ahead=True),
        DecodeConfig(64, 3, 4, 2, ahead=True),
        DecodeConfig(16, 5, 4, 2, ahead=True),
        DecodeConfig(16, 16, 4, 2, ahead=True),
    ],
)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("lens", [[130, 40, 0, 333, 1], [64, 64, 64], [10, 300, 0, 0], [500]])
@pytest.mark.parametrize("sunk", [False, True])
def test_every_division_of_the_work_gives_the_same_result(sunk, config, lens, window):
    k_cache, v_cache, tables = make_cache(lens, 4, 64, 64, torch.float32)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), 8, 64, device=DEVICE)
    scratch = DecodeScratch.allocate(len(lens), 8, 64, DEVICE)
    plan = DecodePlan(len(lens), 8, 4, 64, 64, scratch, window=window, config=config)
    plan.update(seq_lens)
    sinks = 4 * torch.randn(8, device=DEVICE) if sunk else None  # below the scores of some heads, above those of others
    wide = (q.double(), k_cache.double(), v_cache.double())
    want = paged_decode_reference(*wide, tables, seq_lens, window=window, sinks_N=sinks)
    live = seq_lens > 0
    for _ in range(2):
        out = paged_decode(q, k_cache, v_cache, tables, seq_lens, plan, sinks_N=sinks)
        assert relative_error(out[live], want[live]) < 1e-5
    assert (scratch.counters == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_in_which_a_run_is_computed_changes_no_bit(dtype):
    lens = torch.randint(0, 400, (30,), generator=torch.Generator().manual_seed(5)).tolist()
    k_cache, v_cache, tables = make_cache(lens, 2, 64, 64, dtype)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), 4, 64).to(DEVICE, dtype)
    outs = []
    for ahead in (False, True):
        scratch = DecodeScratch.allocate(len(lens), 4, 64, DEVICE)
        plan = DecodePlan(len(lens), 4, 2, 64, 64, scratch, config=DecodeConfig(32, 7, 4, 2, ahead=ahead))
        plan.update(seq_lens)
        outs.append(paged_decode(q, k_cache, v_cache, tables, seq_lens, plan)[seq_lens > 0])
    assert (plan.ahead_seq >= 0).any()
    assert torch.equal(*outs)
