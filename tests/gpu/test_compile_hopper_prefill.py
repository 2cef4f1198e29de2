"""The Gluon prefill kernel compiled for Hopper, as `hopper_prefill` launches it, without a device."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from tests.gpu.here import INTERPRET
from tpctl.kernels.attention.hopper_prefill import has_gluon, hopper_prefill
from tpctl.kernels.common.ahead import KernelSpec, compile_for, unlaunched
from tpctl.kernels.common.launch import DeviceFacts, stand_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not has_gluon(), reason="the interpreter compiles nothing; or Gluon is another"),
]

H200 = DeviceFacts((9, 0), 132, 232448)


@pytest.mark.daily(3)
def test_products_run_beside_the_softmax(tmp_path: Path) -> None:
    """Where the assembler cannot follow who reads what, it waits for each product by itself, and says nothing."""
    before = triton.runtime.driver._active
    compile_for(H200)
    stand_for(H200)
    try:
        specs: dict[KernelSpec, None] = {}
        with unlaunched(specs):
            for tokens, heads, kv_heads, block in ((16_000, 32, 8, 128), (1_999, 16, 8, 256)):
                q_TND, out = torch.empty(2, tokens, heads, 128, dtype=torch.bfloat16, device="meta")
                caches = torch.empty(2, 200, block, kv_heads, 128, dtype=torch.bfloat16, device="meta")
                numbers = torch.empty(3, 9, dtype=torch.int32, device="meta")
                hopper_prefill(q_TND, *caches, numbers[:1], numbers[1], numbers[2, :8], scale=0.1, out=out)
        (spec,) = specs  # one kernel for all of these
        from tpctl.kernels.attention.hopper_prefill_kernels import hopper_prefill_kernel

        signature, constants, options, attributes = spec.parts()
        compiled = hopper_prefill_kernel._do_compile("", signature, 0, constants, options, attributes, warmup=True)
    finally:
        triton.runtime.driver._active = before
        stand_for(None)
    assert compiled.metadata.shared <= H200.shared_memory
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    code = subprocess.run([tool, "-sass", str(tmp_path / "cubin")], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"HGMMA\S* .*", code)
    assert len(products) == 2 * (8 + 2 * 16 + 8)  # of each half: the first scores, two loops, the last sums
    assert sum("gsb0" in one for one in products) == 2 * (1 + 2 * 2 + 1)
