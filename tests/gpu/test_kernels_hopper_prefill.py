"""The Gluon prefill kernel: on Hopper, and on any processor with what stands for its language; and when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, INTERPRET
from tpctl.kernels.attention import hopper_prefill as module
from tpctl.kernels.attention import paged_prefill as prefill
from tpctl.kernels.attention.hopper_prefill import STAGES, TILE, has_gluon, hopper_prefill, takes
from tpctl.kernels.attention.paged_prefill import paged_prefill, paged_prefill_reference
from tpctl.kernels.attention.tile_runs import LOG2E
from tpctl.kernels.common.launch import DeviceFacts, is_hopper, stand_for
from tpctl.layers.attention import triton as backend
from tpctl.layers.attention.base import AttentionSpec, LayerKV
from tpctl.layers.attention.paged import PagedPlan
from tpctl.layers.batch import ForwardBatch, PoolTables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gluon(), reason="this Triton's Gluon is another")]

H200 = DeviceFacts((9, 0), 132, 232448)
BATCHES = {  # (new tokens, cached prefix)
    "one": [(300, 0)],
    "mixed": [(70, 0), (3, 200), (129, 1)],
    "whole": [(1, 0), (64, 64), (128, 0), (130, 300)],
}
LONG = {"prompts": [(1500, 0), (1024, 0)], "chunks": [(1025, 900), (2000, 130), (1100, 1)]}


class Case(NamedTuple):
    q_TND: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    lens: Tensor

    def wanted(self) -> Tensor:
        return paged_prefill_reference(*(one.float() for one in self[:3]), *self[3:])

    def check(self, out: Tensor) -> None:
        """Each head of each token by itself, and that rows before the first sequence's are left alone."""
        first = int(self.starts[0])
        got, want = out[first:].float(), self.wanted()[first:]
        assert float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max()) < 1.5e-2
        assert out[:first].isnan().all()


def made(pairs: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, block: int, before: int) -> Case:
    """Sequences behind so many rows of others, in shuffled blocks; behind a sequence's end is no number."""
    torch.manual_seed(len(pairs))
    lens = [new + cached for new, cached in pairs]
    counts = [-(-length // block) for length in lens]
    tables = torch.zeros(len(pairs), max(counts) + 1, dtype=torch.int32)
    for row, blocks in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        tables[row, : len(blocks)] = blocks
    caches = torch.randn(2, sum(counts), block, kv_heads, head_dim).bfloat16()
    for row, length in enumerate(lens):
        if length % block:
            caches[:, tables[row, length // block], length % block :] = float("nan")
    starts = torch.tensor([before, *(before + torch.tensor(pairs)[:, 0].cumsum(0)).tolist()], dtype=torch.int32)
    q_TND = torch.randn(int(starts[-1]), heads, head_dim).bfloat16()
    return Case(q_TND, *caches, tables, starts, torch.tensor(lens, dtype=torch.int32))


@pytest.mark.skipif(not INTERPRET, reason="there is a device for it")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tile,block,programs", [(64, 64, 1), (64, 128, 3), (128, 128, 5)])
def test_its_code_attends(tile: int, block: int, programs: int, batch: str) -> None:
    from tests.gpu.gluon_stand_in import Descriptor, Pointer, launch
    from tpctl.kernels.attention import hopper_prefill_kernels as kernels

    case = made(BATCHES[batch], 4, 2, 64, block, before=2)
    out = torch.full_like(case.q_TND, float("nan"))
    tokens, heads, head_dim = case.q_TND.shape
    works = heads * (tokens // 128 + len(case.lens))
    launch(
        kernels,
        "hopper_prefill_kernel",
        min(programs, works),
        Descriptor(case.q_TND.view(tokens, -1), [64, head_dim]),
        *(Descriptor(cache.view(-1, 2 * head_dim), [tile, head_dim]) for cache in (case.k_cache, case.v_cache)),
        *(Pointer(one) for one in (case.tables, case.starts, case.lens, out)),
        head_dim**-0.5 * LOG2E.value,
        len(case.lens),
        heads,
        works,
        case.tables.stride(0),
        out.stride(0),
        2,
        block,
        STAGES=STAGES,
    )
    case.check(out)


@pytest.mark.skipif(not is_hopper(DEVICE), reason="for Hopper")
@pytest.mark.parametrize("batch", [*BATCHES, *LONG])
@pytest.mark.parametrize("heads,kv_heads,block", [(8, 2, TILE), (4, 4, 2 * TILE), (16, 2, TILE)])
def test_matches_reference(heads: int, kv_heads: int, block: int, batch: str) -> None:
    case = Case(*(one.to(DEVICE) for one in made((BATCHES | LONG)[batch], heads, kv_heads, 128, block, before=3)))
    out = torch.full_like(case.q_TND, float("nan"))
    case.check(hopper_prefill(*case, scale=128**-0.5, out=out))
    if batch in LONG:
        pairs = 1 << 30
        assert takes(case.q_TND, case.k_cache, pairs)
        assert torch.equal(paged_prefill(*case, pairs=pairs)[3:], out[3:])


@pytest.fixture
def h200() -> Iterator[None]:
    """The CPU stands for one."""
    stand_for(H200)
    yield
    stand_for(None)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU stands for a device")
@pytest.mark.parametrize(
    "changed,used",
    [
        ({}, True),
        ({"pairs": None}, False),
        ({"pairs": (1 << 25) - 1}, False),  # two heads
        ({"pairs": (1 << 25), "tokens": 1 << 16}, True),
        ({"pairs": (1 << 25), "tokens": 1 + (1 << 16)}, False),
        ({"block": 64}, False),
        ({"block": 384}, True),
        ({"head_dim": 64}, False),
        ({"dtype": torch.float32}, False),
        ({"window": 4096}, False),
        ({"window": 0}, True),
        ({"softcap": 30.0}, False),
        ({"sinks": True}, False),
        ({"packed": True}, False),
        ({"pdl": True}, False),
        ({"facts": H200._replace(capability=(10, 0))}, False),
        ({"version": "3.5.1"}, False),
    ],
)
def test_is_used_where_it_can(h200: None, changed: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"tokens": 512, "pairs": 1 << 25, "block": 128, "head_dim": 128, "dtype": torch.bfloat16, "facts": H200}
    has |= changed
    stand_for(has["facts"])
    monkeypatch.setattr(module.triton, "__version__", has.get("version", "3.6.0"))
    launches: list[str] = []
    monkeypatch.setattr(prefill, "hopper_prefill", lambda *_, **__: launches.append("gluon"))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: launches.append("triton")

    monkeypatch.setattr(prefill, "_prefill_kernel", Kernel())
    cache = torch.empty(1, has["block"], 2, has["head_dim"], dtype=has["dtype"])
    options = {name: has[name] for name in ("window", "softcap", "pdl") if name in has}
    if has.get("sinks"):
        options["sinks_N"] = torch.zeros(2)
    if has.get("packed"):
        options["factors"] = torch.zeros(1, 2, has["block"], 2, dtype=torch.uint8)
        cache = torch.empty(1, 2, has["block"], 192, dtype=torch.uint8)
    q_TND = torch.empty(has["tokens"], 2, has["head_dim"], dtype=has["dtype"])
    table, starts, lens = torch.zeros(3, 2, dtype=torch.int32)
    paged_prefill(q_TND, cache, cache, table[None], starts, lens[1:], pairs=has["pairs"], **options)
    assert launches == ["gluon" if used else "triton"]


def test_a_step_tells_how_much_its_prompts_see(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, empty = torch.zeros(6, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(
        input_ids=tokens,
        rope_positions=tokens,
        pools=(PoolTables(tokens, torch.zeros(3, 1, dtype=torch.int32)),),
        query_lens=[1, 3, 2],
        seq_lens=[9, 3, 7],
        num_decodes=1,
        logits_rows=empty,
        query_start_S1=torch.tensor([0, 1, 4, 6], dtype=torch.int32),
        seq_lens_S=torch.tensor([9, 3, 7], dtype=torch.int32),
    )
    told: list[int | None] = []
    monkeypatch.setattr(backend, "paged_prefill", lambda *_, pairs, **__: told.append(pairs))
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=128, scale=1.0)
    q_TND, cache = torch.empty(5, 2, 128), torch.empty(1, 128, 1, 128)
    chunks = PagedPlan(batch).prefill_chunks
    kernels = backend.TritonBackend([spec], 128)
    kernels.prefill_pages(q_TND, LayerKV(spec, cache, cache), chunks, q_TND, None)
    kernels.prefill_pages(q_TND, LayerKV(spec, cache, cache), chunks._replace(pairs=None), q_TND, None)
    assert told == [(1 + 2 + 3) + (6 + 7), None]
