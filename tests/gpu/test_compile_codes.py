"""Kernels that read codes, compiled for GPUs that are not here: what they take, and the instructions they come to."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from tests.gpu.here import INTERPRET
from tests.gpu.test_compile import SHARED
from tests.unit.random_codes import random_codes
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.codes_row import pick_codes_row
from tpctl.kernels.experts.codes_row_kernels import codes_row_down_kernel, codes_row_gate_up_kernel
from tpctl.kernels.experts.grouped_scaled import pick_scaled, rounds_itself
from tpctl.kernels.experts.grouped_scaled_kernels import grouped_scaled_kernel
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.linear.codes_gemm import LARGEST, GemmConfig, gemm_config
from tpctl.kernels.linear.codes_gemm_kernels import decode_kernel, quantize_kernel, scaled_gemm_kernel
from tpctl.kernels.linear.codes_gemv import gemv_form, pick_codes_gemv
from tpctl.kernels.linear.codes_gemv_kernels import codes_gemv_kernel
from tpctl.kernels.linear.codes_linear import form_of, pick_codes
from tpctl.kernels.linear.codes_linear_kernels import codes_linear_kernel
from tpctl.kernels.linear.codes_ring import cut_of, pick_codes_ring
from tpctl.kernels.linear.codes_ring_kernels import codes_ring_kernel
from tpctl.kernels.linear.packed_gemm import packed_form, pick_packed
from tpctl.kernels.linear.packed_gemm_kernels import add_parts_kernel, packed_gemm_kernel, take_apart_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

IN, OUT = 4096, 4096
POINTERS = {"w_ptr": "*u8", "zeros_ptr": "*u8", "rows_ptr": "*i32", "groups_ptr": "*i32", "factors_ptr": "*fp32"}
POINTERS |= {"partial_ptr": "*fp32", "counters_ptr": "*i32", "peers_ptr": "*i64", "epochs_ptr": "*i32", "eps": "fp32"}
POINTERS |= {"q_scales_ptr": "*fp32", "out_scales_ptr": "*fp32"}
SPILLED = 64
"""Bytes of a thread's registers that may lie in memory: less than what is read once a tile."""


class Built(NamedTuple):
    """Shared memory in bytes, registers, bytes of spilled ones, PTX and what the assembler made of it."""

    shared: int
    registers: int
    stack: int
    ptx: str
    sass: str


def build(
    kernel: Any,
    arch: int,
    folder: Path,
    types: dict[str, str],
    warps: int,
    stages: int,
    registers: int | None = None,
    **constants: Any,
) -> Built:
    names = kernel.arg_names
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names} | types
    aligned = [name for name in names if name not in constants and types[name][0] in "*i" and name != "rows"]
    gluon = hasattr(kernel, "is_gluon") and kernel.is_gluon()
    source = (GluonASTSource if gluon else ASTSource)(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    dump = subprocess.run([tool, "-res-usage", "-sass", binary], check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert used is not None
    return Built(int(found.metadata.shared), int(used[1]), int(used[2]), found.asm["ptx"], dump)


def pointers(codes: Codes) -> dict[str, str]:
    names = set(POINTERS)
    return {name: POINTERS[name] for name in names} | {
        "scales_ptr": "*fp32" if codes.scales.dtype.itemsize > 1 else "*u8"
    }


def linear(codes: Codes, rows: int, arch: int, folder: Path, *, gated: bool) -> Built:
    packed = codes.kind in PACKED
    config = pick_codes(rows, OUT, IN, packed=packed, gated=gated, multiprocessors=132, large=arch == 90)
    assert config is not None
    form, tile, groups = form_of(codes, config.bytes, fast=True)
    types = pointers(codes) | ({"x_ptr": "*i32", "norm_ptr": "*i32"} if packed else {})
    kernel = codes_linear_kernel
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    flags: dict[str, Any] = {
        "FORM": form,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": not gated,
        "HAS_NORM": gated and rows <= 16,
    }
    flags |= {"UNIT_OFFSET": False, "ACTIVATION": "silu" if gated else "", "BYTES": tile, "GROUPS": groups}
    flags |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT_K": config.split_k}
    flags |= {"STAGES": config.num_stages, "PREFETCH": config.prefetch, "RANK": 0, "WORLD": 1, "PEERS": 1}
    return build(kernel, arch, folder, types, config.num_warps, config.num_stages, PDL=arch >= 90, **flags)


def gemv(codes: Codes, rows: int, folder: Path, *, gated: bool) -> Built:
    config, found = pick_codes_gemv(rows, codes, gated=gated, multiprocessors=132, hopper=True), gemv_form(codes)
    assert config is not None and found is not None
    width = 2 if gated else 1
    kernel = codes_gemv_kernel
    types = {name: kind for name, kind in pointers(codes).items() if name in kernel.arg_names}
    flags: dict[str, Any] = {"FORM": found[0], "G": found[1], "HAS_BIAS": False, "HAS_RESIDUAL": not gated}
    flags |= {"HAS_NORM": gated, "UNIT_OFFSET": False, "ACTIVATION": "silu" if gated else "", "NORM_ROWS": 1}
    flags |= {"MR": -(-rows // 8), "R": config.outputs * width // 8, "WARPS": config.num_warps, "AHEAD": config.ahead}
    flags |= {"RANK": 0, "WORLD": 1, "PEERS": 1, "PDL": True}
    types |= {"x_ptr": "*i32", "norm_ptr": "*i32"}
    return build(kernel, 90, folder, types, config.num_warps, 1, registers=config.registers, **flags)


def ring(codes: Codes, rows: int, folder: Path, *, gated: bool) -> tuple[Built, int]:
    """And what of shared memory it is to take."""
    config = pick_codes_ring(rows, codes, gated=gated, multiprocessors=132, hopper=True)
    assert config is not None
    cut = cut_of(rows, codes, gated=gated, config=config)
    types = {"x_ptr": "*i32", "norm_ptr": "*i32", "w_ptr": "*u8", "zeros_ptr": "*u8", "eps": "fp32"}
    types |= {} if codes.kind == "uint4" else {"scales_ptr": "*fp32"}
    flags: dict[str, Any] = {"CUT": cut, "HAS_BIAS": False, "HAS_RESIDUAL": not gated, "UNIT_OFFSET": False}
    flags |= {"HAS_NORM": gated and rows == 1, "ACTIVATION": "silu" if gated else "", "PDL": True}
    built = build(codes_ring_kernel, 90, folder, types, config.num_warps, 1, registers=config.registers, **flags)
    return built, cut.bytes


def gemm(codes: Codes, config: GemmConfig, arch: int, folder: Path) -> Built:
    form, _, _ = form_of(codes, config.block_k, fast=False)
    element = {"e4m3": "fp8e4nv", "int8": "i8"}[codes.kind]
    kernel = scaled_gemm_kernel
    types = {name: kind for name, kind in pointers(codes).items() if name in kernel.arg_names}
    for name, block in (("q", config.block_m), ("w", config.block_n)):
        types[name] = f"tensordesc<{element}[{block},{config.block_k}]>" if config.tma else f"*{element}"
    flags: dict[str, Any] = {"FORM": form, "HAS_BIAS": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    flags |= {"BLOCK_K": config.block_k, "STAGES": config.num_stages, "TMA": config.tma, "PDL": arch >= 90}
    return build(kernel, arch, folder, types, config.num_warps, config.num_stages, **flags)


KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"kind": "uint4", "unit": 128},
    "awq": {"kind": "uint4", "unit": 128, "zeros": True},
    "mxfp4": {"kind": "e2m1", "unit": 32, "exponents": True},
    "fp8 block": {"kind": "e4m3", "unit": 128, "rows_unit": 128},
    "fp8 channel": {"kind": "e4m3"},
    "int8 channel": {"kind": "int8"},
}
CASES = [(90, kind, rows, gated) for kind in KINDS for rows, gated in ((1, True), (16, False))]
CASES += [
    (90, kind, rows, gated) for kind in ("gptq", "fp8 block") for rows, gated in ((32, False), (64, True), (512, False))
]
CASES += [(arch, kind, rows, False) for arch in (80, 89, 120) for kind, rows in (("awq", 1), ("fp8 block", 512))]


@pytest.mark.parametrize("arch,kind,rows,gated", CASES)
def test_stored_codes(arch: int, kind: str, rows: int, gated: bool, tmp_path: Path) -> None:
    codes = random_codes(n=OUT * (2 if gated else 1), k=IN, **KINDS[kind])
    built = linear(codes, rows, arch, tmp_path, gated=gated)
    assert built.shared <= SHARED[arch]
    assert built.stack <= SPILLED
    # Codes come 16 bytes at a time, and become bfloat16 by bits.
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", built.ptx)
    assert kind in ("awq", "mxfp4") or not re.search(r"ld\.global\S*\.[bus]8 ", built.ptx)
    assert "I2F.BF16" not in built.sass
    assert re.search(r"H(ADD|MUL|FMA)2\.BF16", built.sass)
    wide = arch == 90 and rows > 32
    assert ("HGMMA" if wide else "HMMA") in built.sass
    if rows == 1 and arch == 90:  # so that four programs and more are on a multiprocessor
        assert built.registers * 64 <= 65536 // 4 and built.shared <= SHARED[arch] // 4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_into_registers(kind: str, gated: bool, tmp_path: Path) -> None:
    """Codes come 16 bytes at a time, and nothing moves between threads on the way to the tensor cores."""
    codes = random_codes(n=OUT * (2 if gated else 1), k=IN, **KINDS[kind])
    built = gemv(codes, 1, tmp_path, gated=gated)
    assert "LDG.E.EF.128" in built.sass and "HMMA" in built.sass
    assert "SHFL.IDX" not in built.sass and "LDSM" not in built.sass
    assert built.sass.count("BAR.SYNC") < 12  # sums and squares


@pytest.mark.parametrize(
    "kind,rows,inputs,gated",
    [("gptq", 1, IN, True), ("gptq", 1, 14336, False), ("awq", 8, IN, False), ("fp8 channel", 1, IN, True)],
)
def test_codes_through_a_ring(kind: str, rows: int, inputs: int, gated: bool, tmp_path: Path) -> None:
    codes = random_codes(n=OUT * (2 if gated else 1), k=inputs, **KINDS[kind])
    codes = codes if kind == "fp8 channel" else replace(codes, scales=codes.scales.to(torch.bfloat16))
    built, shared = ring(codes, rows, tmp_path, gated=gated)
    assert built.shared == shared <= SHARED[90]  # all of it is the kernel's own, which begins where it is told
    assert built.stack <= SPILLED
    assert built.registers <= 128  # so that two programs of 8 warps are on a multiprocessor
    # From the first products to the last no warp waits for another one, and every read is far ahead of its products.
    loop = built.sass[built.sass.index("HMMA") : built.sass.rindex("HMMA")]
    assert "LDL" not in loop and "STL" not in loop
    assert "BAR.SYNC" not in loop and "LDG.E" not in loop and "LDGSTS.E.BYPASS.LTC128B.128" in loop
    assert built.sass.index("LDGSTS") < built.sass.index("ACQBULK") < built.sass.rindex("LDG.E.128")  # x


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind,hidden,width,per_token", [("mxfp4", 2880, 2880, 4), ("fp8 block", 2048, 768, 8)])
def test_experts_of_one_row_into_registers(
    kind: str, hidden: int, width: int, per_token: int, gated: bool, tmp_path: Path
) -> None:
    n, k = (2 * width, hidden) if gated else (hidden, width)
    codes = random_codes(n=n, k=k, experts=1, **KINDS[kind])
    config, found = pick_codes_row(codes, gated=gated), gemv_form(codes)
    assert found is not None
    kernel = codes_row_gate_up_kernel if gated else codes_row_down_kernel
    flags = {"FORM": found[0], "G": found[1], "SCALE_ROWS": codes.scales.shape[1], "HAS_BIAS": False, "PDL": True}
    flags |= {"R": config.rows // 8, "WARPS": config.num_warps, "AHEAD": config.ahead}
    if gated:
        flags |= {"WIDTH": width, "GATING": "silu", "INTERLEAVED": True}
    else:
        flags |= {"OUTPUTS": hidden, "HAS_SHARED": False, "HAS_FACTOR": False, "HAS_RESIDUAL": True}
        flags |= {"PER_TOKEN": per_token, "ALL_HERE": True, "RANK": 0, "WORLD": 1, "PEERS": 1}
    types = pointers(codes) | {"x_ptr": "*i32", "h_ptr": "*bf16" if gated else "*i32", "ids_ptr": "*i32"}
    types |= {"weights_ptr": "*fp32", "shared_factor_ptr": "*fp32"}
    types = {name: found for name, found in types.items() if name in kernel.arg_names}
    built = build(kernel, 90, tmp_path, types, config.num_warps, 1, registers=config.registers, **flags)
    assert built.stack <= SPILLED and "HMMA" in built.sass
    assert built.sass.count("SHFL.IDX") < 8 and "LDSM" not in built.sass
    assert built.sass.count("BAR.SYNC") < 12


KINDS_OF_8_BITS = [(80, "int8 channel")]  # it has no FP8
KINDS_OF_8_BITS += [(arch, kind) for arch in (89, 90, 120) for kind in ("fp8 block", "fp8 channel", "int8 channel")]


@pytest.mark.parametrize("arch,kind", KINDS_OF_8_BITS)
@pytest.mark.parametrize("rows", [32, 2048])
def test_products_of_8_bits(arch: int, kind: str, rows: int, tmp_path: Path) -> None:
    codes = random_codes(n=256, k=IN, **KINDS[kind])
    config = gemm_config(codes, rows, (arch // 10, arch % 10), SHARED[arch], 132)
    built = gemm(codes, config, arch, tmp_path)
    assert built.shared <= SHARED[arch]
    assert built.stack <= SPILLED
    wanted = {"int8 channel": "I", "fp8 block": "Q", "fp8 channel": "Q"}[kind] + ("GMMA" if arch == 90 else "MMA")
    assert wanted in built.sass
    assert not re.search(r"ld\.global\S*\.[bus]8 ", built.ptx)


@pytest.mark.parametrize("arch,kind", KINDS_OF_8_BITS)
@pytest.mark.parametrize("block_m,gated", [(m, gated) for m in (16, 32, 64, 128) for gated in (True, False)])
def test_experts_in_8_bits(arch: int, kind: str, block_m: int, gated: bool, tmp_path: Path) -> None:
    """Those of Qwen3-30B-A3B."""
    hidden, width = 2048, 768
    up, down = (
        replace(random_codes(n=n, k=k, experts=2, **KINDS[kind]), rounds=True)
        for n, k in ((2 * width, hidden), (hidden, width))
    )
    experts = ExpertMatrices(CodedMatrix(up), CodedMatrix(down))
    found = pick_scaled(9999, experts, 2, block_m, (arch // 10, arch % 10), SHARED[arch])
    assert found is not None
    codes, config = (up, found[0]) if gated else (down, found[1])
    form, _, _ = form_of(codes, config.block_k, fast=False)
    element = {"e4m3": "*fp8e4nv", "int8": "*i8"}[codes.kind]
    types = {name: one for name, one in pointers(codes).items() if name in grouped_scaled_kernel.arg_names}
    types |= {"q_ptr": element, "w_ptr": element, "pairs_ptr": "*i32", "tiles_ptr": "*i32", "weights_ptr": "*fp32"}
    flags: dict[str, Any] = {"FORM": form, "OUTPUTS": codes.outputs, "SCALE_ROWS": codes.scales.shape[1]}
    flags |= {"PER_TOKEN": 8, "GATING": "silu" if gated else None, "INTERLEAVED": False, "HAS_BIAS": False}
    flags |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    rounds = gated and rounds_itself(experts, found)
    types |= {"out_ptr": element} if rounds else {}
    flags |= {"STAGES": config.num_stages, "PDL": arch >= 90, "LARGEST": LARGEST[codes.kind] if rounds else 0.0}
    built = build(grouped_scaled_kernel, arch, tmp_path, types, config.num_warps, config.num_stages, **flags)
    assert built.shared <= SHARED[arch]
    assert built.stack <= SPILLED
    assert {"int8 channel": "I"}.get(kind, "Q") + ("GMMA" if arch == 90 else "MMA") in built.sass
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", built.ptx)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_four_bits_of_many_rows(rows: int, split: int, kind: str, tmp_path: Path) -> None:
    """The numbers are made where the tensor cores take them from: in registers, x beside them in shared memory."""
    codes = random_codes(n=256, k=IN, **KINDS[kind])
    config = pick_packed(rows, codes, (9, 0), 2)
    assert config is not None
    found = packed_form(codes, config.bytes)
    assert found is not None
    types = {name: one for name, one in pointers(codes).items() if name in packed_gemm_kernel.arg_names}
    types |= {
        "x": f"tensordesc<bf16[{config.block_m},{found[1]}]>",
        "w": f"tensordesc<u8[{config.block_n},{found[1]}]>",
    }
    flags: dict[str, Any] = {"FORM": found[0], "HAS_BIAS": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    flags |= {"BYTES": found[1], "SPLIT": split, "STAGES": config.num_stages, "PDL": True}
    types |= {"out_ptr": "*fp32"} if split > 1 else {}
    built = build(packed_gemm_kernel, 90, tmp_path, types, config.num_warps, config.num_stages, **flags)
    assert built.shared <= SHARED[90] and built.stack <= SPILLED
    assert re.search(r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+, gdesc", built.sass)
    types = {"x_ptr": "*i32", "out_ptr": "*i16"}
    built = build(take_apart_kernel, 90, tmp_path, types, 4, 1, BLOCK=1024, PDL=True)
    assert built.stack == 0
    flags = {"HAS_BIAS": True, "SPLIT": 4, "BLOCK": 1024, "PDL": True}
    built = build(add_parts_kernel, 90, tmp_path, {"parts_ptr": "*fp32"}, 4, 1, **flags)
    assert built.stack == 0 and "LDG.E.128" in built.sass


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_made_before(arch: int, tmp_path: Path) -> None:
    for kind in ("awq", "fp8 block"):
        codes = random_codes(n=256, k=IN, **KINDS[kind])
        form, tile, groups = form_of(codes, 64, fast=False)
        types = {name: one for name, one in pointers(codes).items() if name in decode_kernel.arg_names}
        flags = {"FORM": form, "BLOCK_N": 32, "BYTES": tile, "GROUPS": groups, "PDL": arch >= 90}
        built = build(decode_kernel, arch, tmp_path, types, 4, 1, **flags)
        assert built.shared <= SHARED[arch] and built.stack == 0
        assert re.search(r"st\.global\.v4", built.ptx)
    if arch >= 89:
        types = {"q_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "eps": "fp32"}
        flags = {"HAS_NORM": True, "UNIT_OFFSET": False, "LARGEST": 448.0, "WIDTH": IN, "BLOCK": 128, "PDL": True}
        built = build(quantize_kernel, arch, tmp_path, types, 8, 1, **flags)
        assert built.stack == 0 and "F2FP" in built.sass
