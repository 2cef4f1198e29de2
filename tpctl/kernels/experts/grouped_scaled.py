"""The experts of many tokens in 8-bit numbers, on the tensor cores for those, where the weights' format rounds inputs.

    x [T, H] ── rounded ── gate·up of each tile's expert ── h [T·K, I] ── rounded ── down, weighed ── y [T·K, H]

Each token's row is rounded once, whichever experts it goes to; a row of h belongs to one pair. How a row is rounded,
and what is summed in float32, is as in `linear.codes_gemm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from tpctl.arch.block import Activation, Clamped
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import launch_options
from tpctl.kernels.experts.grouped_scaled_kernels import grouped_scaled_kernel
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.placing import Placed
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.linear.codes_gemm import is_scaled, quantize_rows
from tpctl.kernels.linear.codes_linear import as_bytes, form_of

LEAST_PAIRS = 32
"""Of an expert, on average: fewer wait for the weights, and not for the tensor cores. An estimate."""

_BLOCK_K = 128


class ScaledConfig(NamedTuple):
    """Pairs, output features and inputs of a tile, launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def pick_scaled(
    pairs: int, experts: ExpertMatrices, total: int, block_m: int, capability: tuple[int, int], limit: int
) -> tuple[ScaledConfig, ScaledConfig] | None:
    """Tiles of gate_up and down; None where these experts, or so few pairs, are multiplied in another way.

    total: experts of all ranks. block_m: pairs in a tile that would suit their number. limit: bytes of shared memory of
    a program.
    """
    if pairs < LEAST_PAIRS * total:
        return None
    found = []
    for matrix, gated in ((experts.gate_up, True), (experts.down, False)):
        if not isinstance(matrix, Codes) or not is_scaled(matrix, capability):
            return None
        form, tile, _ = form_of(matrix, _BLOCK_K, fast=False)
        rows, block_k = max(64, block_m), _BLOCK_K if form.mode == "end" else tile
        # Sums of blocks stand beside the tensor cores' own, which only a Hopper's leave registers for.
        block_n = 64 if gated or (form.mode == "tile" and limit < 200 << 10) else 128
        stage = (rows + block_n * (2 if gated else 1)) * block_k
        stages = max(2, min(4, (limit - 4096) // stage))
        found.append(ScaledConfig(rows, block_n, block_k, 4 if rows == 64 else 8, stages))
    return found[0], found[1]


def scaled_pairs(
    routed: Routed,
    experts: ExpertMatrices,
    placed: Placed,
    configs: tuple[ScaledConfig, ScaledConfig],
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """What every pair adds to its token's sum, [T * K, H] in x's dtype; pairs of other ranks' experts are not written.

    placed: with tiles of the configs' block_m.
    """
    x, pairs = routed.x, routed.ids.numel()
    h = x.new_empty(pairs, experts.width)
    _linear(x, experts, experts.gate_up, experts.gate_up_bias, routed, placed, h, configs[0], experts.activation, pdl)
    y = x.new_empty(pairs, experts.hidden)
    _linear(h, experts, experts.down, experts.down_bias, routed, placed, y, configs[1], None, pdl)
    return y


def _linear(
    x: torch.Tensor,
    experts: ExpertMatrices,
    codes: torch.Tensor | Codes,
    bias: torch.Tensor | None,
    routed: Routed,
    placed: Placed,
    out: torch.Tensor,
    config: ScaledConfig,
    activation: Activation | Clamped | None,
    pdl: bool,
) -> None:
    """One of the two linears of every expert, into `out` [T * K, width]."""
    assert isinstance(codes, Codes) and codes.kind in ("e4m3", "int8")
    form, _, _ = form_of(codes, config.block_k, fast=False)
    q, scales = quantize_rows(x, codes.kind, None if form.mode == "end" else config.block_k, pdl=pdl)
    flags: dict[str, Any] = {
        "FORM": form,
        "OUTPUTS": codes.outputs,
        "SCALE_ROWS": codes.scales.shape[1],
        "PER_TOKEN": routed.ids.shape[1],
        "GATING": activation,
        "INTERLEAVED": experts.interleaved,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **launch_options(pdl),
    }
    grid = (triton.cdiv(out.shape[1], config.block_n), len(placed.tiles))
    grouped_scaled_kernel[grid](
        q,
        scales,
        *placed,
        routed.weights,
        codes.values,
        *(as_bytes(one, x) for one in (codes.scales, codes.rows, codes.factors)),
        x if bias is None else bias,
        out,
        **flags,
    )
