"""Kernels compiled for GPUs that are not here: they build, and take no more shared memory than there is.

Needs Triton, which brings its own assembler, and no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.here import INTERPRET
from tpctl.kernels.attention.head_squares import _head_squares_kernel
from tpctl.kernels.attention.packed_decode_kernels import packed_decode_kernel
from tpctl.kernels.attention.paged_decode import DecodeConfig, decode_config, fit_config, packed_decode_config
from tpctl.kernels.attention.paged_decode_kernels import decode_kernel
from tpctl.kernels.attention.paged_prefill import PrefillConfig, _prefill_kernel, prefill_config
from tpctl.kernels.attention.rope_cache import _rope_cache_kernel
from tpctl.kernels.common.launch import DeviceFacts, next_power_of_2, stand_for
from tpctl.kernels.linear.gemv import few_rows, pick
from tpctl.kernels.linear.gemv_kernels import small_linear_kernel
from tpctl.kernels.sampling.floors import _found_kernel, _weigh_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing"),
]

SHARED = {90: 232448, 89: 101376, 80: 166912, 86: 101376, 100: 232448, 120: 101376}
"""Bytes that a program may have: H100, L4 and RTX 4090, A100, A10 and RTX 3090, B200, RTX 5090."""

HEADS, KV_HEADS, BLOCK = 8, 2, 128
ITEMSIZE = {"bf16": 2, "fp32": 4}
POINTERS = {"cu_tiles_ptr": "*i32", "first_seq_ptr": "*i32", "ahead_seq_ptr": "*i32", "counters_ptr": "*i32"}
POINTERS |= {"block_tables_ptr": "*i32", "seq_lens_ptr": "*i32", "query_start_ptr": "*i32"}
POINTERS |= {"shared_ptr": "*i32", "prefix_ptr": "*fp32", "prefix_stats_ptr": "*fp32"}
POINTERS |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "sums_ptr": "*fp32", "positions_ptr": "*i64", "slots_ptr": "*i64"}
POINTERS |= {"q_size": "fp32", "k_size": "fp32", "value_eps": "fp32", "growth_ptr": "*fp32"}
BYTES = {"k_cache_ptr": "*u8", "v_cache_ptr": "*u8"}
FORMS = {"model": {}, "packed": BYTES | {"factors_ptr": "*i16"}, "fp8": BYTES | {"factors_ptr": "*i32"}}
"""Pointers to keys and values that are kept so; ``_rope_cache_kernel`` writes each factor by itself."""
POINTERS |= {"peers_ptr": "*i64", "epochs_ptr": "*i32", "eps": "fp32"}
POINTERS |= {
    f"{name}_ptr": "*fp32" for name in ("temperature", "top_p", "min_p", "weights", "maxima", "targets", "floors")
}
POINTERS |= {"top_k_ptr": "*i32", "lows_ptr": "*i32", "counted_ptr": "*i32"}
POINTERS |= {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "scale_log2e": "fp32"}


def shared_memory(
    kernel: Any,
    dtype: str,
    arch: int,
    config: Any,
    *,
    form: str = "model",
    pointers: dict[str, str] | None = None,
    **constants: Any,
) -> int:
    """Bytes that ``kernel`` takes, compiled for ``arch`` with pointers and strides as the engine's are.

    pointers: types of those that are not of ``dtype``.
    """
    names = kernel.arg_names
    pointers = POINTERS | FORMS[form] | (pointers or {})
    types = {name: pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    types = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [name for name in names if name.endswith(("_ptr", "_stride")) and name not in constants]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return int(compiled.metadata.shared)


def decode(
    head_dim: int,
    dtype: str,
    arch: int,
    config: DecodeConfig,
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> int:
    group = next_power_of_2(HEADS // KV_HEADS)
    block_dim = next_power_of_2(head_dim)
    return shared_memory(
        decode_kernel,
        dtype,
        arch,
        config,
        NUM_KV_HEADS=KV_HEADS,
        GROUP=HEADS // KV_HEADS,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_SIZE=BLOCK,
        TILE=config.tile,
        WINDOW=window,
        SOFTCAP=softcap,
        SINKS=sinks,
        SHARED=not window and not sinks,
        AHEAD=config.ahead,
        BLOCK_M=max(16, group),
        BLOCK_GROUP=group,
        BLOCK_PARTS=max(2, min(32, 32 * 32 * config.num_warps // (group * block_dim))),
        STAGES=config.num_stages,
        PDL=arch >= 90 and config.early,
    )


def packed_decode(
    head_dim: int,
    group: int,
    arch: int,
    config: DecodeConfig,
    *,
    form: str = "packed",
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> int:
    return shared_memory(
        packed_decode_kernel,
        "bf16",
        arch,
        config,
        form=form,
        FP8=form == "fp8",
        NUM_KV_HEADS=KV_HEADS,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=BLOCK,
        TILE=config.tile,
        WINDOW=window,
        SOFTCAP=softcap,
        SINKS=sinks,
        SHARED=not window and not sinks,
        AHEAD=config.ahead,
        BLOCK_M=max(8, next_power_of_2(group)),
        BLOCK_GROUP=next_power_of_2(group),
        BLOCK_PARTS=max(2, min(32, 32 * 32 * config.num_warps // (next_power_of_2(group) * head_dim))),
        STAGES=config.num_stages,
        PDL=arch >= 90 and config.early,
    )


def prefill(
    head_dim: int,
    dtype: str,
    arch: int,
    config: PrefillConfig,
    *,
    form: str = "model",
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> int:
    return shared_memory(
        _prefill_kernel,
        dtype,
        arch,
        config,
        NUM_KV_HEADS=KV_HEADS,
        GROUP=HEADS // KV_HEADS,
        HEAD_DIM=head_dim,
        BLOCK_DIM=next_power_of_2(head_dim),
        BLOCK_SIZE=BLOCK,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        WINDOW=window,
        SOFTCAP=softcap,
        SINKS=sinks,
        PACKED=form != "model",
        FP8=form == "fp8",
        PURE=arch // 10 == 10,
        STAGES=config.num_stages,
        PDL=arch >= 90,
        form=form,
    )


PACKED_FORMS = [(arch, form) for arch in (90, 89, 80) for form in ("packed", "fp8")]
PACKED_FORMS += [(100, "packed"), (100, "fp8"), (120, "fp8")]
BATCHES = [(1, False), (1, True), (8, False), (40, False), (100, False)]
"""Sequences of a decode step, and whether they are long."""
Launch = tuple[int, bool] | int
LAUNCHES: list[Launch] = [*BATCHES, 256, 16384]
"""Of attention: a decode step, or a prefill of so many tokens."""
CASES = [
    (90, 80, "bf16"),
    (90, 128, "bf16"),
    (90, 192, "bf16"),
    (90, 192, "fp32"),
    (90, 512, "bf16"),
    (89, 128, "bf16"),
    (89, 256, "fp32"),
    (80, 192, "bf16"),
]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("arch,head_dim,dtype", CASES)
def test_attention_fits(arch: int, head_dim: int, dtype: str, launch: Launch) -> None:
    limit, size = SHARED[arch], ITEMSIZE[dtype]
    if isinstance(launch, int):
        tiles = prefill_config(launch, 1, head_dim, BLOCK, size, limit, arch == 90)
        assert prefill(head_dim, dtype, arch, tiles) <= limit, tiles
        return
    count, long = launch
    tuned = decode_config(count, HEADS, KV_HEADS, 100, long=long, wide=head_dim == 128)
    fitted = fit_config(tuned, head_dim, HEADS // KV_HEADS, size, limit)
    assert decode(head_dim, dtype, arch, fitted) <= limit, fitted


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch,form", PACKED_FORMS)
def test_packed_attention_fits(arch: int, form: str, head_dim: int, group: int, launch: Launch) -> None:
    limit = SHARED[arch]
    if isinstance(launch, int):
        tiles = prefill_config(launch, 1, head_dim, BLOCK, 2, limit, arch == 90)
        assert prefill(head_dim, "bf16", arch, tiles, form=form) <= limit, tiles
        return
    count, long = launch
    config = packed_decode_config(count, group * KV_HEADS, KV_HEADS, head_dim, BLOCK, 100, limit, long=long)
    assert packed_decode(head_dim, group, arch, config, form=form) <= limit, config


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("arch", [90, 80])
def test_attention_with_sinks_fits(arch: int, window: int, form: str, launch: Launch) -> None:
    """gpt-oss: heads of 64 dimensions, eight to a KV head."""
    limit, has = SHARED[arch], {"window": window, "sinks": True}
    if isinstance(launch, int):
        tiles = prefill_config(launch, 1, 64, BLOCK, 2, limit, arch == 90)
        assert prefill(64, "bf16", arch, tiles, form=form, **has) <= limit, tiles
        return
    count, long = launch
    if form == "model":
        config = decode_config(count, HEADS, KV_HEADS, 100, long=long)
        assert decode(64, "bf16", arch, config, **has) <= limit, config
    else:
        config = packed_decode_config(count, 8 * KV_HEADS, KV_HEADS, 64, BLOCK, 100, limit, long=long)
        assert packed_decode(64, 8, arch, config, form=form, **has) <= limit, config


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize("arch,head_dim", [(90, 256), (90, 128), (80, 256), (100, 128)])
def test_attention_with_capped_scores_fits(arch: int, head_dim: int, window: int, form: str, launch: Launch) -> None:
    """Gemma 2: two query heads to a KV head."""
    limit, has = SHARED[arch], {"window": window, "softcap": 50.0}
    if isinstance(launch, int):
        tiles = prefill_config(launch, 1, head_dim, BLOCK, 2, limit, arch == 90)
        assert prefill(head_dim, "bf16", arch, tiles, form=form, **has) <= limit, tiles
        return
    count, long = launch
    if form == "model":
        tuned = decode_config(count, HEADS, KV_HEADS, 100, long=long, wide=head_dim == 128)
        config = fit_config(tuned, head_dim, HEADS // KV_HEADS, 2, limit)
        assert decode(head_dim, "bf16", arch, config, **has) <= limit, config
    else:
        config = packed_decode_config(count, 2 * KV_HEADS, KV_HEADS, head_dim, BLOCK, 100, limit, long=long)
        assert packed_decode(head_dim, 2, arch, config, form=form, **has) <= limit, config


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize(
    "rotated,interleaved,norm,rest,form",
    [
        (True, False, 2, 32, "model"),
        (True, True, 0, 32, "fp8"),
        (True, True, 2, 0, "packed"),
        (True, False, 1, 0, "fp8"),
        (False, False, 1, 0, "packed"),
    ],
)
def test_heads_prepared_in_all_ways_fit(
    rotated: bool, interleaved: bool, norm: int, rest: int, form: str, arch: int
) -> None:
    half = 32 if rest == 0 else 16
    options: dict[str, Any] = {"HEAD_DIM": 64, "HALF": half, "BLOCK_HALF": half, "BLOCK_REST": rest}
    options |= {"PACKED": 0 if form == "model" else BLOCK, "FP8": form == "fp8"}
    options |= {"ROTATED": rotated, "INTERLEAVED": interleaved, "NORM": norm, "UNIT_OFFSET": False}
    options |= {"VALUE_NORM": norm == 1, "KEYS_AS_VALUES": norm == 1, "GROWTH": rotated}
    options |= {"NUM_HEADS": HEADS, "NUM_KV_HEADS": KV_HEADS, "HEADS": 4, "SPLITS": 2, "PDL": arch >= 90}
    options |= {"GATED": rest > 0}
    config = DecodeConfig(1, 1, num_warps=1, num_stages=1)
    pointers = {"factors_ptr": "*bf16" if form == "fp8" else "*u8"}
    found = shared_memory(_rope_cache_kernel, "bf16", arch, config, form=form, pointers=pointers, **options)
    assert found <= SHARED[arch]
    sizes: dict[str, Any] = {"Q_SIZE": 6144, "K_SIZE": 1024 * (norm // 2), "BLOCK_Q": 8192, "BLOCK_K": 1024}
    config = DecodeConfig(1, 1, num_warps=16, num_stages=1)
    found = shared_memory(_head_squares_kernel, "bf16", arch, config, SPLITS=2, PDL=arch >= 90, **sizes)
    assert found <= SHARED[arch]


def linear(rows: int, out_features: int, in_features: int, arch: int, *, gated: bool, norm: bool) -> int:
    config = pick(rows, out_features, in_features, gated=gated)
    assert config is not None
    constants: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": not gated,
        "HAS_NORM": norm,
        "UNIT_OFFSET": False,
        "ACTIVATION": "silu" if gated else "",
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "RANK": 0,
        "WORLD": 1,
        "PEERS": 1,
        "PDL": arch >= 90,
    }
    constants |= {"BLOCK_M": max(16 if config.dot else 1, next_power_of_2(rows)), "DOT": config.dot}
    constants |= {"STAGES": config.num_stages, "PREFETCH": config.prefetch, "EARLY": config.early}
    return shared_memory(small_linear_kernel, "bf16", arch, config, **constants)


LINEARS = [
    (14336, 4096, True, True),
    (3072, 1024, True, False),
    (128256, 4096, False, True),
    (1024, 3072, False, False),
    (512, 2048, True, False),
]


def most_rows(arch: int) -> int:
    """Rows that linears of few rows take there."""
    stand_for(DeviceFacts((arch // 10, arch % 10), 100, SHARED[arch]))
    try:
        return few_rows(torch.device("cpu"))
    finally:
        stand_for(None)


@pytest.mark.parametrize("arch", sorted(SHARED))
def test_how_many_rows_are_few(arch: int) -> None:
    most = most_rows(arch)
    assert most == (16 if arch == 90 else 1)
    assert pick(most + 1, 4096, 4096, most=most) is None


@pytest.mark.parametrize("out_features,in_features,gated,norm", LINEARS)
@pytest.mark.parametrize("arch", sorted(SHARED))
def test_linears_of_few_rows_fit(arch: int, out_features: int, in_features: int, gated: bool, norm: bool) -> None:
    for rows in {1, most_rows(arch)}:
        assert linear(rows, out_features, in_features, arch, gated=gated, norm=norm) <= SHARED[arch]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtype,lowest", [("bf16", -(1 << 15)), ("fp32", -(1 << 31))])
@pytest.mark.parametrize("arch", sorted(SHARED))
def test_the_sampler_fits(arch: int, dtype: str, lowest: int, second: bool) -> None:
    config = DecodeConfig(1, 1, num_warps=4, num_stages=1)
    flags: dict[str, Any] = {"LOWEST": lowest, "SECOND": second, "PDL": arch >= 90, "CHUNKS": 256, "PARTS": 4}
    assert shared_memory(_weigh_kernel, dtype, arch, config, CHUNK=1024, **flags) <= SHARED[arch]
    assert shared_memory(_found_kernel, dtype, arch, config, LAUNCHES=6, LAST=second, **flags) <= SHARED[arch]


def test_what_fits_is_left_as_it_was_tuned() -> None:
    for count, long in BATCHES:
        config = decode_config(count, HEADS, KV_HEADS, 132, long=long, wide=True)
        assert fit_config(config, 128, 4, 2, SHARED[90]) == config
    assert prefill_config(16384, 16, 128, BLOCK, 2, SHARED[90]) == PrefillConfig(128, 128, 8, 2)
    assert prefill_config(16384, 16, 128, BLOCK, 2, SHARED[90], True) == PrefillConfig(64, 64, 4, 5)
    assert prefill_config(16384, 2, 128, BLOCK, 2, SHARED[90], True) == PrefillConfig(128, 128, 8, 5)
    assert prefill_config(16384, 2, 64, BLOCK, 2, SHARED[90], True) == PrefillConfig(64, 64, 4, 5)
    assert prefill_config(16384, 16, 256, BLOCK, 2, SHARED[90]) == PrefillConfig(128, 64, 8, 2)
    assert prefill_config(16384, 16, 128, BLOCK, 2, SHARED[89]) == PrefillConfig(128, 64, 8, 2)
