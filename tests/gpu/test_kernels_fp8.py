"""Keys and values in FP8: the kernels that write and read them against their reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPE, INTERPRET
from tests.gpu.packed_cases import (
    check_contexts,
    check_prefill,
    close,
    prompts_over,
    queries,
    sinks_of,
    tables_of,
    vectors,
)
from tpctl.kernels.attention.fp8_vectors import dequantise, quantise
from tpctl.kernels.attention.packed_kv import unpack_blocks
from tpctl.kernels.attention.paged_decode import DecodePlan, DecodeScratch, paged_decode, paged_decode_reference
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.kernels.attention.rope_cache import rope_cache, rope_cache_reference
from tpctl.layers.attention import triton as triton_backend
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.batch import PoolTables

pytestmark = pytest.mark.gpu

BYTE = torch.arange(256, dtype=torch.uint8)


def written(x_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, K, D] and scales [T, K] that the kernel writes for values, which it does not rotate."""
    tokens, heads, head_dim = x_TKD.shape
    qkv = torch.cat([torch.zeros(tokens, (1 + heads) * head_dim, dtype=x_TKD.dtype), x_TKD.cpu().flatten(1)], 1)
    codes = torch.zeros(2, 1, heads, 128, head_dim, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(1, heads, 128, 2, dtype=torch.bfloat16, device=DEVICE)
    slots, positions = torch.arange(tokens, device=DEVICE), torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    tables = torch.ones(1, head_dim // 2, device=DEVICE), torch.zeros(1, head_dim // 2, device=DEVICE)
    rope_cache(qkv.to(DEVICE), codes[0], codes[1], tables, positions, slots, 1, factors=scales)
    return codes[1, 0, :, :tokens].transpose(0, 1), scales[0, :, :tokens, 1].t()


def test_values_of_all_sizes_are_rounded_as_the_reference_does() -> None:
    """Every e4m3 number, every number halfway between two, and all beside them; in vectors of the same scale."""
    numbers = BYTE[:127].view(torch.float8_e4m3fn).float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([numbers, halfway, halfway * (1 + 2.0**-7), halfway * (1 - 2.0**-7)])
    x = torch.cat([near, -near, torch.zeros(-len(near) * 2 % 63)]).view(-1, 1, 63)
    x = torch.cat([x, torch.full_like(x[..., :1], 448.0)], -1).to(DTYPE).to(DEVICE)
    codes, scales = written(x)
    want, want_scales = quantise(x)
    assert (scales == 1).all() and torch.equal(scales, want_scales)
    assert torch.equal(codes, want.view(torch.uint8))


def test_vectors_at_the_ends_of_the_range() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[0] = 0
    x[1] *= 2.0**-120
    x[2] *= 2.0**120
    x[3, 5], x[4, 5], x[5, 5] = float("inf"), -float("inf"), float("nan")
    x[6] = torch.finfo(torch.bfloat16).max
    x[7] = 2.0**-133  # the smallest
    x = x[:, None].to(DTYPE).to(DEVICE)
    codes, scales = written(x)
    want, want_scales = quantise(x)
    fine = torch.tensor([0, 1, 2, 6, 7, 8], device=DEVICE)
    assert torch.equal(codes[fine], want.view(torch.uint8)[fine])
    assert torch.equal(scales[fine], want_scales[fine])
    assert scales[3:6].isnan().all() and want_scales[3:6].isnan().all()
    assert not codes[0].any() and scales[0] == 0


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 4, 2, 128, 64), (7, 6, 1, 64, 64), (70, 4, 4, 64, 48)],
)
@pytest.mark.parametrize("rope", ["halves", "neighbours", "none"])
def test_rope_cache_quantises(
    rope: str, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    block_size, blocks = 16, 6
    qkv = vectors(tokens, (heads + 2 * kv_heads) * head_dim, seed=tokens).to(DTYPE)
    angles = torch.rand(200, rotary_dim // 2, device=DEVICE) * 6
    tables = None if rope == "none" else (angles.cos(), angles.sin())
    positions = torch.randint(0, 200, (tokens,), device=DEVICE)
    slots = torch.randperm(blocks * block_size, device=DEVICE)[:tokens]
    slots[tokens // 2 :: 5] = -1
    options: dict[str, Any] = {"interleaved": rope == "neighbours"}
    options |= {name: torch.rand(head_dim, device=DEVICE).to(DTYPE) + 0.5 for name in ("q_norm", "k_norm")}
    shape = (blocks, kv_heads, block_size)
    codes = torch.full((2, *shape, head_dim), 77, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((*shape, 2), 7, dtype=torch.bfloat16, device=DEVICE)
    q = rope_cache(qkv, *codes, tables, positions, slots, heads, factors=scales, **options)

    plain = torch.zeros(2, blocks, block_size, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
    wanted_q = rope_cache_reference(qkv, *plain, tables, positions, slots, heads, **options)
    torch.testing.assert_close(q, wanted_q, rtol=2.0**-7, atol=2.0**-8)
    live = torch.zeros(blocks * block_size, dtype=torch.bool, device=DEVICE)
    live[slots[slots >= 0]] = True
    live = live.view(blocks, 1, block_size).expand(shape)
    for side in range(2):
        assert (codes[side][~live] == 77).all() and (scales[..., side][~live] == 7).all()
        want = plain[side].transpose(1, 2)[live]
        got = dequantise(codes[side][live], scales[..., side][live], torch.float32)
        if side == 1:  # values are not rotated, so nothing was rounded on the way
            assert torch.equal(got, dequantise(*quantise(want), torch.float32))
        bound = 2.0**-4 * want.float().abs() + 2.0**-8 * want.float().abs().amax(-1, keepdim=True)
        assert ((got - want.float()).abs() <= bound).all()


def cache_of(lens: list[int], kv_heads: int, head_dim: int, block_size: int):
    """Block tables, an FP8 cache (codes of keys, of values, scales), and the float32 one that it stands for: rounded
    to bfloat16, large scores would be off by more than the softmax forgives."""
    tables, blocks = tables_of(lens, block_size)
    sides = [quantise(vectors(blocks, kv_heads, block_size, head_dim, seed=seed)) for seed in (1, 2)]
    plain = [dequantise(*side, torch.float32).transpose(1, 2).contiguous() for side in sides]
    (k, k_scale), (v, v_scale) = sides
    fp8 = k.view(torch.uint8), v.view(torch.uint8), torch.stack([k_scale, v_scale], -1)
    return tables, fp8, plain


DECODES = [
    # lengths, query heads, kv heads, head dim, block size, window, sinks
    ([37], 4, 2, 128, 128, None, False),
    ([5, 200, 64, 3], 6, 2, 64, 16, None, True),
    ([0, 90, 130], 4, 4, 128, 32, 40, False),
    ([100, 20, 1], 2, 2, 256, 64, 70, True),
]
LONG = [([1500], 12, 1, 64, 128, None, False), ([33] * 17, 8, 8, 128, 32, None, False)]
LONG += [([100, 20] * 40, 4, 2, 128, 128, 40, True)]


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "head_dim", "block_size", "window", "sunk"), DECODES + ([] if INTERPRET else LONG)
)
def test_decode(lens, heads, kv_heads, head_dim, block_size, window, sunk) -> None:
    tables, (k, v, scales), plain = cache_of(lens, kv_heads, head_dim, block_size)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lens), heads, head_dim, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    scratch = DecodeScratch.allocate(len(lens), heads, head_dim, DEVICE)
    options = {"scale": 0.1, "sinks_N": sinks_of(heads) if sunk else None}
    want = paged_decode_reference(q, *plain, tables, seq_lens, window=window, **options)
    live = seq_lens > 0
    for long in (False, True):
        plan = DecodePlan(
            len(lens), heads, kv_heads, head_dim, block_size, scratch, window=window, long=long, packed=True
        )
        plan.update(seq_lens)
        got = paged_decode(q, k, v, tables, seq_lens, plan, factors=scales, **options)
        close(got[live], want[live])
        assert not scratch.counters.any()
    if not INTERPRET:  # float16 is multiplied as bfloat16
        half = paged_decode(q.half(), k, v, tables, seq_lens, plan, factors=scales, **options)
        close(half[live].to(DTYPE), want[live])


@pytest.mark.parametrize(
    ("new", "heads", "kv_heads", "head_dim", "block_size", "window", "sunk"),
    [([70], 4, 2, 128, 128, None, False), ([3, 40, 1], 6, 2, 64, 16, None, True), ([50, 5], 2, 2, 256, 64, 30, False)],
)
def test_prefill(new, heads, kv_heads, head_dim, block_size, window, sunk) -> None:
    check_prefill(cache_of, new, heads, kv_heads, head_dim, block_size, window, sunk)


def test_contexts_are_made_numbers() -> None:
    check_contexts(cache_of, 2, 128, 32)


def test_what_lies_behind_an_end_reaches_no_answer() -> None:
    """Codes of old vectors, and scales that are no numbers."""
    lens = [37, 300]
    tables, (k, v, scales), _ = cache_of(lens, 1, 64, 128)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    q = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    plan = DecodePlan(2, 2, 1, 64, 128, DecodeScratch.allocate(2, 2, 64, DEVICE), packed=True)
    plan.update(seq_lens)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        decoded = paged_decode(q[:2], k, v, tables, seq_lens, plan, factors=scales)
        return decoded, paged_prefill(q, k, v, tables, starts, seq_lens, factors=scales)

    want = both()
    for s, length in enumerate(lens):
        block = int(tables[s, length // 128])
        k[block, :, length % 128 :] = v[block, :, length % 128 :] = 255
        scales[block, :, length % 128 :] = torch.nan
    for got, before in zip(both(), want, strict=True):
        assert torch.equal(got, before)
        assert got.isfinite().all()


def backend_of(kv_heads: int, head_dim: int, block_size: int, layers: int = 2) -> TritonBackend:
    return TritonBackend([AttentionSpec(2 * kv_heads, kv_heads, head_dim, 0.1)] * layers, block_size, "fp8")


def test_memory_is_what_is_counted() -> None:
    backend = backend_of(3, 64, 32)
    layers = backend.allocate(7, torch.bfloat16, DEVICE)
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.k, layer.v, layer.factors))
    (pool,) = backend.layer_pools(torch.bfloat16)
    assert held == 7 * pool.block_bytes == 7 * 32 * 2 * 2 * 3 * (64 + 2)


@pytest.mark.parametrize("fits", [True, False])
def test_prompts_read_what_was_made_numbers_for_them(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside decodes, over prefixes; where contexts are more than there is memory for, programs do it themselves."""
    monkeypatch.setattr(triton_backend, "_MANY_ROWS", 1)
    calls: list[Any] = []
    monkeypatch.setattr(
        triton_backend, "unpack_blocks", lambda *args, **more: calls.append(args) or unpack_blocks(*args, **more)
    )
    lens, new = [9, 40, 70, 33], [1, 1, 30, 20]
    tables, (k, v, scales), plain = cache_of(lens, 2, 64, 16)
    backend = backend_of(2, 64, 16)
    backend.reserve(16, 87 if fits else 34, DEVICE)
    backend._unpacked = tuple(kept.to(DTYPE) for kept in backend._unpacked)
    batch, q = prompts_over(tables, new, lens), queries(sum(new), 4, 64)
    kv = LayerKV(backend.layers[0], k, v, factors=scales)
    got = backend.attend_cached(q, kv, backend.begin(batch)).view_as(q)
    close(got, paged_prefill_reference(q, *plain, tables, batch.query_start_S1, batch.seq_lens_S, scale=0.1))
    assert len(calls) == (1 if fits else 0)


def test_stored_by_the_readable_decoder() -> None:
    backend = backend_of(2, 64, 16, layers=1)
    (kv,) = backend.allocate(3, torch.bfloat16, DEVICE)
    x = vectors(2, 2, 64)
    plan: Any = SimpleNamespace(batch=SimpleNamespace(pools=[PoolTables(torch.tensor([17, -1], device=DEVICE), None)]))
    backend.store(x, -x, kv, plan)
    codes, scales = quantise(-x[0])
    assert torch.equal(kv.v[1, :, 1], codes.view(torch.uint8))
    assert torch.equal(kv.factors[1, :, 1, 1], scales)
    kv.v[1, :, 1] = 0
    assert not kv.v.any()  # -1 is written nowhere
