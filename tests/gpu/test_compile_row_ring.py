"""The kernels that read one token's experts through rings, compiled for a GPU that is not here, at the sizes of
published models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon")

import torch

from tests.gpu.here import INTERPRET
from tests.gpu.random_experts import outline
from tests.gpu.test_compile import SHARED
from tests.gpu.test_compile_codes import SPILLED, Built, build
from tpctl.arch.block import Clamped
from tpctl.arch.routing import Routing
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.routing import Router
from tpctl.kernels.experts.row_logits_kernels import row_logits_kernel
from tpctl.kernels.experts.row_ring import choice_of, cut_of, pick_row_ring
from tpctl.kernels.experts.row_ring_cut import ExpertCut
from tpctl.kernels.experts.row_ring_kernels import row_ring_down_kernel, row_ring_gate_up_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

QWEN, GPT_OSS, GLM = (2048, 768, 128, 8), (2880, 2880, 32, 4), (4096, 1408, 128, 8)
CASES = [
    ("bf16", QWEN),
    ("e4m3", QWEN),
    ("e2m1", GPT_OSS),
    ("bf16", GPT_OSS),
    ("bf16", (2048, 384, 128, 8)),  # a rank of two
    ("e2m1", (2880, 1440, 32, 4)),
    ("e4m3", GLM),
]


def experts_of(kind: str, sizes: tuple[int, int, int, int]) -> tuple[Router, ExpertMatrices[Any]]:
    router, experts = outline(kind, *sizes)
    if sizes[2:] == GPT_OSS[2:]:
        bias = torch.empty(0, dtype=torch.bfloat16, device="meta")
        more = {"activation": Clamped(1.702, 7.0), "interleaved": True, "gate_up_bias": bias, "down_bias": bias}
        return router._replace(routing=Routing("softmax of chosen")), replace(experts, **more)
    if sizes == GLM:
        correction = torch.empty(sizes[2], device="meta")
        router = router._replace(routing=Routing("sigmoid", True, epsilon=1e-20), correction=correction)
    return router, experts


def compiled(kind: str, sizes: tuple[int, int, int, int], folder: Path, *, gated: bool) -> tuple[Built, ExpertCut]:
    """And what for."""
    router, experts = experts_of(kind, sizes)
    configs = pick_row_ring(router, experts, multiprocessors=132, hopper=True)
    assert configs is not None
    config = configs[not gated]
    cut = cut_of(router, experts, config, gated=gated, multiprocessors=132)
    kernel = row_ring_gate_up_kernel if gated else row_ring_down_kernel
    types = {"logits_ptr": "*fp32", "w_ptr": "*u8", "scales_ptr": "*u8", "correction_ptr": "*fp32"}
    types |= {"x_ptr": "*i32", "h_ptr": "*fp32" if kind == "bf16" else "*bf16"} if gated else {"h_ptr": "*i32"}
    flags = {"CUT": cut, "CHOICE": choice_of(router), "HAS_BIAS": experts.down_bias is not None, "PDL": True}
    flags |= (
        {"GATING": experts.activation, "H_SIZE": cut.size, "H_PIECE": cut.piece} if gated else {"HAS_RESIDUAL": True}
    )
    return build(kernel, 90, folder, types, cut.warps, 1, registers=config.registers, **flags), cut


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind,sizes", CASES)
def test_rows_come_through_a_ring(kind, sizes, gated, tmp_path) -> None:
    built, cut = compiled(kind, sizes, tmp_path, gated=gated)
    assert built.shared == cut.bytes <= SHARED[90]  # all of it is the kernel's own, which begins where it is told
    assert built.stack <= SPILLED and built.registers <= 128
    # From the first row that has come to the last that is asked for no warp waits for another one, nothing is read
    # but the ring, and nothing is kept in memory.
    loop = built.sass[built.sass.index("DEPBAR.LE SB0") : built.sass.rindex("LDGDEPBAR")]
    for what in ("LDL", "STL", "BAR.SYNC", "LDG.E"):
        assert what not in loop, what
    assert loop.count("LDGSTS.E.BYPASS.LTC128B.128") == cut.step * cut.chunks
    assert built.sass.count("DEPBAR.LE SB0") == cut.step
    before, behind = built.sass.split("ACQBULK")
    if gated:
        assert "LDG" not in before and "LDG.E.128" in behind
    else:  # which has asked and chosen, but read nothing of what comes from the kernel before
        assert before.count("LDGSTS.E.BYPASS.LTC128B.128") == cut.ahead * cut.chunks
        assert "LDG.E.128" not in before and "LDG.E.128" in behind and "LDG.E.U16" in behind  # h, and the residual


def test_the_logits_before(tmp_path: Path) -> None:
    flags = {"IN_FEATURES": 2880, "HAS_BIAS": True, "HAS_NORM": True, "UNIT_OFFSET": False, "COUNT": 32, "SIZE": 32}
    types = {"logits_ptr": "*fp32", "eps": "fp32"}
    built = build(row_logits_kernel, 90, tmp_path, types, 8, 1, BLOCK_N=1, BLOCK_K=4096, PDL=True, **flags)
    assert built.stack == 0 and built.registers <= 128 and "LDG.E.128" in built.sass
