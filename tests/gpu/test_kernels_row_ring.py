"""The experts of one token, read through rings in shared memory, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DEVICE, INTERPRET
from tests.gpu.random_experts import CLAMPED, check_launch, coded_experts, outline, random, random_experts, wanted
from tests.gpu.threads import Threads
from tpctl.arch.routing import Routing
from tpctl.kernels.common.codes import E2M1, Codes
from tpctl.kernels.experts import row_ring as module
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.routing import GateScratch, Router, gate_reference
from tpctl.kernels.experts.routing_reference import route as route_reference
from tpctl.kernels.experts.row_ring import (
    RingConfig,
    choice_of,
    cut_of,
    in_blocks,
    pick_row_ring,
    ring_kind,
    row_ring,
)
from tpctl.kernels.experts.row_ring_choice_kernels import chosen_ids, chosen_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

BF16 = torch.bfloat16
CODES: dict[str, dict[str, Any]] = {
    "e2m1": {"kind": "e2m1", "unit": 32, "exponents": True},
    "e4m3": {"kind": "e4m3", "unit": 128, "rows_unit": 128},
}
CODES["e4m3 bf16"] = CODES["e4m3"]  # scales in bfloat16
KINDS = ["bf16", *CODES]
CONFIGS = [
    None,
    (RingConfig(1, 2, 4, 4), RingConfig(2, 1, 8, 4)),  # steps that are not all there, and rings longer than rows
    (RingConfig(2, 2, 6), RingConfig(1, 4, 2)),
    (RingConfig(4, 1, 4), RingConfig(4, 2, 4, 4)),  # more threads than chunks
]


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRET:
        for name in ("row_ring_gate_up_kernel", "row_ring_down_kernel"):
            monkeypatch.setattr(module, name, Threads(getattr(module, name)))


def made(kind: str, count: int, hidden: int, width: int, **more: Any) -> ExpertMatrices[Any]:
    experts: ExpertMatrices[Any] = random_experts(count, hidden, width, BF16, **more)
    if kind in CODES:
        experts = coded_experts(count, hidden, width, experts=experts, **CODES[kind])
    if kind == "e4m3 bf16":
        stored = (replace(one.codes, scales=one.codes.scales.to(BF16)) for one in (experts.gate_up, experts.down))
        gate_up, down = map(CodedMatrix, stored)
        return replace(experts, gate_up=gate_up, down=down)
    return experts


def router_of(count: int, per_token: int, hidden: int, routing: Routing = Routing("softmax", True)) -> Router:
    return Router(random(count, hidden, dtype=BF16, scale=2 * hidden**-0.5), routing, per_token)


def check(router: Router, experts: ExpertMatrices[Any], configs: Any = None, *, residual=False, norm=True) -> None:
    x = random(1, experts.hidden, dtype=BF16)
    options: dict[str, Any] = {"norm": (random(experts.hidden, dtype=BF16), 1e-6)} if norm else {}
    routed = gate_reference(x, router, **options)
    configs = configs or pick_row_ring(router, experts, multiprocessors=4, hopper=True)
    assert configs is not None
    scratch = GateScratch.allocate(DEVICE)

    def launch(routed: Any, experts: Any, **more: Any) -> torch.Tensor:
        return row_ring(x, router, scratch, experts, configs=configs, **options, **more)

    check_launch(launch, routed, experts, wanted(routed, experts), 4e-3, residual=residual)


@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True),
                                                       ("gelu_tanh", True, False)])  # fmt: skip
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind,count,per_token,hidden,width", [
    ("bf16", 8, 3, 256, 96), ("bf16", 5, 2, 136, 40),
    ("e2m1", 8, 3, 256, 96), ("e2m1", 5, 2, 96, 160),  # 3 and 5 chunks a row: scales begin anywhere in a word
    ("e4m3", 8, 3, 256, 128), ("e4m3", 5, 2, 272, 144),
    ("e4m3 bf16", 8, 3, 256, 128), ("e4m3 bf16", 5, 2, 384, 256),  # 3 scales a row, which begin in half a word
])  # fmt: skip
def test_row_ring(kind, count, per_token, hidden, width, config, activation, biases, interleaved) -> None:
    torch.manual_seed(count)
    experts = made(kind, count, hidden, width, biases=biases, activation=activation, interleaved=interleaved)
    check(router_of(count, per_token, hidden), experts, config, residual=biases, norm=interleaved)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kind,hidden,width,biases", [
    ("bf16", 2048, 768 // 2, False), ("bf16", 2880, 2880 // 8, True),
    ("e2m1", 2880, 2880 // 2, True), ("e2m1", 2880, 2880 // 10, True),
    ("e4m3 bf16", 2048, 768 // 2, False), ("e4m3", 1024, 768, False),
])  # fmt: skip
def test_sizes_of_published_models(kind, hidden, width, biases) -> None:
    torch.manual_seed(width)
    more = {"biases": True, "activation": CLAMPED, "interleaved": True} if biases else {}
    check(router_of(3, 2, hidden), made(kind, 3, hidden, width, **more), residual=True)


ROUTINGS = [
    (Routing("softmax", True), False),
    (Routing("softmax"), False),
    (Routing("softmax of chosen"), False),
    (Routing("sigmoid", True, scale=2.5, epsilon=1e-20), True),
    (Routing("sigmoid", True), False),
]


@pytest.mark.parametrize("routing,corrected", ROUTINGS)
def test_choices(routing, corrected) -> None:
    torch.manual_seed(1)
    router = router_of(40, 5, 64, routing)._replace(bias=random(40, dtype=BF16))
    if corrected:
        router = router._replace(correction=torch.rand(40, device=DEVICE))
    check(router, made("bf16", 40, 64, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_other_ranks_add_nothing(kind) -> None:
    torch.manual_seed(0)
    experts = replace(made(kind, 4, 256, 128, biases=True), first=4)
    for per_token in (1, 4, 12):
        for config in (None, CONFIGS[2]):
            check(router_of(12, per_token, 256), experts, config, residual=per_token > 4)  # of one, perhaps zero


@gluon.jit
def _choose(logits_ptr, correction_ptr, ids_ptr, weights_ptr, CHOICE: gl.constexpr):
    thread = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [2], [0]))
    lane = thread % 32
    ids = chosen_ids(logits_ptr, correction_ptr, lane, CHOICE)
    weights = chosen_weights(logits_ptr, ids, lane, CHOICE)
    gl.store(ids_ptr + thread, ids, mask=lane < CHOICE.per_token)
    gl.store(weights_ptr + thread, weights, mask=lane < CHOICE.per_token)


def chosen(logits: torch.Tensor, routing: Routing, per_token: int, correction: torch.Tensor | None = None):
    """Ids and weights, of which both warps have the same."""
    router = Router(torch.empty(len(logits), 1), routing, per_token, correction=correction)
    ids, weights = (torch.full((2, 32), -1, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.float32))
    kernel = Threads(_choose) if INTERPRET else _choose
    kernel[(1,)](logits, logits if correction is None else correction, ids, weights, CHOICE=choice_of(router),
                 num_warps=2)  # fmt: skip
    assert torch.equal(ids[0], ids[1])
    return ids[0, :per_token], weights[0, :per_token]


@pytest.mark.parametrize("count,per_token", [(4, 4), (8, 2), (60, 4), (128, 8), (512, 10), (33, 32)])
@pytest.mark.parametrize("routing,corrected", ROUTINGS)
def test_chosen_as_the_reference_does(routing, corrected, count, per_token) -> None:
    torch.manual_seed(count)
    for ties in (False, True):
        logits = 3 * torch.randn(count, device=DEVICE)
        if ties:
            logits = logits.clamp(-1, 1).round()  # with zeros of both signs
        correction = torch.rand(count, device=DEVICE).mul(4).round() if corrected else None
        ids, weights = chosen(logits, routing, per_token, correction)
        want_ids, want = route_reference(logits[None], routing, per_token, correction)
        if not (corrected and ties):  # a sum of equal scores may be rounded in another way
            assert torch.equal(ids, want_ids[0])
            torch.testing.assert_close(weights, want[0], rtol=2e-6, atol=2e-6)
        assert len(set(ids.tolist())) == per_token


def test_what_is_no_number_is_chosen_last() -> None:
    logits = torch.randn(12, device=DEVICE)
    logits[3] = logits[7] = float("nan")
    ids, weights = chosen(logits, Routing("softmax of chosen"), 10)
    want = [one for one in logits.nan_to_num(-100.0).argsort(descending=True).tolist() if one not in (3, 7)]
    assert ids.tolist() == want and weights.isfinite().all()
    assert chosen(logits, Routing("softmax"), 2)[1].isnan().all()
    assert chosen(torch.full((12,), float("nan"), device=DEVICE), Routing("softmax"), 8)[0].tolist() == list(range(8))
    logits[4:] = float("-inf")
    logits[3] = 0.0
    ids, weights = chosen(logits, Routing("softmax"), 8)
    assert sorted(ids.tolist()[:4]) == [0, 1, 2, 3] and ids.tolist()[4:] == [4, 5, 6, 7] and weights.isfinite().all()


def _exact(codes: Codes, numbers: torch.Tensor) -> None:
    """Down gives each number of W [64, 256], which h picks by one input; gate_up has ones alone."""
    ones = torch.zeros(1, 512, 64, dtype=BF16, device=DEVICE)
    router = Router(torch.zeros(1, 64, dtype=BF16, device=DEVICE), Routing("softmax"), 1)
    for at in range(0, 256, 37):
        ones.zero_()[0, at], ones[0, 256 + at] = 1.0, 1.0
        experts: ExpertMatrices[Any] = ExpertMatrices(DenseMatrix(ones), CodedMatrix(codes))
        x = torch.zeros(1, 64, dtype=BF16, device=DEVICE)
        x[0, 0] = 2.0
        got = row_ring(x, router, GateScratch.allocate(DEVICE), experts, configs=(RingConfig(1, 2, 4),) * 2)
        one = torch.tensor(4 * torch.sigmoid(torch.tensor(2.0)))  # silu(2) * 2, in float16 of 1 to 2
        error = (got[0].double().cpu() - numbers[:, at].double() * one).abs()
        assert (error <= numbers[:, at].double().abs() * one * 2**-8).all()


def test_every_e2m1_number_counts() -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 256, (1, 64, 128), dtype=torch.uint8)
    scales = torch.randint(90, 150, (1, 64, 8), dtype=torch.uint8)
    halves = torch.stack((values[0] & 15, values[0] >> 4), -1).flatten(1).long()
    table = torch.tensor([*E2M1, *(-one for one in E2M1)])
    numbers = table[halves] * 2.0 ** (scales[0].float() - 127).repeat_interleave(32, 1)
    _exact(Codes("e2m1", 256, values.to(DEVICE), scales.to(DEVICE), unit=32), numbers)


def test_every_e4m3_number_counts() -> None:
    """Subnormal ones too."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    values = bytes_[bytes_ & 127 != 127].repeat(65)[: 64 * 256].view(1, 64, 256).view(torch.float8_e4m3fn)
    rows = torch.zeros(64, dtype=torch.int32)
    scales = torch.tensor([[[0.25, 3.0]]])
    numbers = values[0].float() * scales[0, 0].repeat_interleave(128)
    codes = Codes("e4m3", 256, values.to(DEVICE), scales.to(DEVICE), rows=rows.to(DEVICE), unit=128)
    _exact(codes, numbers)


def test_what_it_takes() -> None:
    router = router_of(4, 2, 256)
    for kind in KINDS:
        experts = made(kind, 4, 256, 128)
        assert ring_kind(experts.gate_up) == ring_kind(experts.down) == kind.split()[0]
        picked = pick_row_ring(router, experts, multiprocessors=4, hopper=True)
        assert picked is not None and pick_row_ring(router, experts, multiprocessors=4, hopper=False) is None
        for other in (
            router._replace(shared=router.weight[0]),
            router._replace(correction=router.weight[:, 0]),  # of a softmax
            router._replace(routing=Routing("sigmoid", groups=2)),
        ):
            assert pick_row_ring(other, experts, multiprocessors=4, hopper=True) is None
    assert ring_kind(made("bf16", 2, 132, 64).gate_up) is None
    assert ring_kind(made("e4m3 bf16", 2, 384, 64).gate_up) is None  # 3 scales: the next expert's begin in half a word
    assert ring_kind(DenseMatrix(torch.zeros(2, 8, 16, device=DEVICE))) is None
    assert ring_kind(DenseMatrix(torch.zeros(2 * 8 * 16 + 1, dtype=BF16, device=DEVICE)[1:].view(2, 8, 16))) is None
    plain = random_experts(2, 128, 64, BF16)
    for codes in ({"kind": "uint4", "unit": 32}, {"kind": "e2m1", "unit": 16, "exponents": True}, {"kind": "e4m3"}):
        assert ring_kind(coded_experts(2, 128, 64, experts=plain, **codes).gate_up) is None


def test_blocks_that_begin_elsewhere_are_not_taken() -> None:
    """A rank's gates and ups of 64 outputs each have their own rows of scales."""
    experts = made("e4m3", 2, 256, 64)
    assert in_blocks(experts.gate_up)
    codes = experts.gate_up.codes
    rows = torch.arange(128, dtype=torch.int32, device=DEVICE) // 64
    assert not in_blocks(CodedMatrix(replace(codes, rows=rows)))
    router, down = router_of(2, 1, 256), experts.down
    taken = [
        CodedExperts(CodedMatrix(replace(codes, rows=one, scales=codes.scales.clone())), down)
        for one in (codes.rows, rows)
    ]
    found = [pick_row_ring(router, one, multiprocessors=4, hopper=True) for one in taken]
    assert found[0] is not None and found[1] is None


@pytest.mark.parametrize("kind,hidden,width,count,per_token", [
    ("bf16", 2048, 768, 128, 8), ("e4m3", 2048, 768, 128, 8), ("e2m1", 2880, 2880, 32, 4), ("bf16", 2880, 2880, 32, 4),
])  # fmt: skip
def test_both_programs_fit_a_multiprocessor(kind, hidden, width, count, per_token) -> None:
    """But no two of gate_up; each takes a KB more than it asks for."""
    router, experts = outline(kind, hidden, width, count, per_token)
    configs = pick_row_ring(router, experts, multiprocessors=132, hopper=True)
    assert configs is not None
    up, down = (
        cut_of(router, experts, config, gated=gated, multiprocessors=132)
        for config, gated in zip(configs, (True, False), strict=True)
    )
    whole = 228 << 10
    assert up.bytes + down.bytes + 2048 <= whole < 2 * (up.bytes + 1024)
    assert 32 * (up.warps * configs[0].registers + down.warps * configs[1].registers) <= 65536
    for cut in (up, down):
        assert cut.teams * cut.ahead * cut.row_bytes >= 49152  # on their way
        assert cut.all_chunks > (0.9 if cut.gated else 0.7) * cut.chunks * cut.team


def test_wrong_inputs_are_refused() -> None:
    router, experts, scratch = router_of(4, 2, 128), made("bf16", 4, 128, 64), GateScratch.allocate(DEVICE)
    configs = (RingConfig(1, 2, 4), RingConfig(1, 2, 4))
    x = random(2, 136, dtype=BF16)
    for wrong in (x[:, :128], x[:1, :128].float(), x[:1, 1:129]):
        with pytest.raises(ValueError, match="and such experts: use one_row or codes_row"):
            row_ring(wrong, router, scratch, experts, configs=configs)
    for config in (RingConfig(1, 3, 4), RingConfig(1, 2, 6, 4), RingConfig(1, 2, 0), RingConfig(1, 2, 3, 3)):
        with pytest.raises(ValueError, match="warps must be a power of 2, rows steps of 2 or 4"):
            row_ring(x[:1, :128], router, scratch, experts, configs=(config, config))


def test_without_gluon_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "row_ring_gate_up_kernel", None)
    assert pick_row_ring(router_of(4, 2, 128), made("bf16", 4, 128, 64), multiprocessors=4, hopper=True) is None
