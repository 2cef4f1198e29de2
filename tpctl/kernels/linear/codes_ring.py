"""Linear layers of up to 8 rows whose weights are 4-bit integers with a scale for 128 inputs.

As many programs as the GPU has multiprocessors go through the outputs, 16 at a time, while the codes of the next ones
come into shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.linear.codes_linear import as_bytes
from tpctl.kernels.linear.codes_ring_kernels import codes_ring_kernel


class CodesRingConfig(NamedTuple):
    """Warps of a program, groups of 128 inputs that a warp sums at once, how many such runs are on their way, whether
    x stays in registers, programs."""

    num_warps: int
    run: int
    ahead: int
    programs: int = 132
    wide: int = 0
    registers: int = 128


def takes_ring(codes: Codes) -> bool:
    """Whether the kernel can read such codes: integers of 4 bits in groups of 128, or e4m3 with a scale a row."""
    if codes.columns % 1024 or codes.outputs % 16 or codes.rows is not None or codes.groups is not None:
        return False
    if codes.factors is not None:
        return False
    if codes.kind == "uint4":
        of_groups = codes.unit == 128 and codes.first == 0 and codes.scales.shape[-1] == codes.columns // 128
        return of_groups and codes.scales.dtype in (torch.bfloat16, torch.float16)
    shifts = codes.zeros is not None or codes.zero != 0
    return codes.kind == "e4m3" and not shifts and codes.scales.shape[-1] == 1 and codes.scales.dtype.itemsize > 1


def codes_ring(
    x_TK: Tensor,
    codes: Codes,
    *,
    bias_O: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: Tensor | None = None,
    out: Tensor | None = None,
    config: CodesRingConfig,
    pdl: bool = False,
) -> Tensor:
    """What `codes_linear` does, for x_TK [T, K] bfloat16 with T <= 8 and codes that `takes_ring`; a norm of one row."""
    rows = x_TK.shape[0]
    gated = activation is not None
    outputs = codes.outputs // (2 if gated else 1)
    norm_K = x_TK if norm is None else norm[0]
    if out is None:
        out = x_TK.new_empty((rows, outputs))
    units = outputs // (8 if gated else 16)
    programs = min(config.programs, units)
    codes_ring_kernel[(programs,)](
        x_TK.view(torch.int32),
        as_bytes(codes.values, x_TK),
        codes.scales,
        as_bytes(codes.zeros, codes.values.view(torch.uint8)),
        out,
        bias_O if bias_O is not None else x_TK,
        residual_TO if residual_TO is not None else x_TK,
        norm_K.view(torch.int32),
        rows,
        outputs,
        x_TK.stride(0) // 2,
        out.stride(0),
        residual_TO.stride(0) if residual_TO is not None else 0,
        norm[1] if norm is not None else 0.0,
        KIND=codes.kind,
        COLUMNS=codes.columns,
        ZERO=0 if codes.zeros is not None else codes.zero,
        FP16=codes.scales.dtype == torch.float16,
        HAS_ZEROS=codes.zeros is not None,
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        ACTIVATION=activation or "",
        ROWS=next_power_of_2(rows),
        WARPS=config.num_warps,
        RUN=config.run,
        AHEAD=config.ahead,
        WIDE=config.wide,
        PROGRAMS=programs,
        UNITS=-(-units // programs),
        PDL=pdl,
        num_warps=config.num_warps,
        maxnreg=config.registers,
        **launch_options(pdl),
    )
    return out
