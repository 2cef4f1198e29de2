"""Kernels for mixtures compiled for GPUs that are not here, at the sizes of published models."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

import torch

from tests.gpu.here import INTERPRET
from tests.gpu.test_compile import SHARED, shared_memory
from tpctl.arch.block import Clamped
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.experts.coded_matrix import most_bytes
from tpctl.kernels.experts.grouped_codes_kernels import grouped_codes_kernel
from tpctl.kernels.experts.grouped_kernels import gather_sum_kernel, grouped_linear_kernel
from tpctl.kernels.experts.one_row import RowConfig, held_of_shared, pick_row
from tpctl.kernels.experts.one_row_kernels import one_row_kernel
from tpctl.kernels.experts.placing import CHUNK, _count_kernel, _place_few_kernel, _place_kernel
from tpctl.kernels.experts.routing_kernels import gate_kernel, route_kernel
from tpctl.kernels.experts.tile_config import TileConfig, pick_tile
from tpctl.kernels.linear.codes_linear import form_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

ALONE = {"RANK": 0, "WORLD": 1, "PEERS": 1}
TYPES = dict.fromkeys(("ids_ptr", "pairs_ptr", "tiles_ptr", "counts_ptr", "rows_ptr", "groups_ptr"), "*i32")
TYPES |= dict.fromkeys(("counters_ptr", "up_r_ptr", "down_r_ptr"), "*i32")
TYPES |= dict.fromkeys(("factors_ptr", "up_f_ptr", "down_f_ptr", "weights_ptr"), "*fp32")
TYPES |= {"shared_ptr": "*bf16"}  # of a gate; elsewhere another thing is shared
TYPES |= dict.fromkeys(("h_ptr", "shared_h_ptr", "logits_ptr", "correction_ptr", "y_ptr"), "*fp32")

# hidden size, width, experts, of a token, activation
QWEN = (2048, 768, 128, 8, "silu")
GPT_OSS = (2880, 2880, 32, 4, Clamped(1.702, 7.0))
QWEN_35B = (2048, 512, 256, 8, "silu")
DEEPSEEK = (7168, 2048, 256, 8, "silu")

E4M3: dict[str, Any] = {"scale_columns": 56, "unit": 128, "has_rows": True}
UINT4: dict[str, Any] = {"scale_columns": 64, "unit": 32, "zero": 8}
E2M1: dict[str, Any] = {"scale_columns": 90, "unit": 32, "exponents": True}
CASES: list[tuple[int, Any, str, dict[str, Any]]] = [
    (90, QWEN, "", {}),
    (90, QWEN_35B, "", {}),
    (90, GPT_OSS, "e2m1", E2M1),
    (89, DEEPSEEK, "e4m3", E4M3),
    (80, QWEN, "uint4", UINT4),
    (120, GPT_OSS, "", {}),
]


class Form(NamedTuple):
    """How a matrix is stored: "" for numbers, else a kind of codes."""

    kind: str
    outputs: int
    inputs: int
    scale_columns: int = 1
    unit: int = 1
    zero: int = 0
    exponents: bool = False
    has_rows: bool = False


def coded(form: Form, block_k: int) -> dict[str, Any]:
    """What `grouped_codes_kernel` is compiled for of such codes."""
    grid = (1, form.outputs, form.scale_columns)
    scales = torch.empty(grid, dtype=torch.uint8 if form.exponents else torch.float32, device="meta")
    rows = torch.empty(form.outputs, dtype=torch.int32, device="meta") if form.has_rows else None
    values = torch.empty(1, form.outputs, 1, dtype=torch.uint8, device="meta")
    codes = Codes(form.kind, form.inputs, values, scales, rows=rows, unit=form.unit, zero=form.zero)  # type: ignore[arg-type]
    found, tile, groups = form_of(codes, most_bytes(codes, block_k), fast=True)
    return {"FORM": found, "OUTPUTS": form.outputs, "SCALE_ROWS": form.outputs, "BYTES": tile, "GROUPS": groups}


def taken(kernel: Any, arch: int, config: Any, kind: str = "", exponents: bool = False, **constants: Any) -> int:
    """Bytes of shared memory that `kernel` takes."""
    types = dict(TYPES)
    if kind:
        types |= dict.fromkeys(("w_ptr", "zeros_ptr", "up_w_ptr", "up_z_ptr", "down_w_ptr", "down_z_ptr"), "*u8")
        types |= dict.fromkeys(("scales_ptr", "up_s_ptr", "down_s_ptr"), "*u8" if exponents else "*fp32")
        types |= {"x_ptr": "*i32"} if kernel is grouped_codes_kernel and kind in PACKED else {}
    return shared_memory(kernel, "bf16", arch, config, pointers=types, PDL=arch >= 90, **constants)


def forms_of(arch: int, model: Any, kind: str, codes: dict[str, Any]) -> tuple[Form, Form]:
    """How gate and up are stored, and how down is."""
    hidden, width, *_ = model
    up, down = (Form(kind, n, k, **codes) for n, k in ((2 * width, hidden), (hidden, width)))
    return up, down


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize("arch,model,kind,codes", CASES)
def test_linears_of_experts_fit(arch, model, kind, codes, block_m, gated) -> None:
    _, _, _, per_token, activation = model
    form = forms_of(arch, model, kind, codes)[0 if gated else 1]
    biases = isinstance(activation, Clamped)
    packed = kind in PACKED
    config = pick_tile(block_m, gated=gated, itemsize=2, limit=SHARED[arch], codes=bool(kind), packed=packed)
    flags = {"LISTED": block_m > 16, "PER_TOKEN": per_token, "SLOTS": per_token, "INTERLEAVED": biases}
    flags |= {"BLOCK_M": block_m, "BLOCK_N": config.block_n, "GATING": activation if gated else None}
    stored = {"INPUTS": form.inputs, "OUTPUTS": form.outputs, "PART": False, "BLOCK_K": config.block_k}
    kernel = grouped_linear_kernel
    if kind:
        kernel, stored = grouped_codes_kernel, coded(form, config.block_k)
    flags |= {"HAS_BIAS": biases, "STAGES": config.num_stages, **stored}
    assert taken(kernel, arch, config, kind, bool(codes.get("exponents")), **flags) <= SHARED[arch], config


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("arch,model", [(arch, model) for arch, model, kind, _ in CASES if not kind])
def test_the_experts_of_one_row_fit(arch, model, stage) -> None:
    hidden, width, *_ = model
    row = pick_row(hidden, width, itemsize=2, programs=132, limit=SHARED[arch])
    assert row_taken(arch, model, row, stage=stage) <= SHARED[arch], row


@pytest.mark.parametrize("kind,codes", [("uint4", UINT4), ("e2m1", E2M1), ("e4m3", E4M3)])
def test_the_smallest_tiles_are_what_tensor_cores_take(kind, codes) -> None:
    form, config = Form(kind, 96, 2880, **codes), TileConfig(16, 64, 16, 2, 3)
    flags = {"LISTED": False, "PER_TOKEN": 2, "SLOTS": 2, "INTERLEAVED": False, "BLOCK_M": 16, "BLOCK_N": 64}
    flags |= {"GATING": "silu", "HAS_BIAS": False, "STAGES": 3, **coded(form, config.block_k)}
    assert taken(grouped_codes_kernel, 90, config, kind, bool(codes.get("exponents")), **flags) <= SHARED[90]


def row_taken(arch: int, model: Any, row: RowConfig, *, stage: int) -> int:
    """Bytes of shared memory that the mixture of one row takes."""
    hidden, width, count, per_token, activation = model
    biases = isinstance(activation, Clamped)
    held = held_of_shared(hidden, 0 if biases else width, 2, 132, row)
    return taken(
        one_row_kernel, arch, row, IN_FEATURES=hidden, HAS_GATE_BIAS=biases, HAS_SHARED_GATE=False, HAS_NORM=True,
        UNIT_OFFSET=False, **choice_of(count, per_token), SLOTS=per_token,
        COPIES=max(1, 32 * row.num_warps // count), WIDTH=width, SHARED_WIDTH=0 if biases else width,
        HAS_UP_BIAS=biases, HAS_DOWN_BIAS=biases, GATING=activation, INTERLEAVED=biases, HAS_RESIDUAL=True, GATE_N=1,
        GATE_K=1 << (hidden - 1).bit_length(), UP_N=row.up_n, UP_K=row.up_k, UP_STAGES=row.up_stages,
        DOWN_N=row.down_n, DOWN_K=row.down_k, DOWN_STAGES=row.down_stages, STAGE=stage, SHARED_N=held[0],
        SHARED_READ=held[1], **ALONE,
    )  # fmt: skip


def choice_of(count: int, per_token: int) -> dict[str, Any]:
    groups = 8 if count == 256 else 1
    chosen = {"SCORES": "sigmoid", "RENORMALISE": True, "HAS_CORRECTION": True, "SCALE": 2.5, "EPSILON": 1e-20}
    chosen |= {"GROUPS": groups, "TOP_GROUPS": (groups + 1) // 2, "COUNT": count, "PER_TOKEN": per_token}
    return chosen | {"ROWS": groups, "SIZE": count // groups}


AROUND = ("route", "gate", "count", "place few", "place many", "sum")


@pytest.mark.parametrize("what", AROUND)
@pytest.mark.parametrize("arch,model", [(90, QWEN), (80, DEEPSEEK), (120, GPT_OSS)])
def test_what_is_around_them_fits(arch, model, what) -> None:
    hidden, _, count, per_token, _ = model
    chosen = choice_of(count, per_token)
    gate = {"IN_FEATURES": hidden, "HAS_BIAS": True, "HAS_SHARED": True, "HAS_NORM": True, "UNIT_OFFSET": False}
    place = {"EXPERTS": count, "CHUNK": CHUNK}
    sums = {"COLUMNS": hidden, "PER_TOKEN": per_token, "HAS_SHARED": True, "HAS_FACTORS": True, "HAS_RESIDUAL": True}
    kernel, flags = {
        "route": (route_kernel, chosen),
        "gate": (gate_kernel, {"BLOCK_N": 1, "BLOCK_K": 1 << (hidden - 1).bit_length(), "COPIES": 1, **gate, **chosen}),
        "count": (_count_kernel, {"STEP": 1024, **place}),
        "place few": (_place_few_kernel, {"BLOCK_M": 64, "STEP": 1024}),
        "place many": (_place_kernel, {"BLOCK_M": 64, "BLOCK": 64, "STEP": 128, **place}),
        "sum": (gather_sum_kernel, {"BLOCK": 1024, **sums, **ALONE}),
    }[what]
    assert taken(kernel, arch, TileConfig(16, 16, 16), **flags) <= SHARED[arch]
