"""Linear layers whose weights are codes (`common.codes`), for up to 16 rows: `codes_linear` for where memory decides.

A program reads a few outputs' codes straight into registers, the first of them while it waits for x, and its warps
share the inputs; nothing goes through shared or device memory but sums at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import Activation
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.linear.codes_gemv_kernels import codes_gemv_kernel
from tpctl.kernels.linear.codes_linear import as_bytes, form_of, may_be_fast
from tpctl.kernels.linear.codes_tiles import Form

MOST_ROWS = 16
_CHUNK = 64
"""Bytes of a row that a warp takes at once."""


class CodesGemvConfig(NamedTuple):
    """Outputs of a program, warps, tiles (64 bytes of a row for each warp) that are read ahead, most registers."""

    outputs: int
    num_warps: int
    ahead: int
    registers: int = 128


def pick_codes_gemv(
    rows: int, codes: Codes, *, gated: bool, multiprocessors: int, hopper: bool
) -> CodesGemvConfig | None:
    """How to cut a linear, or None for what `codes_linear` is for. Measured on an H200 at the sizes of Llama-8B, by FP8
    with a scale a row and GPTQ; other kinds are taken for alike.

    Beyond 8 rows x is read twice as often as W for packed kinds, and registers are short: only for few outputs of 8
    bits that is faster. hopper: whether that generation's shared memory does not bound it.
    """
    if not hopper or gemv_form(codes) is None:
        return None
    packed = codes.kind in PACKED
    few = codes.outputs <= 32 * multiprocessors  # two programs a multiprocessor take all of them at once
    if rows > 8:
        return CodesGemvConfig(16, 8, 2) if rows <= MOST_ROWS and few and not packed and not gated else None
    if gated:
        return CodesGemvConfig(16, 4, 4, 168) if packed else CodesGemvConfig(16, 4, 2)
    if few:
        return CodesGemvConfig(16, 8, 4)
    return CodesGemvConfig(16, 4, 8) if packed else CodesGemvConfig(16, 8, 2, 80)


def gemv_form(codes: Codes) -> tuple[Form, int] | None:
    """What the kernel is compiled for and how many scales there are for 16 bytes; None for codes that it does not take:
    rows of no multiple of 16 bytes, or scales for fewer than 4, or in no order."""
    form, tile, _ = form_of(codes, _CHUNK, fast=True)
    if not form.fast or form.row_bytes % 16:
        return None
    if form.mode == "tile" and tile < _CHUNK:
        form = form._replace(mode="inside")
    parts = max(1, 16 // form.scale_bytes) if form.mode == "inside" else 1
    return (form, parts) if parts <= 4 else None


def codes_gemv(
    x_TK: Tensor,
    codes: Codes,
    *,
    bias_O: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: Tensor | None = None,
    out: Tensor | None = None,
    config: CodesGemvConfig,
    outlet: PeerBuffer | None = None,
    pdl: bool = False,
) -> Tensor:
    """What `codes_linear` does, for x_TK [T, K] bfloat16 with T <= 16 and codes that have a `gemv_form`.

    Raises ValueError for others, and for what an outlet does not take.
    """
    rows, in_features = x_TK.shape
    if in_features != codes.columns:
        raise ValueError(f"x has {in_features} columns, the codes {codes.columns}")
    norm_K = x_TK if norm is None else norm[0]
    read_as = gemv_form(codes)
    if read_as is None or rows > MOST_ROWS or not may_be_fast(x_TK, norm_K):
        raise ValueError(f"{rows} rows of {x_TK.dtype} and such {codes.kind} codes: use codes_linear")
    form, parts = read_as
    width = 2 if activation else 1
    out_features = codes.outputs // width
    if out is None:
        out = x_TK.new_empty((rows, out_features))
    if outlet is not None:
        outlet.check(out, sent=True)
    groups = -(-rows // 8)
    words = x_TK.view(torch.int32)
    codes_gemv_kernel[(triton.cdiv(out_features, config.outputs),)](
        words,
        as_bytes(codes.values, x_TK),
        as_bytes(codes.scales, x_TK),
        as_bytes(codes.zeros, codes.values.view(torch.uint8)),
        as_bytes(codes.rows, x_TK),
        as_bytes(codes.factors, x_TK),
        out,
        bias_O if bias_O is not None else x_TK,
        residual_TO if residual_TO is not None else x_TK,
        norm_K.view(torch.int32),
        outlet.pointers if outlet is not None else words,
        outlet.epochs if outlet is not None else words,
        rows,
        out_features,
        x_TK.stride(0) // 2,
        out.stride(0),
        residual_TO.stride(0) if residual_TO is not None else 0,
        outlet.layout.row_words if outlet is not None else 0,
        outlet.layout.plane_words if outlet is not None else 0,
        norm[1] if norm is not None else 0.0,
        FORM=form,
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        ACTIVATION=activation or "",
        NORM_ROWS=1 if rows == 1 else 8 * groups,
        MR=groups,
        R=config.outputs * width // 8,
        WARPS=config.num_warps,
        G=parts,
        AHEAD=config.ahead,
        RANK=outlet.rank if outlet is not None else 0,
        WORLD=outlet.world if outlet is not None else 1,
        PEERS=next_power_of_2(outlet.world) if outlet is not None else 1,
        PDL=pdl,
        num_warps=config.num_warps,
        maxnreg=config.registers,
        **launch_options(pdl),
    )
    return out
