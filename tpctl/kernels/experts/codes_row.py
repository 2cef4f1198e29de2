"""The experts of one token whose matrices are codes: router | gate·up of the chosen | down of all, one sum.

Both linears read codes as `linear.codes_gemv` does, from memory to the registers that the tensor cores take them from.
Which experts are chosen is known when gate·up starts, so down's first codes are on their way while it still runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.common.launch import launch_options
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.codes_row_kernels import codes_row_down_kernel, codes_row_gate_up_kernel
from tpctl.kernels.experts.finish import finish_options
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.routing import Routed
from tpctl.kernels.linear.codes_gemv import gemv_form
from tpctl.kernels.linear.codes_linear import as_bytes


class CodesRowConfig(NamedTuple):
    """Rows of W of a program, 16 at least, which the tensor cores take (of gate_up half of them the gate's); warps;
    tiles (64 bytes of a row for each warp) that are read ahead; most registers."""

    rows: int
    num_warps: int
    ahead: int
    registers: int = 128


def takes_row(experts: ExpertMatrices[CodedMatrix]) -> bool:
    """Whether `codes_row` reads such codes."""
    return all(gemv_form(matrix.codes) is not None for matrix in (experts.gate_up, experts.down))


def pick_codes_row(codes: Codes, *, gated: bool) -> CodesRowConfig:
    """For gate_up or down of experts. Measured on an H200: gpt-oss-20b in MXFP4, Qwen3-30B-A3B in FP8 and 4 bits."""
    if gated:
        return CodesRowConfig(32, 4, 6, 168)
    packed = codes.kind in PACKED
    row_bytes = codes.columns // 2 if packed else codes.columns
    if row_bytes > 1024:
        return CodesRowConfig(16, 8, 3)
    return CodesRowConfig(16, 8, 6) if packed else CodesRowConfig(16, 16, 3, 96)


def codes_row(
    routed: Routed,
    experts: ExpertMatrices[CodedMatrix],
    *,
    total_experts: int | None = None,
    shared_TH: torch.Tensor | None = None,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    outlet: PeerBuffer | None = None,
    configs: tuple[CodesRowConfig, CodesRowConfig] | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """What `grouped` does, for one row of bfloat16 and matrices of codes that have a `gemv_form`.

    configs: of gate_up and down. Raises ValueError for others, and for what an outlet does not take.
    """
    x, ids, weights, factors = routed
    gate_up, down = experts.gate_up.codes, experts.down.codes
    if len(x) != 1 or x.dtype != torch.bfloat16 or not takes_row(experts):
        raise ValueError(f"{len(x)} rows of {x.dtype} and such experts; use `grouped`")
    up_config, down_config = configs or (pick_codes_row(gate_up, gated=True), pick_codes_row(down, gated=False))
    per_token = ids.shape[1]
    out = torch.empty_like(x) if out is None else out
    h = x.new_empty(per_token, experts.width)
    here = {"first": experts.first, "count": experts.count}
    codes_row_gate_up_kernel[(triton.cdiv(experts.width, up_config.rows // 2), per_token)](
        x.view(torch.int32),
        ids,
        *_stored(gate_up, x),
        x if experts.gate_up_bias is None else experts.gate_up_bias,
        h,
        **here,
        WIDTH=experts.width,
        GATING=experts.activation,
        INTERLEAVED=experts.interleaved,
        HAS_BIAS=experts.gate_up_bias is not None,
        PDL=pdl,
        **_options(gate_up, up_config),
        **launch_options(pdl),
    )
    codes_row_down_kernel[(triton.cdiv(experts.hidden, down_config.rows),)](
        h.view(torch.int32),
        ids,
        weights,
        *_stored(down, x),
        x if experts.down_bias is None else experts.down_bias,
        x if shared_TH is None else shared_TH,
        weights if factors is None else factors,
        **here,
        **finish_options(out, residual_TH, outlet, down_config.rows),
        OUTPUTS=experts.hidden,
        HAS_BIAS=experts.down_bias is not None,
        HAS_SHARED=shared_TH is not None,
        HAS_FACTOR=factors is not None,
        PER_TOKEN=per_token,
        ALL_HERE=experts.count == (total_experts or experts.count),
        PDL=pdl,
        **_options(down, down_config),
        **launch_options(pdl),
    )
    return out


def _stored(codes: Codes, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes, scales, zeros, rows of scales and factors as the kernels take them."""
    return (
        as_bytes(codes.values, unused),
        as_bytes(codes.scales, unused),
        as_bytes(codes.zeros, codes.values.view(torch.uint8)),
        as_bytes(codes.rows, unused),
        as_bytes(codes.factors, unused),
    )


def _options(codes: Codes, config: CodesRowConfig) -> dict[str, object]:
    read_as = gemv_form(codes)
    assert read_as is not None
    form, parts = read_as
    return {
        "FORM": form,
        "SCALE_ROWS": codes.scales.shape[1],
        "R": config.rows // 8,
        "WARPS": config.num_warps,
        "G": parts,
        "AHEAD": config.ahead,
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
    }
