"""Norm, activation, RoPE + cache write and sampling kernels against their references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET, relative_error
from tpctl.kernels.attention.head_gates import head_gates, head_gates_reference
from tpctl.kernels.attention.head_squares import head_squares, head_squares_reference
from tpctl.kernels.attention.rope_cache import NormedOverAll, rope_cache, rope_cache_reference
from tpctl.kernels.common.activation import act_and_mul, act_and_mul_reference
from tpctl.kernels.common.noise import NOT_FINITE, sample_reference
from tpctl.kernels.common.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tpctl.kernels.sampling.sampling import sample

pytestmark = pytest.mark.gpu
# Triton's interpreter truncates to bfloat16 instead of rounding.


def tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype is torch.float32 else 8e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("rows,hidden", [(1, 576), (7, 1024), (3, 4096), (130, 80)])
def test_norm(rows, hidden, unit_offset, dtype):
    x = torch.randn(rows, hidden + 8).to(DEVICE, dtype)[:, :hidden]
    residual = torch.randn(rows, hidden).to(DEVICE, dtype)
    weight = torch.randn(hidden).to(DEVICE, dtype)
    options = {"unit_offset": unit_offset}
    got = rms_norm(x, weight, 1e-6, out=torch.full_like(residual, float("nan")), **options)
    assert relative_error(got, rms_norm_reference(x.double(), weight.double(), 1e-6, **options)) < tolerance(dtype)
    want_residual = residual.clone()
    want = add_rms_norm_reference(x, want_residual, weight, 1e-6, **options)
    got = add_rms_norm(x, residual, weight, 1e-6, **options)
    assert torch.equal(residual, want_residual)
    assert relative_error(got, want) < tolerance(dtype)


def in_runs(x: torch.Tensor, count: int) -> torch.Tensor:
    """Addends of x that sum to it but for rounding, as `split_linear` leaves them."""
    parts = torch.randn(count - 1, *x.shape).to(x)
    return torch.cat([parts, (x - parts.sum(0))[None]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", [2, 4])
def test_add_norm_of_runs(runs, dtype):
    x = in_runs(torch.randn(20, 1024).to(DEVICE, dtype), runs)
    residual, weight = torch.randn(20, 1024).to(DEVICE, dtype), torch.randn(1024).to(DEVICE, dtype)
    want_residual = residual.clone()
    want = add_rms_norm_reference(x.float().sum(0).to(dtype), want_residual, weight, 1e-6)
    got = add_rms_norm(x, residual, weight, 1e-6)
    assert got.shape == residual.shape
    assert relative_error(residual, want_residual) < tolerance(dtype)
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation(activation, dtype):
    x = (3 * torch.randn(5, 2 * 1537)).to(DEVICE, dtype)
    got = act_and_mul(x, activation=activation)
    assert relative_error(got, act_and_mul_reference(x.double(), activation=activation)) < tolerance(dtype)
    assert torch.isfinite(act_and_mul(100 * x, activation=activation)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "each", "all"])
@pytest.mark.parametrize("rope", ["halves", "neighbours", "none"])
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,rotary",
    [(16, 8, 128, 128), (9, 3, 64, 64), (3, 1, 96, 48), (4, 2, 80, 32), (2, 2, 96, 96)],
)
@pytest.mark.parametrize("tokens", [3, 70])
def test_rope_cache(tokens, heads, kv_heads, head_dim, rotary, rope, norm, dtype):
    block_size, num_blocks = 16, 8
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(DEVICE, dtype)
    positions = torch.randint(0, 500, (tokens,), device=DEVICE)
    slots = torch.randperm(num_blocks * block_size)[:tokens].to(DEVICE)
    slots[1] = -1
    inverse = 1e4 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = torch.arange(500, dtype=torch.float64)[:, None] * inverse
    tables = None if rope == "none" else (angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))
    options = {"interleaved": rope == "neighbours"}
    if norm != "none":
        sizes = {"q_norm": heads, "k_norm": kv_heads} if norm == "all" else {"q_norm": 1, "k_norm": 1}
        options |= {name: torch.randn(size * head_dim).to(DEVICE, dtype) for name, size in sizes.items()}
    if norm == "all":  # as on a rank that has a third of the heads
        squares = head_squares(qkv, heads, kv_heads)
        assert relative_error(squares, head_squares_reference(qkv, heads, kv_heads)) < 1e-5
        options["over_all"] = NormedOverAll(squares * 3.1, 3 * heads * head_dim, 3 * kv_heads * head_dim)
    caches = [torch.full((num_blocks, block_size, kv_heads, head_dim), 7.0).to(DEVICE, dtype) for _ in range(4)]
    want = rope_cache_reference(qkv, caches[0], caches[1], tables, positions, slots, heads, **options)
    out = torch.full_like(want, float("nan"))
    rope_cache(qkv, caches[2], caches[3], tables, positions, slots, heads, out=out, **options)
    assert relative_error(out, want) < tolerance(dtype)
    assert relative_error(caches[2], caches[0]) < tolerance(dtype)
    assert torch.equal(caches[3], caches[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("heads,kv_heads,head_dim,rotary", [(8, 1, 256, 64), (3, 1, 24, 24)])
def test_heads_with_gates(heads, kv_heads, head_dim, rotary, runs, dtype):
    """Queries with a gate behind each are as those without, and gates are applied to what attention gives."""
    tokens, block_size = 5, 16
    pairs = torch.randn(tokens, heads, 2, head_dim).to(DEVICE, dtype)
    rest = torch.randn(tokens, 2 * kv_heads * head_dim).to(DEVICE, dtype)
    plain = torch.cat([pairs[:, :, 0].flatten(1), rest], 1)
    qkv = torch.cat([pairs.flatten(1), rest], 1)
    if runs > 1:
        qkv = torch.stack([qkv, torch.zeros_like(qkv)])
    positions = torch.arange(tokens, device=DEVICE)
    norms = {name: torch.randn(head_dim).to(DEVICE, dtype) for name in ("q_norm", "k_norm")}
    tables = tuple(torch.rand(8, rotary // 2, device=DEVICE) for _ in range(2))
    caches = [torch.zeros(2, block_size, kv_heads, head_dim).to(DEVICE, dtype) for _ in range(4)]
    want = rope_cache(plain, *caches[:2], tables, positions, positions, heads, unit_offset=True, **norms)
    got = rope_cache(qkv, *caches[2:], tables, positions, positions, heads, unit_offset=True, gated=True, **norms)
    assert torch.equal(got, want) and torch.equal(caches[2], caches[0]) and torch.equal(caches[3], caches[1])
    x = torch.randn(tokens, heads * head_dim).to(DEVICE, dtype)
    want = head_gates_reference(x, pairs.flatten(1), head_dim)
    assert relative_error(head_gates(x, qkv, head_dim), want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", ["qkv", "qk", "q"])
@pytest.mark.parametrize("rotary,growth,value_eps", [(64, False, 1e-4), (32, True, None), (32, False, 1e-2)])
def test_values_of_other_kinds_and_queries_that_grow(rotary, growth, value_eps, held, dtype):
    """Gemma 4's and Ministral 3's: values normed, or those of keys; queries alone; a factor by position."""
    tokens, heads, kv_heads, head_dim = 9, 6, 2, 64
    qkv = torch.randn(tokens, (heads + (len(held) - 1) * kv_heads) * head_dim).to(DEVICE, dtype)
    angles = torch.rand(100, rotary // 2, device=DEVICE)
    places = torch.randperm(32)[:tokens].to(DEVICE)
    options = {"q_norm": torch.randn(head_dim).to(DEVICE, dtype), "value_eps": value_eps, "held": held}
    options |= {"k_norm": None if held == "q" else torch.randn(head_dim).to(DEVICE, dtype)}
    options |= {"growth": torch.rand(100, device=DEVICE) + 0.5 if growth else None}
    results = []
    for way in (rope_cache, rope_cache_reference):
        caches = [torch.full((2, 16, kv_heads, head_dim), 7.0).to(DEVICE, dtype) for _ in range(2)]
        q = way(qkv, *caches, (angles.cos(), angles.sin()), places, places, heads, **options)
        results.append((q, *caches))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts_keys", [False, True])
def test_squares_of_runs(counts_keys, dtype):
    runs = in_runs(torch.randn(20, 7 * 80).to(DEVICE, dtype), 2)
    whole = runs.float().sum(0).to(dtype)
    want = head_squares_reference(whole, 3, 2, counts_keys=counts_keys)
    got = head_squares(runs, 3, 2, counts_keys=counts_keys)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert bool(got[:, 1].any()) == counts_keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [128, 48])
def test_rope_cache_of_runs(rotary, dtype):
    runs = in_runs(torch.randn(20, 8 * 128).to(DEVICE, dtype), 2)
    angles = torch.rand(100, rotary // 2, device=DEVICE)
    places = torch.randperm(32)[:20].to(DEVICE)
    results = []
    for qkv in (runs.float().sum(0).to(dtype), runs):
        caches = [torch.zeros(2, 16, 2, 128).to(DEVICE, dtype) for _ in range(2)]
        q = rope_cache(qkv, *caches, (angles.cos(), angles.sin()), places, places, 4)
        results.append((q, *caches))
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start,width,vocab", [(0, 1000, None), (64000, 5003, 68003), (2048, 2048, 3000)])
@pytest.mark.parametrize("spread", [0.1, 4, 400])  # the noise decides, both do, the logits do
def test_sampling(spread, start, width, vocab, dtype):
    rows = 33
    logits = (spread * torch.randn(rows, width)).to(DEVICE, dtype)
    temperatures = torch.rand(rows).to(DEVICE) + 0.2
    temperatures[::4] = 0
    keys = torch.randint(0, 2**32, (rows, 2)).to(DEVICE)
    options = {"vocab_start": start, "vocab_size": vocab}
    score, token = sample(logits, temperatures, keys, **options)
    want_score, want_token = sample_reference(logits.cpu(), temperatures.cpu(), keys.cpu(), **options)
    assert relative_error(score.cpu(), want_score) < 1e-5
    assert torch.equal(token.cpu(), want_token)


def test_sampling_edges():
    logits = torch.zeros(3, 1500, device=DEVICE)
    logits[1, 40:] = 1.0
    greedy = torch.zeros(3, device=DEVICE)
    keys = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    assert sample(logits, greedy, keys)[1].tolist() == [0, 40, 0]  # ties go to the lowest id
    score, token = sample(logits, greedy, keys, vocab_start=200, vocab_size=200)  # padding alone
    assert token.tolist() == [NOT_FINITE] * 3
    assert score.tolist() == [float("-inf")] * 3


def test_sampling_of_rows_with_few_candidates():
    logits = torch.full((4, 5000), float("-inf"), device=DEVICE)
    logits[1] = float("nan")
    logits[2, 4321] = -3.0
    logits[3, 17:19] = 2.0
    keys = torch.randint(0, 2**32, (4, 2)).to(DEVICE)
    score, token = sample(logits, torch.ones(4, device=DEVICE), keys)
    want_score, want_token = sample_reference(logits.cpu(), torch.ones(4), keys.cpu())
    assert token.tolist() == want_token.tolist()
    assert token[:3].tolist() == [NOT_FINITE, NOT_FINITE, 4321]
    assert torch.allclose(score.cpu(), want_score, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("floor", [None, float("-inf"), 0.5])
def test_sampling_of_rows_that_are_not_finite(floor, temperature, dtype):
    """One NaN or infinity in whatever block of a row, and it has no token on any rank; -inf is a logit like others."""
    logits = torch.randn(7, 5000)
    logits[1, 4321] = logits[2, 0] = logits[3, 4999] = float("nan")
    logits[4, 2500] = float("inf")
    logits[5, ::2] = float("-inf")
    logits[6] = float("-inf")
    logits = logits.to(DEVICE, dtype)
    temperatures = torch.full((7,), temperature, device=DEVICE)
    keys = torch.randint(0, 2**32, (7, 2)).to(DEVICE)
    floors = None if floor is None else torch.full((7,), floor, device=DEVICE)
    score, token = sample(logits, temperatures, keys, floors_T=floors)
    assert token[1:5].tolist() == [NOT_FINITE] * 4
    assert score[1:5].tolist() == [float("inf")] * 4  # which beats every other rank's
    assert (score[6], token[6]) == (float("-inf"), NOT_FINITE)  # which does not
    kept = logits.cpu().float()
    if floor is not None:  # the reference knows no floors: what they drop cannot win
        kept = kept.masked_fill(kept < floor, float("-inf"))
    want = sample_reference(kept, temperatures.cpu(), keys.cpu())[1]
    assert token[[0, 5]].tolist() == want[[0, 5]].tolist()
    # Padding is not looked at.
    logits[0, 4000:] = float("nan")
    assert sample(logits, temperatures, keys, vocab_size=4000)[1][0] >= 0


def test_sampling_frequencies():
    rows = 200 if INTERPRET else 20000
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = weights.log().expand(rows, 4).contiguous().to(DEVICE)
    keys = torch.randint(0, 2**32, (rows, 2)).to(DEVICE)
    token = sample(logits, torch.ones(rows, device=DEVICE), keys)[1].cpu()
    assert (torch.bincount(token, minlength=4) / rows - weights).abs().max() < 4 / rows**0.5
