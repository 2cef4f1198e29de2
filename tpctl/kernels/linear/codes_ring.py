"""Linear layers whose weights are codes (`common.codes`), for up to 8 rows of large matrices: 4-bit integers in groups
of 128, and FP8 with a scale a row. `codes_gemv` takes what this one does not.

As many programs as the GPU has multiprocessors go through the outputs, 16 at a time, while the codes of the next ones
come into shared memory. So x and its norm cost a program once, and while a kernel ends the next one reads already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.codes import Codes
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.linear.codes_linear import as_bytes, may_be_fast
from tpctl.kernels.linear.ring_cut import RingCut

codes_ring_kernel: Any
try:
    from tpctl.kernels.linear.codes_ring_kernels import codes_ring_kernel
except (ImportError, AttributeError):  # a Triton without Gluon, or with another one
    codes_ring_kernel = None

MOST_ROWS = 8
_SHARED = 232448
"""Bytes of shared memory that a program may have on a Hopper."""

_TWO, _ONE = 77056, 115968
"""So many bytes that no more than two, or one, of the programs fit a multiprocessor. A kernel's programs start where
those before it end first: were there room for more, some multiprocessors would get too many, and others none."""


class CodesRingConfig(NamedTuple):
    """Warps of a program, groups of 128 inputs that a warp sums at once, how many such runs are on their way, programs,
    bytes of shared memory that one takes at least, most registers: with more the assembler reads tiles long before it
    multiplies by them."""

    num_warps: int
    run: int
    ahead: int
    programs: int
    least: int = 0
    registers: int = 80


def takes_ring(codes: Codes) -> bool:
    """Whether the kernel can read such codes."""
    shuffled = codes.rows is not None or codes.groups is not None or codes.factors is not None
    if shuffled or codes.columns % 1024 or codes.outputs % 16:
        return False
    if codes.kind == "uint4":
        in_groups = codes.unit == 128 and codes.first == 0 and codes.scales.shape[-1] == codes.columns // 128
        return in_groups and codes.scales.dtype in (torch.bfloat16, torch.float16)
    shifts = codes.zeros is not None or codes.zero != 0
    return codes.kind == "e4m3" and not shifts and codes.scales.shape[-1] == 1 and codes.scales.dtype.itemsize > 1


def ring_reads(x_TK: Tensor, norm_K: Tensor, codes: Codes) -> bool:
    """Whether x, the norm's weight and the codes lie where 16 bytes can be read at once."""
    held = (x_TK, norm_K, codes.values, codes.scales, *(() if codes.zeros is None else (codes.zeros,)))
    return x_TK.stride(0) % 8 == 0 and all(one.data_ptr() % 16 == 0 for one in held)


def pick_codes_ring(
    rows: int, codes: Codes, *, gated: bool, multiprocessors: int, hopper: bool
) -> CodesRingConfig | None:
    """How to cut a linear, or None for what other kernels are for. Measured on an H200 at the sizes of Llama-8B.

    A program has 64 KB on their way (FP8 96 where it sums short runs), so that the next kernel's fits beside it; two
    programs a multiprocessor go through many outputs. Linears of no more outputs than inputs, which stand between those
    of more, are alone of their kind on a multiprocessor. None where units of 16 outputs leave a fourth of the programs
    idle, where x is long (FP8: 64 KB), and without Gluon.
    """
    if codes_ring_kernel is None or not hopper or rows > MOST_ROWS or codes.columns < 2048 or not takes_ring(codes):
        return None
    wide, most, units = codes.kind == "e4m3", next_power_of_2(rows), codes.outputs // 16
    many = rows == 1 and units >= 8 * multiprocessors
    warps = 4 if many and wide else 8
    share = codes.columns // 128 // warps
    longest = min(8 // most, 4 if wide and not many else 8)
    run = max(one for one in range(1, longest + 1) if share % one == 0)
    tiles = 8 if not wide else 6 if rows == 1 else 4
    least = _TWO if codes.outputs > codes.columns else _ONE
    config = CodesRingConfig(warps, run, max(1, tiles // run), (2 if many else 1) * multiprocessors, least)
    cut = cut_of(rows, codes, gated=gated, config=config)
    idle = 4 * units < 3 * cut.units * config.programs
    return None if idle or cut.bytes > _SHARED or (wide and most * codes.columns > 32768) else config


def cut_of(rows: int, codes: Codes, *, gated: bool, config: CodesRingConfig) -> RingCut:
    """What the kernel is compiled for. Raises ValueError for a config that the codes cannot be cut by."""
    units = codes.outputs // 16
    programs = min(config.programs, units)
    most = next_power_of_2(rows)
    if codes.columns % (128 * config.num_warps * config.run) or config.run * most > 8:
        raise ValueError(f"{codes.columns} columns and {rows} rows cannot be cut by {config}")
    return RingCut(
        kind=codes.kind,
        columns=codes.columns,
        zero=0 if codes.zeros is not None else codes.zero,
        has_zeros=codes.zeros is not None,
        fp16=codes.scales.dtype == torch.float16,
        gated=gated,
        rows=most,
        warps=config.num_warps,
        run=config.run,
        ahead=config.ahead,
        programs=programs,
        units=-(-units // programs),
        least=config.least,
    )


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
    """What `codes_linear` does, for x_TK [T, K] bfloat16 with T <= 8, tensors that `ring_reads` and codes that
    `takes_ring`; with a norm T is 1.

    Raises ValueError for others.
    """
    rows, in_features = x_TK.shape
    if in_features != codes.columns:
        raise ValueError(f"x has {in_features} columns, the codes {codes.columns}")
    norm_K = x_TK if norm is None else norm[0]
    readable = may_be_fast(x_TK, norm_K) and ring_reads(x_TK, norm_K, codes)
    if not takes_ring(codes) or rows > (MOST_ROWS if norm is None else 1) or not readable:
        raise ValueError(f"{rows} rows of {x_TK.dtype} and such {codes.kind} codes: use codes_gemv")
    cut = cut_of(rows, codes, gated=activation is not None, config=config)
    outputs = codes.outputs // (2 if activation else 1)
    if out is None:
        out = x_TK.new_empty((rows, outputs))
    codes_ring_kernel[(cut.programs,)](
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
        CUT=cut,
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        ACTIVATION=activation or "",
        PDL=pdl,
        num_warps=config.num_warps,
        maxnreg=config.registers,
        **launch_options(pdl),
    )
    return out
