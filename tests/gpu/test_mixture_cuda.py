"""Mixtures with fused kernels compute what they do in plain torch, in every way and in a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.here import DEVICE
from tests.gpu.test_compute_cuda import FEW, HOPPER, MANY, SHAPE, FirstOfTwo, Plain, a_step, build
from tests.tiny import make_mixture
from tests.unit.random_codes import random_codes
from tpctl.arch.routing import Routing
from tpctl.distributed import TPGroup
from tpctl.errors import UnsupportedModelError
from tpctl.kernels.common.codes import decode
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.layers.attention.triton import TritonBackend
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.experts import Mixture
from tpctl.layers.norm import RMSNorm
from tpctl.layers.stream import Rows
from tpctl.layers.weights import experts_cuda
from tpctl.layers.weights.experts import CodedStack, DenseStack, Gating, MixtureParts, Stack
from tpctl.models.decoder import Decoder
from tpctl.sharding.cutting.shard import shard_checkpoint

pytestmark = pytest.mark.gpu
HIDDEN = 64


def made(name: str, folder: Path, tp_size: int, **changes: Any) -> Path:
    make_mixture(name, folder / "hf", **{**SHAPE, "hidden_size": HIDDEN, **changes})
    shard_checkpoint(folder / "hf", folder / "shards", tp_size)
    return folder / "shards"


def mixtures(model: Decoder) -> Iterator[Mixture]:
    for layer in model.model.layers:
        if isinstance(layer._mlp[0], Mixture):
            yield layer._mlp[0]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "glm4_moe", "mixtral", "gpt_oss", "minimax_m2"])
def test_any_number_of_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, group = made(name, tmp_path, 1), TPGroup(0, 1, DEVICE)
    compute = CudaCompute(group, facts=HOPPER)
    plain, fused = (build(folder, SdpaBackend, group, one)[0] for one in (Plain(group), compute))
    norm = RMSNorm(HIDDEN, 1e-6, torch.float32).to(DEVICE)
    norm.weight.data = torch.rand(HIDDEN, device=DEVICE) + 0.5
    ways: list[str] = []
    for way in ("one_row", "grouped"):
        original = getattr(experts_cuda, way)
        monkeypatch.setattr(
            experts_cuda,
            way,
            lambda *args, way=way, original=original, **more: ways.append(way) or original(*args, **more),
        )
    for want_of, got_of in zip(mixtures(plain), mixtures(fused), strict=True):
        for count in (1, 5, 19):
            x = torch.randn(count, HIDDEN, device=DEVICE)
            with torch.inference_mode():
                want = want_of.local(Rows(x, norm))
                for got in (got_of.local(Rows(x, norm)), got_of.local(Rows(norm(x))), got_of.partial(Rows(x, norm))):
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
                residual = torch.ones_like(x)
                got_of.add_to(residual, Rows(x, norm))
            torch.testing.assert_close(residual, want + 1, rtol=1e-4, atol=1e-4)
    assert set(ways) == {"one_row", "grouped"}


@pytest.mark.parametrize("name,tp_size,new", [("qwen3_moe", 1, MANY), ("qwen2_moe", 2, FEW)])
def test_same_logits_and_cache(name: str, tp_size: int, new: list[int], tmp_path: Path) -> None:
    folder = made(name, tmp_path, tp_size, hidden_size=256)  # heads of 32, whatever a family derives them from
    group = (TPGroup if tp_size == 1 else FirstOfTwo)(0, tp_size, DEVICE)
    run, step = a_step(new, tp_size)
    plain = run(*build(folder, SdpaBackend, group, Plain(group)), step)
    assert plain[0].std() > 0.01
    found = run(*build(folder, TritonBackend, group, CudaCompute(group, facts=HOPPER)), step)
    for got, want in zip(found, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sums_are_sent_where_linears_send_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, group = made("glm4_moe", tmp_path, 2), FirstOfTwo(0, 2, DEVICE)
    compute = CudaCompute(group, facts=HOPPER)
    fused = build(folder, SdpaBackend, group, compute)[0]
    outlet: Any = SimpleNamespace()
    sent: list[Any] = []
    for way in ("one_row", "grouped"):

        def spy(*args: Any, outlet: Any, original: Any = getattr(experts_cuda, way), **more: Any) -> Tensor:
            sent.append(outlet)
            return original(*args, **more)

        monkeypatch.setattr(experts_cuda, way, spy)
    mixture = next(mixtures(fused))
    for count in (1, 3):
        rows = Rows(torch.randn(count, HIDDEN, device=DEVICE))
        for compute._state.sums, compute._state.sends in ((outlet, True), (outlet, False), (None, False)):
            with torch.inference_mode():
                mixture.partial(rows)
                mixture.local(rows)
    assert sent == [outlet, None, None, None, None, None] * 2


def test_codes_that_no_kernel_reads_are_refused() -> None:
    compute = CudaCompute(TPGroup(0, 1, DEVICE), facts=HOPPER)
    gate_up, down = (random_codes("uint4", 32, 32, experts=2, device=str(DEVICE)) for _ in range(2))
    with pytest.raises(UnsupportedModelError, match="quantised in other groups"):
        compute.experts(CodedStack((gate_up, gate_up)), CodedStack((down,)), Gating(), 0)


@pytest.mark.always
@pytest.mark.parametrize("coded", ["gate_up", "down"])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_linear_may_be_codes_and_the_other_numbers(coded: str, rows: int) -> None:
    group = TPGroup(0, 1, DEVICE)
    stacks: list[Stack] = []
    for name, outputs in (("gate_up", 64), ("down", 32)):
        matrix = random_codes("int8", outputs, 32, experts=2, unit=16, device=str(DEVICE))
        numbers = torch.stack([decode(matrix.of_expert(number)) for number in range(2)])
        stacks.append(CodedStack((matrix,)) if name == coded else DenseStack(numbers))
    parts = MixtureParts(2, 1, Routing("softmax"), torch.randn(2, 32, device=DEVICE), None, None, None, None)
    x = Rows(torch.randn(rows, 32, device=DEVICE))
    got, want = (
        compute.experts(*stacks, Gating(), 0).mixture(x, parts)
        for compute in (CudaCompute(group, facts=HOPPER), Plain(group))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.always
@pytest.mark.parametrize(
    "kind,groups,dtype,way",
    [
        ("e2m1", False, torch.bfloat16, "codes_row"),
        ("int8", False, torch.bfloat16, "codes_row"),
        ("int8", False, torch.float32, "grouped"),
        ("int8", True, torch.bfloat16, "grouped"),
    ],
)
def test_the_way_of_one_row_of_codes(
    kind: Any, groups: bool, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = CudaCompute(TPGroup(0, 1, DEVICE), facts=HOPPER)
    matrices = (random_codes(kind, n, 32, experts=2, unit=16, groups=groups, device=str(DEVICE)) for n in (64, 32))
    experts = compute.experts(*(CodedStack((matrix,)) for matrix in matrices), Gating(), 0)
    gate = torch.randn(2, 32, device=DEVICE, dtype=dtype)
    parts = MixtureParts(2, 1, Routing("softmax"), gate, None, None, None, None)
    taken: list[str] = []
    for known in ("one_row", "codes_row", "grouped"):
        monkeypatch.setattr(experts_cuda, known, lambda *_, known=known, **__: taken.append(known))
    experts.mixture(Rows(torch.randn(1, 32, device=DEVICE, dtype=dtype)), parts)
    assert taken == [way]


@pytest.mark.always
@pytest.mark.parametrize("kind,more,sent,way", [
    ("bf16", {}, False, "row_ring"), ("bf16", {}, True, "one_row"), ("e2m1", {}, False, "row_ring"),
    ("e4m3", {"rows_unit": 128}, False, "row_ring"), ("e4m3", {"rows_unit": 128}, True, "codes_row"),
])  # fmt: skip
def test_one_row_by_rings_where_nothing_is_sent(
    kind: Any, more: dict[str, Any], sent: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    dtype, compute = torch.bfloat16, CudaCompute(TPGroup(0, 1, DEVICE), facts=HOPPER)
    sizes = ((256, 128), (128, 128))
    stacks: list[Stack] = [DenseStack(torch.randn(2, *size, device=DEVICE, dtype=dtype)) for size in sizes]
    if kind != "bf16":
        codes = {"experts": 2, "unit": 128 if more else 32, "exponents": not more, **more}
        stacks = [CodedStack((random_codes(kind, *size, device=str(DEVICE), **codes),)) for size in sizes]
    experts = compute.experts(*stacks, Gating(), 0)
    gate = torch.randn(2, 128, device=DEVICE, dtype=dtype)
    parts = MixtureParts(2, 1, Routing("softmax"), gate, None, None, None, None)
    taken: list[str] = []
    for known in ("row_ring", "one_row", "codes_row", "grouped"):
        monkeypatch.setattr(experts_cuda, known, lambda *_, known=known, **__: taken.append(known))
    sums: Any = SimpleNamespace()
    compute._state.sums, compute._state.sends = sums, sent
    x = Rows(torch.randn(1, 128, device=DEVICE, dtype=dtype))
    experts.mixture(x, parts, partial=True)
    monkeypatch.setattr(experts_cuda, "_plain", lambda parts: None)
    beside: Any = SimpleNamespace(local=lambda rows: rows.x)
    experts.mixture(x, replace(parts, shared=beside), partial=sent)
    assert taken == [way, "grouped" if kind == "bf16" else "codes_row"]
