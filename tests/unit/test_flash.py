"""What the flash-attn backend asks of its packages: modules in their place check it and answer in plain torch.

FlashAttention-2 itself runs in tests/gpu; of FlashAttention-3 this is all that is tested.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.attention_cases import CASES, written_out
from tpctl.errors import EngineError, UsageError
from tpctl.layers.attention import flash, select
from tpctl.layers.attention.base import AttentionSpec
from tpctl.layers.attention.flash import FlashAttentionBackend
from tpctl.layers.attention.select import choose_backend, make_backend
from tpctl.layers.batch import ForwardBatch, PoolTables

HEADS = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.3)
Window = tuple[int, int]


def answer(
    q_ND: Tensor,
    keys_LKD: Tensor,
    values_LKD: Tensor,
    queries: int,
    softmax_scale: float,
    causal: bool,
    window: Window,
    softcap: float,
) -> Tensor:
    """[queries, N, D]: the last queries of L tokens; causal, aligned to the bottom right."""
    assert causal
    assert window == (-1, -1) or (window[0] >= 0 and window[1] == 0)
    width = None if window == (-1, -1) else window[0] + 1
    rows = []
    for at, q in enumerate(q_ND):
        end = len(keys_LKD) - queries + at + 1
        first = 0 if width is None else max(0, end - width)
        heads = []
        for head, q_D in enumerate(q):
            kv = head // HEADS.group
            scores = (keys_LKD[first:end, kv].double() @ q_D.double()) * softmax_scale
            weights = (softcap * (scores / softcap).tanh() if softcap else scores).softmax(0)
            heads.append(weights @ values_LKD[first:end, kv].double())
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """[length, K, D] of one sequence."""
    return cache[table.long()].flatten(0, 1)[:length]


def check(table: Tensor, *lengths: Tensor) -> None:
    for tensor in (table, *lengths):
        assert tensor.dtype == torch.int32
    assert table.is_contiguous()
    for tensor in lengths:
        assert tensor.dim() == 1


def decode(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, table: Tensor, scale: float, causal: bool, w: Window, cap: float
) -> Tensor:
    check(table, lens)
    assert q.shape[:2] == (len(lens), 1) == (len(table), 1)
    out = []
    for row, length in enumerate(lens.tolist()):
        keys, values = pages(k, table[row], length), pages(v, table[row], length)
        out.append(answer(q[row], keys, values, 1, scale, causal, w, cap))
    return torch.stack(out).to(q.dtype)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lens: list[int],
    table: Tensor,
    scale: float,
    causal: bool,
    w: Window,
    cap: float,
) -> Tensor:
    check(table, starts)
    assert starts.shape == (len(table) + 1,)
    assert (starts[0], starts[-1]) == (0, len(q))
    out = []
    for row, length in enumerate(lens):
        own = q[starts[row] : starts[row + 1]]
        keys, values = pages(k, table[row], length), pages(v, table[row], length)
        out.append(answer(own, keys, values, len(own), scale, causal, w, cap))
    return torch.cat(out).to(q.dtype)


def fa2() -> ModuleType:
    """flash-attn 2.8's paged functions, as far as they are used."""

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        num_splits: int = 0,
    ) -> Tensor:
        assert k_cache.shape[1] % 256 == 0
        return decode(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        block_table: Tensor,
    ) -> Tensor:
        assert k.shape[1] % 256 == 0
        assert cu_seqlens_k.dtype == torch.int32
        lens = cu_seqlens_k.diff().tolist()
        assert cu_seqlens_k[0] == 0
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= max(lens)
        return prefill(q, k, v, cu_seqlens_q, lens, block_table, softmax_scale, causal, window_size, softcap)

    return module("flash_attn", flash_attn_with_kvcache, flash_attn_varlen_func)


def fa3() -> ModuleType:
    """FlashAttention-3's ``flash_attn_interface``; its varlen function takes no pages, the other one takes both."""

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        num_splits: int = 0,
    ) -> Tensor:
        more = (page_table, softmax_scale, causal, window_size, softcap)
        if cu_seqlens_q is None:
            assert num_splits > 0, "chosen on the host, which a captured graph cannot do again"
            return decode(q, k_cache, v_cache, cache_seqlens, *more)
        assert max_seqlen_q is not None
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        check(page_table, cache_seqlens)
        return prefill(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens.tolist(), *more)

    def flash_attn_varlen_func(*args: Any, **more: Any) -> Tensor:
        raise AssertionError("it would read the cache as one long sequence")

    return module("flash_attn_interface", flash_attn_with_kvcache, flash_attn_varlen_func)


def module(name: str, *functions: Callable[..., Any]) -> ModuleType:
    made = ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


@pytest.fixture(params=["fa2", "fa3"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(flash, "installed_flash_attention", lambda: request.param)
    made = {"fa2": fa2, "fa3": fa3}[request.param]()
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return str(request.param)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (20, 0.8), (100, None)])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_attention_written_out(
    case: str, window: int | None, softcap: float | None, version: str
) -> None:
    torch.manual_seed(0)
    lengths, block = CASES[case], 256 if version == "fa2" else 16
    spec = replace(HEADS, window=window, softcap=softcap)
    backend = FlashAttentionBackend([spec, spec], block)
    counts = [-(-length // block) for _, length in lengths]
    ids = torch.randperm(sum(counts) + 3)[: sum(counts)].int()
    kv = backend.allocate(sum(counts) + 3, torch.float32, torch.device("cpu"))[1]
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    queries, expected, slots = [], [], []
    for row, (own, (new, length)) in enumerate(zip(ids.split(counts), lengths, strict=True)):
        tables[row, : len(own)] = own
        q, k, v = torch.randn(length, 10, 16).split([6, 2, 2], dim=1)
        at = torch.arange(length)
        places = own[at // block].long() * block + at % block
        kv.k.view(-1, 2, 16)[places], kv.v.view(-1, 2, 16)[places] = k, v
        queries.append(q[length - new :])
        slots.append(places[length - new :])
        expected += [written_out(q[at], k[: at + 1], v[: at + 1], spec) for at in range(length - new, length)]
    news = torch.tensor([new for new, _ in lengths])
    forward = ForwardBatch(
        input_ids=torch.zeros(int(news.sum()), dtype=torch.int64),
        rope_positions=torch.zeros(int(news.sum()), dtype=torch.int64),
        pools=(PoolTables(torch.cat(slots), tables),),
        query_lens=news.tolist(),
        seq_lens=[length for _, length in lengths],
        num_decodes=int((news == 1).sum()),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        query_start_S1=torch.cat([torch.zeros(1, dtype=torch.int64), news.cumsum(0)]).int(),
        seq_lens_S=torch.tensor([length for _, length in lengths], dtype=torch.int32),
    )
    found = backend.attend_cached(torch.cat(queries), kv, backend.begin(forward))
    torch.testing.assert_close(found.double(), torch.stack(expected).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "size", "multiple"), [("fa2", 128, 256), ("fa3", 24, 16)])
def test_blocks_of_another_size_are_refused(
    kind: str, size: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "installed_flash_attention", lambda: kind)
    said = f"--block-size {size} is no multiple of {multiple}"
    with pytest.raises(EngineError, match=said):
        FlashAttentionBackend([HEADS], size)


@pytest.mark.parametrize("name", ["triton", "flash-attn"])
def test_backends_of_triton_kernels_need_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=f"'{name}' needs the triton package.* --attention-backend sdpa"):
        choose_backend(name, "cuda", torch.bfloat16)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "sdpa"
    monkeypatch.setattr(select, "find_spec", lambda package: object())
    assert choose_backend(name, "cuda", torch.bfloat16) == name


def test_without_a_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "installed_flash_attention", lambda: None)
    with pytest.raises(EngineError, match="pip install flash-attn"):
        FlashAttentionBackend([HEADS], 256)


def test_a_version_without_soft_caps_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capped = replace(HEADS, softcap=50.0)
    assert FlashAttentionBackend([HEADS, capped], 256).layers[1] == capped
    monkeypatch.setattr(flash, "_functions", lambda version: (None, lambda q, *, window_size: None))
    with pytest.raises(EngineError, match="the installed flash-attn caps no attention scores, as this model does"):
        FlashAttentionBackend([HEADS, capped], 256)
    assert FlashAttentionBackend([HEADS], 256).layers == (HEADS,)


def test_sinks_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda package: object())
    layers = [HEADS, replace(HEADS, sinks=True)]
    with pytest.raises(UsageError, match="flash-attn knows no attention sinks, which this model has; use"):
        make_backend("flash-attn", "cuda", torch.bfloat16, layers, None)
    assert make_backend("sdpa", "cuda", torch.bfloat16, layers, None).name == "sdpa"
