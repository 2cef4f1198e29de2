"""Kernels for gated delta nets compiled for GPUs that are not here, at the sizes of published models."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.here import INTERPRET
from tests.gpu.test_compile import SHARED
from tpctl.accounting import NET_CHUNK
from tpctl.kernels.attention.head_gates import head_gates_kernel
from tpctl.kernels.common.launch import next_power_of_2
from tpctl.kernels.delta_net.chunks import BLOCK, CONV_WARPS, PREPARE_WARPS, pick_scan, precision
from tpctl.kernels.delta_net.chunks_kernels import conv_kernel, gated_norm_kernel, prepare_kernel, scan_kernel
from tpctl.kernels.delta_net.inputs import NetShape, constants
from tpctl.kernels.delta_net.step import REGISTERS, step_kernel, warps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]
WIDE = ("taps_ptr", "dt_bias_ptr", "a_log_ptr", "matrices_ptr", "total_ptr")
INDICES = ("reads", "writes", "copies", "lens", "count", "starts", "chunks", "sequences")
TYPES = {**dict.fromkeys(WIDE, "*fp32"), **{f"{name}_ptr": "*i32" for name in INDICES}, "eps": "fp32"}
NETS = {
    "qwen3.6-35b": NetShape(16, 32, 128, 128, 4),
    "its rank of three": NetShape(5, 10, 128, 128, 4),
    "qwen3.6-27b": NetShape(16, 48, 128, 128, 4),
}


class Made(NamedTuple):
    """Bytes of shared memory, registers of a thread, and bytes of those that are spilled."""

    shared: int
    registers: int
    spilled: int


def made(
    kernel: Any, dtype: str, arch: int, num_warps: int, folder: Path, registers: int | None = None, **options: Any
) -> Made:
    names = kernel.arg_names
    types = {name: TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    types |= dict.fromkeys(options, "constexpr")
    aligned = [name for name in names if name.endswith(("_ptr", "_stride", "_step")) and name not in options]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in options.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "maxnreg": registers}
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return Made(int(compiled.metadata.shared), int(found[1]), int(found[2]))


@pytest.mark.parametrize("rows", ["apart", "counted", "runs"])
@pytest.mark.parametrize("arch", [90, 80, 100])
@pytest.mark.parametrize("net", NETS)
def test_a_step_keeps_its_state_in_registers(net: str, arch: int, rows: str, tmp_path: Path) -> None:
    shape = NETS[net]
    blocks = next_power_of_2(shape.key_dim), next_power_of_2(shape.value_dim)
    options = constants(shape) | {"BLOCK_D": blocks[0], "BLOCK_E": blocks[1]}
    options |= {"COUNTED": rows == "counted", "RUNS": rows == "runs", "PDL": arch >= 90 and rows != "counted"}
    found = made(step_kernel, "bf16", arch, warps(*blocks), tmp_path, REGISTERS, **options)
    assert found.registers <= REGISTERS and found.shared <= 8192
    # What no row changes; and of a run what each row changes beside the state, which no ordinary step waits for.
    assert found.spilled <= {"apart": 32, "counted": 96, "runs": 224}[rows]


@pytest.mark.parametrize("kernel", ["conv", "prepare", "scan"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", [90, 80, 89, 100])
@pytest.mark.parametrize("net", NETS)
def test_chunks_fit(net: str, arch: int, dtype: str, kernel: str, tmp_path: Path) -> None:
    """In bfloat16 no registers are spilled where choices were made."""
    shape, torch_dtype = NETS[net], torch.bfloat16 if dtype == "bf16" else torch.float32
    options = constants(shape) | {"BLOCK_D": 128, "BLOCK_E": 128, "CHUNK": NET_CHUNK}
    if kernel == "conv":
        found = made(conv_kernel, dtype, arch, CONV_WARPS, tmp_path, **options)
    elif kernel == "prepare":
        options |= {"PRECISION": precision(torch_dtype), "BLOCK": BLOCK}
        found = made(prepare_kernel, dtype, arch, PREPARE_WARPS, tmp_path, **options)
    else:
        scan = pick_scan(shape, torch_dtype, SHARED[arch])
        options |= {"PRECISION": precision(torch_dtype), "TILE": scan.tile, "STAGES": scan.stages}
        found = made(scan_kernel, dtype, arch, scan.warps, tmp_path, **options)
    assert found.shared <= SHARED[arch]
    assert not found.spilled or dtype == "fp32" or arch != 90


def test_gates_and_norms_are_compiled(tmp_path: Path) -> None:
    sizes = {"GROUP": 2, "HEADS": 32, "VALUE_DIM": 128, "BLOCK_H": 8, "BLOCK_E": 128}
    for prompts in (0, 8):
        assert not made(gated_norm_kernel, "bf16", 90, 4, tmp_path, PROMPTS=prompts, **sizes).spilled
    sizes = {"SPLITS": 2, "WIDTH": 4096, "HEAD_DIM": 256, "BLOCK": 1024, "PDL": True}
    assert not made(head_gates_kernel, "bf16", 90, 4, tmp_path, **sizes).spilled
