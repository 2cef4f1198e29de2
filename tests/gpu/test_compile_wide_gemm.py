"""`wide_gemm`'s kernels compiled for Hopper, as they are launched, without a device."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from tests.gpu.code_cases import KINDS
from tests.gpu.here import INTERPRET
from tests.unit.random_codes import random_codes
from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.ahead import KernelSpec, _kernel, compile_for, unlaunched
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import DeviceFacts, stand_for
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.wide_gemm import WideConfig, has_gluon, wide_gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not has_gluon(), reason="the interpreter compiles nothing; or Gluon is another"),
]

H200 = DeviceFacts((9, 0), 132, 232448)


def meta_codes(name: str) -> Codes:
    codes = random_codes(n=1024, k=4096, **KINDS[name])
    held = {one.name: getattr(codes, one.name) for one in fields(codes)}
    return replace(codes, **{name: one.to("meta") for name, one in held.items() if isinstance(one, torch.Tensor)})


@pytest.mark.grid(2, daily=True)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", ["gptq", "awq", "int4 channel"])
@pytest.mark.parametrize("config", [
    WideConfig(64, 2, 8),
    WideConfig(64, 2, 8, 0),
    WideConfig(128, 2, 5, 0),
    WideConfig(128, 1, 6, 2),
    WideConfig(256, 2, 3, 0),
    WideConfig(256, 2, 3, 4),
])  # fmt: skip
def test_numbers_are_made_beside_products(
    config: WideConfig, name: str, activation: Activation | None, tmp_path: Path
) -> None:
    """W in registers, all of a group's products under way at once, and nothing kept in memory for want of registers.
    Where the assembler cannot follow who reads what, it waits for each product by itself."""
    before = triton.runtime.driver._active
    compile_for(H200)
    stand_for(H200)
    try:
        specs: dict[KernelSpec, None] = {}
        with unlaunched(specs):
            x = torch.empty(200, 4096, dtype=torch.bfloat16, device="meta")
            bias = torch.empty(1024, dtype=torch.bfloat16, device="meta")
            scratch = GemvScratch.allocate(torch.device("meta"))
            wide_gemm(x, meta_codes(name), scratch, config, bias_N=bias, activation=activation, pdl=True)
        assert len(specs) == (3 if config.split > 1 else 2)
        for spec in specs:
            signature, constants, options, attributes = spec.parts()
            compiled = _kernel(spec)._do_compile("", signature, 0, constants, options, attributes, warmup=True)
            assert compiled.metadata.shared <= H200.shared_memory
            (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
            tool = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(tmp_path / "cubin")]
            code = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            assert not re.search(r"\b(STL|LDL)\b", code)
            if spec.name == "wide_gemm_kernel":
                products = re.findall(r"HGMMA\S* .*", code)
                assert len(products) == 8 * config.warpgroups
                assert all(re.search(r" R\d+, R\d+, gdesc", one) for one in products)
                assert sum("gsb0" in one for one in products) == 2 * config.warpgroups  # of each half of a group
    finally:
        triton.runtime.driver._active = before
        stand_for(None)
