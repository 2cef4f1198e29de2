"""Latent attention's kernels compiled for GPUs that are not here, at DeepSeek's sizes: they fit, and spill next to
nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.test_compile import POINTERS, SHARED
from tests.gpu.test_compile_codes import SPILLED, Built, build
from tpctl.kernels.attention.latent_decode import latent_config, most_rows
from tpctl.kernels.attention.latent_decode_kernels import latent_combine_kernel, latent_decode_kernel
from tpctl.kernels.attention.latent_plain import latent_plain_kernel, plain_config
from tpctl.kernels.attention.latent_prefill import latent_prefill_config, latent_prefill_kernel
from tpctl.kernels.attention.latent_prepare import LatentShape, _prepare_kernel, prepare_config
from tpctl.kernels.attention.latent_values import _values_kernel, values_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

SHAPE = LatentShape(512, 128, 64, 128)
KEPT: dict[str, Any] = {"RANK": 512, "ROPE": 64, "BLOCK_RANK": 512, "BLOCK_ROPE": 64, "BLOCK_SIZE": 128}
ITEMSIZE = {"bf16": 2, "fp32": 4}
CASES = [(90, "bf16"), (90, "fp32"), (89, "bf16"), (80, "bf16"), (100, "bf16"), (120, "bf16")]


def compiled(kernel: Any, arch: int, dtype: str, folder: Path, config: Any, **constants: Any) -> Built:
    pointers = POINTERS | {"key_start_ptr": "*i32", "sums_ptr": f"*{dtype}", "shared_ptr": f"*{dtype}"}
    types = {name: pointers.get(name, f"*{dtype}") for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "fp32" for name in ("eps", "scale_log2e") if name in kernel.arg_names}
    return build(kernel, arch, folder, types, config.num_warps, config.num_stages, **constants)


def check(found: Built, arch: int, config: Any) -> None:
    assert found.shared <= SHARED[arch], config
    assert found.stack <= (4 * SPILLED if arch == 100 else SPILLED), config  # of which nothing was measured


@pytest.mark.parametrize("heads", [1, 16, 20, 64, 128])
@pytest.mark.parametrize("arch,dtype", CASES)
def test_decode_fits(arch: int, dtype: str, heads: int, tmp_path: Path) -> None:
    config = latent_config(heads, 512, 64, 132, ITEMSIZE[dtype], SHARED[arch], most_rows(divmod(arch, 10)))
    flags = {"NUM_HEADS": heads, "TILE": config.tile, "BLOCK_M": config.block_m, "STAGES": config.num_stages}
    check(compiled(latent_decode_kernel, arch, dtype, tmp_path, config, PDL=arch >= 90, **KEPT, **flags), arch, config)


@pytest.mark.parametrize("arch,dtype", CASES)
def test_prompts_fit(arch: int, dtype: str, tmp_path: Path) -> None:
    config = latent_prefill_config(512, 64, ITEMSIZE[dtype], SHARED[arch], most_rows(divmod(arch, 10)))
    flags = {"NUM_HEADS": 16, "TILE": config.tile, "BLOCK_M": config.block_m, "STAGES": config.num_stages}
    check(compiled(latent_prefill_kernel, arch, dtype, tmp_path, config, **KEPT, **flags), arch, config)


@pytest.mark.parametrize("tokens", [100, 4096])
@pytest.mark.parametrize("arch,dtype", CASES)
def test_prompts_with_keys_that_were_made_fit(arch: int, dtype: str, tokens: int, tmp_path: Path) -> None:
    config = plain_config(tokens, 1, SHAPE, ITEMSIZE[dtype], SHARED[arch])
    flags: dict[str, Any] = {"NOPE": 128, "ROPE": 64, "VALUE": 128}
    flags |= {"BLOCK_NOPE": 128, "BLOCK_ROPE": 64, "BLOCK_VALUE": 128}
    flags |= {"BLOCK_M": config.block_m, "TILE": config.tile, "STAGES": config.num_stages}
    check(compiled(latent_plain_kernel, arch, dtype, tmp_path, config, **flags), arch, config)


@pytest.mark.parametrize("tokens", [1, 40, 2048])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("arch,dtype", CASES)
def test_what_is_around_it_fits(arch: int, dtype: str, heads: int, tokens: int, tmp_path: Path) -> None:
    size, pdl = ITEMSIZE[dtype], {"PDL": arch >= 90}
    before = prepare_config(tokens, heads, 512, size)
    flags: dict[str, Any] = {
        "NUM_HEADS": heads,
        "RANK": 512,
        "NOPE": 128,
        "HALF": 32,
        "VALUE": 128,
        "INTERLEAVED": True,
    }
    flags |= {"BLOCK_RANK": 512, "BLOCK_NOPE": 128, "BLOCK_HALF": 32, "BLOCK_HEADS": 16}
    flags |= {"BLOCK_T": before.block_t, "BLOCK_N": before.block_n}
    check(compiled(_prepare_kernel, arch, dtype, tmp_path, before, **flags, **pdl), arch, before)
    after = values_config(tokens, heads, SHAPE, size)
    flags = {"NUM_HEADS": heads, "RANK": 512, "NOPE": 128, "VALUE": 128, "STAGES": after.num_stages}
    flags |= {"BLOCK_T": after.block_t, "BLOCK_V": after.block_v, "BLOCK_K": after.block_k}
    check(compiled(_values_kernel, arch, dtype, tmp_path, after, **flags, **pdl), arch, after)
    flags = {"NUM_HEADS": heads, "RANK": 512, "BLOCK_N": 128, "BLOCK_PARTS": 32}
    check(compiled(latent_combine_kernel, arch, dtype, tmp_path, after, **flags, **pdl), arch, after)
