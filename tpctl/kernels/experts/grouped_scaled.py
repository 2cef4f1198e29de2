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
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.grouped_scaled_kernels import grouped_scaled_kernel
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.placing import Placed
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.linear.codes_gemm import LARGEST, is_scaled, quantize_rows
from tpctl.kernels.linear.codes_linear import as_bytes, form_of

LEAST_PAIRS = 32
"""Of an expert, on average, where nothing was measured (GPUs other than Hopper): fewer wait for the weights, and not
for the tensor cores. A Hopper's take FP8 from shared memory as it is stored, so that any number of pairs costs no more
than reading it."""

_BLOCK_K = 128


class ScaledConfig(NamedTuple):
    """Pairs, output features and inputs of a tile, launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def pick_scaled(
    pairs: int, experts: ExpertMatrices[CodedMatrix], total: int, block_m: int, capability: tuple[int, int], limit: int
) -> tuple[ScaledConfig, ScaledConfig] | None:
    """Tiles of gate_up and down; None where these experts, or so few pairs, are multiplied in another way.

    total: experts of all ranks. block_m: pairs in a tile that would suit their number in bfloat16. limit: bytes of
    shared memory of a program. Measured on an H200 with Qwen3-30B-A3B's in blocks: half as many pairs are best there,
    up to 64, since sums of blocks stand beside the tensor cores' own; of 32 and fewer, which only stream weights, two
    programs on a multiprocessor have 96 KB each under way. Elsewhere, estimates.
    """
    if pairs < (0 if capability[0] == 9 else LEAST_PAIRS * total):
        return None
    if capability[0] == 9:
        block_m = max(16, block_m // 2)
    configs = []
    for codes, gated in ((experts.gate_up.codes, True), (experts.down.codes, False)):
        if not is_scaled(codes, capability):
            return None
        form, tile, _ = form_of(codes, _BLOCK_K, fast=False)
        block_k = _BLOCK_K if form.mode == "end" else tile
        block_n, num_warps, wanted = 128, 8, 3
        if capability[0] != 9:
            block_n = 128 if block_m > 64 and not gated and form.mode == "end" else 64
        if block_m > (32 if capability[0] == 9 and gated else 64):
            wanted = 4
        stage = (block_m + block_n * (2 if gated else 1)) * block_k
        stages = max(2, min(wanted if gated else wanted + 1, (limit - 4096) // stage))
        configs.append(ScaledConfig(block_m, block_n, block_k, num_warps, stages))
    return configs[0], configs[1]


def rounds_itself(experts: ExpertMatrices[CodedMatrix], configs: tuple[ScaledConfig, ScaledConfig]) -> bool:
    """Whether gate_up's launch rounds what it writes: a tile's features are then the inputs of a scale of down's."""
    gate_up, down = configs
    in_blocks = form_of(experts.down.codes, down.block_k, fast=False)[0].mode == "tile"
    return in_blocks and gate_up.block_n == down.block_k and experts.width % down.block_k == 0


def scaled_pairs(
    routed: Routed,
    experts: ExpertMatrices[CodedMatrix],
    placed: Placed,
    configs: tuple[ScaledConfig, ScaledConfig],
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """What every pair adds to its token's sum, [T * K, H] in x's dtype; pairs of other ranks' experts are not written.

    placed: with tiles of the configs' block_m.
    """
    x, pairs = routed.x, routed.ids.numel()
    gate_up, down = configs
    q, scales = _rounded(x, experts.gate_up.codes, gate_up, pdl)
    if rounds_itself(experts, configs):
        h = q.new_empty(pairs, experts.width)
        h_scales = scales.new_empty(pairs, experts.width // down.block_k)
    else:
        h, h_scales = x.new_empty(pairs, experts.width), None
    _linear(q, scales, experts, experts.gate_up.codes, experts.gate_up_bias, routed, placed, h, h_scales, gate_up,
            experts.activation, pdl)  # fmt: skip
    if h_scales is None:
        h, h_scales = _rounded(h, experts.down.codes, down, pdl)
    y = x.new_empty(pairs, experts.hidden)
    _linear(h, h_scales, experts, experts.down.codes, experts.down_bias, routed, placed, y, None, down, None, pdl)
    return y


def _rounded(x: torch.Tensor, codes: Codes, config: ScaledConfig, pdl: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 8-bit numbers, with scales for the blocks that these codes have."""
    assert codes.kind in ("e4m3", "int8")
    form, _, _ = form_of(codes, config.block_k, fast=False)
    return quantize_rows(x, codes.kind, None if form.mode == "end" else config.block_k, pdl=pdl)


def _linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    experts: ExpertMatrices[CodedMatrix],
    codes: Codes,
    bias: torch.Tensor | None,
    routed: Routed,
    placed: Placed,
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    config: ScaledConfig,
    activation: Activation | Clamped | None,
    pdl: bool,
) -> None:
    """One of the two linears of every expert, into `out` [T * K, width], rounded where there are `out_scales`."""
    form, _, _ = form_of(codes, config.block_k, fast=False)
    flags: dict[str, Any] = {
        "FORM": form,
        "OUTPUTS": codes.outputs,
        "SCALE_ROWS": codes.scales.shape[1],
        "PER_TOKEN": routed.ids.shape[1],
        "GATING": activation,
        "INTERLEAVED": experts.interleaved,
        "HAS_BIAS": bias is not None,
        "LARGEST": 0.0 if out_scales is None else LARGEST[codes.kind],
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
        *(as_bytes(one, scales) for one in (codes.scales, codes.rows, codes.factors)),
        scales if bias is None else bias,
        out,
        scales if out_scales is None else out_scales,
        **flags,
    )
