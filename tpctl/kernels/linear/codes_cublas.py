"""Linears of many rows in FP8 by cuBLAS, whose tiles fit any number of rows, as linears in bfloat16 have them.

Two forms of scales are cuBLAS' own: one for each output (and each row of x), and one for a block of 128 x 128 weights
(and 128 inputs of a row). Whether a weight is of either, and which rows go there, are rules of shapes and devices, so
that nothing is found out by failing while a model runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpctl.kernels.common.codes import Codes, as_floats
from tpctl.kernels.linear.codes_gemm import quantize_rows

BLOCK = 128
"""Inputs, and outputs, that share a scale where blocks have them."""

_FEW = 64
"""Rows that need no more than one tile of ours, whose outputs are then as many programs as there are."""


class CublasScales(NamedTuple):
    """What cuBLAS multiplies by: float32 [1, N]; or, with ``block``, [K / 128, N / 128] whose first axis is dense."""

    scales: Tensor
    block: int | None


def cublas_scales(codes: Codes, capability: tuple[int, int], cuda: str | None) -> CublasScales | None:
    """The scales of W [N, K] as cuBLAS takes them, or None where it takes no such codes.

    cuda: the version that torch was built with, None without. Compute capability 9: there it was measured, and blocks
    are taken nowhere else, from CUDA 12.9 on. Rows of W, x and the result are to be at multiples of 16 bytes. A block's
    scales come in columns of a multiple of four (K a multiple of 512), and blocks are whole.
    """
    fp8 = codes.rounds and codes.kind == "e4m3" and codes.zeros is None and codes.zero == 0 and codes.groups is None
    if not fp8 or capability[0] != 9 or cuda is None or codes.columns % 16 or codes.outputs % 16:
        return None
    n, columns = codes.outputs, codes.scales.shape[-1]
    if columns == 1:
        scales = as_floats(codes.scales)
        scales = scales if codes.rows is None else scales[codes.rows.long()]
        if codes.factors is not None:
            scales = scales * codes.factors[:, None]
        return CublasScales(scales.contiguous().T, None)
    whole = codes.unit == BLOCK and codes.first == 0 and codes.columns % (4 * BLOCK) == 0 and n % BLOCK == 0
    if not whole or codes.factors is not None or codes.rows is None or _version(cuda) < (12, 9):
        return None
    blocks = torch.arange(n, device=codes.rows.device, dtype=codes.rows.dtype) // BLOCK
    if not codes.rows.is_meta and not torch.equal(codes.rows, blocks):
        return None
    return CublasScales(as_floats(codes.scales).contiguous().T, BLOCK)


def _version(cuda: str) -> tuple[int, ...]:
    return tuple(int(part) for part in cuda.split(".")[:2])


def takes_rows(rows: int, codes: Codes, block: int | None, multiprocessors: int) -> bool:
    """Whether so many rows are multiplied by cuBLAS rather than by `scaled_gemm`.

    Measured on an H200 from 64 to 16,384 rows, six matrices: with scales for blocks, cuBLAS wins from there on; with a
    scale an output, where our tiles of 64 rows and 128 outputs are more than the device computes at once.
    """
    if rows <= _FEW:
        return False
    return block is not None or -(-rows // 64) * -(-codes.outputs // 128) > multiprocessors


def cublas_linear(
    x_TK: Tensor,
    codes: Codes,
    scales: CublasScales,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    pdl: bool = False,
) -> Tensor:
    """norm(x) @ decode(codes).T + bias, [T, N] bfloat16, x rounded as `quantize_rows` does in the launch with its norm.

    x_TK: [T, K] bfloat16, columns contiguous. scales: of `cublas_scales`. A block's products are added in float32.
    Where a row has one scale the tensor cores keep the sums, 14 bits of them ("fast accumulation"): an error of 0.3%
    for K = 14,336, beside 2.6% of rounding x (docs/kernel-notes.md).
    """
    rows = len(x_TK)
    q, q_scales = quantize_rows(
        x_TK, "e4m3", scales.block, norm=norm, unit_offset=unit_offset, columns_first=scales.block is not None, pdl=pdl
    )
    product: Tensor = torch._scaled_mm(
        q,
        codes.values.T,
        q_scales,
        scales.scales,
        bias=bias_N,
        out_dtype=x_TK.dtype,
        use_fast_accum=scales.block is None,
    )
    return product[:rows]
