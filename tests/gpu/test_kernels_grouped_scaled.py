"""The experts of many tokens in 8-bit numbers, against the same rounding in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tests.gpu.random_experts import CLAMPED, coded_experts, random_experts, random_routed, wanted
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import shared_memory
from tpctl.kernels.experts.coded_experts import CodedExperts
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.gating import gated_reference
from tpctl.kernels.experts.grouped import grouped
from tpctl.kernels.experts.grouped_scaled import LEAST_PAIRS, pick_scaled, rounds_itself, scaled_pairs
from tpctl.kernels.experts.placing import place
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.experts.tile_config import pick_block_m
from tpctl.kernels.linear.codes_gemm import quantize_rows_reference, scaled_gemm_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

FORMS = [
    ("e4m3", {"unit": 128, "rows_unit": 128}),
    ("e4m3", {"unit": 128, "rows_unit": 128, "first": 64}),
    ("e4m3", {"unit": 64, "rows_unit": 32, "exponents": True}),
    ("e4m3", {"factors": True}),
    ("int8", {}),
]


def rounding(experts: CodedExperts) -> CodedExperts:
    """The same, of a format that rounds inputs."""
    gate_up, down = (CodedMatrix(replace(one.codes, rounds=True)) for one in (experts.gate_up, experts.down))
    return replace(experts, gate_up=gate_up, down=down)


def reference(routed: Routed, experts: CodedExperts, blocks: tuple[int | None, int | None]) -> torch.Tensor:
    """What every pair adds, [T * K, H], in float64; rows of other ranks' pairs are zeros."""
    per_token = routed.ids.shape[1]
    total = torch.zeros(routed.ids.numel(), experts.hidden, dtype=torch.float64, device=routed.x.device)
    for expert in range(experts.count):
        pairs = torch.where(routed.ids.flatten() == experts.first + expert)[0]
        gate_up, down = (one.codes.of_expert(expert) for one in (experts.gate_up, experts.down))
        both = product(routed.x[pairs // per_token], gate_up, blocks[0])
        if experts.gate_up_bias is not None:
            both += experts.gate_up_bias[expert].double()
        gate, up = (both[:, ::2], both[:, 1::2]) if experts.interleaved else both.chunk(2, -1)
        y = product(gated_reference(gate, up, experts.activation).to(routed.x.dtype), down, blocks[1])
        if experts.down_bias is not None:
            y += experts.down_bias[expert].double()
        total[pairs] = y * routed.weights.flatten()[pairs, None].double()
    return total


def product(x: torch.Tensor, codes: Codes, block: int | None) -> torch.Tensor:
    assert codes.kind in ("e4m3", "int8")
    q, scales = quantize_rows_reference(x, codes.kind, block)
    return scaled_gemm_reference(q, scales, codes, block)


@pytest.mark.parametrize("kind,codes", FORMS)
@pytest.mark.parametrize(
    "rows,count,per_token,hidden,width", [(150, 4, 2, 256, 192), (70, 3, 1, 80, 208), (40, 3, 2, 96, 256)]
)
@pytest.mark.parametrize("activation,biases,interleaved", [("silu", False, False), (CLAMPED, True, True)])
def test_pairs(kind, codes, rows, count, per_token, hidden, width, activation, biases, interleaved) -> None:
    """Of which some are other ranks'."""
    torch.manual_seed(rows)
    plain = random_experts(
        count, hidden, width, torch.bfloat16, biases=biases, activation=activation, interleaved=interleaved, first=1
    )
    experts = rounding(coded_experts(count, hidden, width, kind, experts=plain, **codes))
    routed = random_routed(rows, hidden, count + 1, per_token, torch.bfloat16)
    limit = shared_memory(DEVICE)
    configs = pick_scaled(64 * count, experts, count, 64, (9, 0), limit)
    assert configs is not None
    placed = place(routed.ids, count, configs[0].block_m, first=1)
    for pdl in (False,) if INTERPRET else (False, True):
        got = scaled_pairs(routed, experts, placed, configs, pdl=pdl)
        blocks = [
            config.block_k if one.codes.scales.shape[-1] > 1 else None
            for one, config in zip((experts.gate_up, experts.down), configs, strict=True)
        ]
        want = reference(routed, experts, (blocks[0], blocks[1]))
        here = ((routed.ids >= 1) & (routed.ids <= count)).flatten()
        # A number on the border between two is rounded either way.
        assert relative_error(got[here], want[here]) < 1e-2


def test_sums_of_many_tokens_are_those() -> None:
    """And near those of numbers that are not rounded."""
    torch.manual_seed(0)
    plain = random_experts(3, 128, 128, torch.bfloat16)
    experts = rounding(coded_experts(3, 128, 128, "e4m3", experts=plain, unit=128, rows_unit=128))
    routed = random_routed(100, 128, 3, 2, torch.bfloat16)
    got = grouped(routed, experts)
    blocks = (128, 128)
    want = reference(routed, experts, blocks).view(100, 2, 128).sum(1)
    assert relative_error(got, want) < 1e-2
    assert relative_error(got, wanted(routed, experts)) < 0.07


def test_choice() -> None:
    def chosen(kind: str = "e4m3", pairs: int = LEAST_PAIRS * 4, arch: tuple[int, int] = (9, 0), rounds=True, **codes):
        plain = random_experts(4, 64, 64, torch.bfloat16)
        experts = coded_experts(4, 64, 64, kind, experts=plain, **codes)
        return pick_scaled(pairs, rounding(experts) if rounds else experts, 4, pick_block_m(pairs, 4), arch, 232448)

    configs = chosen()
    assert configs is not None and [config.block_m for config in configs] == [32, 32]
    assert [config.block_m for config in chosen(pairs=9999) or ()] == [64, 64]
    assert [config.block_m for config in chosen(pairs=9999, arch=(8, 9)) or ()] == [128, 128]
    assert chosen(arch=(8, 0)) is None and chosen("int8", arch=(8, 0)) is not None
    assert [config.block_m for config in chosen(pairs=20) or ()] == [16, 16]
    fewer = LEAST_PAIRS * 4 - 1
    assert chosen(pairs=fewer + 1, arch=(8, 9)) is not None and chosen(pairs=fewer, arch=(8, 9)) is None
    assert chosen(rounds=False) is None and chosen("uint4") is None
    for limit in (232448, 166912, 101376):
        for config, parts in zip(
            pick_scaled(9999, rounding(EXPERTS), 4, 128, (9, 0), limit) or (), (2, 1), strict=True
        ):
            stage = (config.block_m + parts * config.block_n) * config.block_k
            assert config.num_stages * stage <= limit


def test_who_rounds_between_the_linears() -> None:
    """gate_up's launch, where a tile of its features is a block of down's inputs."""

    def rounds(width: int, arch: tuple[int, int] = (9, 0), **codes) -> bool:
        plain = random_experts(2, 64, width, torch.bfloat16)
        experts = rounding(coded_experts(2, 64, width, "e4m3", experts=plain, **codes))
        configs = pick_scaled(99, experts, 2, 128, arch, 232448)
        assert configs is not None
        return rounds_itself(experts, configs)

    blocks = {"unit": 128, "rows_unit": 128}
    assert rounds(256, **blocks) and not rounds(192, **blocks)
    assert not rounds(256, arch=(8, 9), **blocks)  # its tiles are narrower
    assert not rounds(256)  # a scale for all inputs
    assert not rounds(256, unit=64, rows_unit=64)


EXPERTS = coded_experts(4, 64, 64, "e4m3", experts=random_experts(4, 64, 64, torch.bfloat16))
