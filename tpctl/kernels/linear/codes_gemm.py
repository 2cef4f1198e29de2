"""Linears of many rows whose weights are codes: in FP8 or int8 where x may be rounded, else by numbers made before.

`quantize_rows` rounds x, each token by a scale of its own, or each token and block of inputs where the weights have
scales for blocks, in one launch with the norm before it. `scaled_gemm` multiplies on the tensor cores for 8-bit
numbers; a block's products are summed apart and scaled in float32. `decode_rows` makes the numbers of some outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tpctl.kernels.common.codes import Codes, decode
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.norm import rms_norm_reference
from tpctl.kernels.linear.codes_gemm_kernels import decode_kernel, quantize_kernel, scaled_gemm_kernel
from tpctl.kernels.linear.codes_linear import MOST_ROWS, as_bytes, form_of

Way = Literal["stored", "scaled", "decoded"]

_BLOCK_K = 128
_STORED = 128
"""Most rows that are multiplied by the codes as they are where they can be decoded before."""
LARGEST = {"e4m3": 448.0, "int8": 127.0}
"""Numbers of a kind."""
_DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_DECODED_N = 32
"""Outputs of a program that decodes."""
_DECODED = 1 << 26
"""Most numbers that `decoded_linear` makes at once: 128 MiB."""


class GemmConfig(NamedTuple):
    """Rows of x, outputs and inputs in a tile, launch parameters. tma: tiles are copied by descriptors, which GPUs have
    from compute capability 9 on."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = True


def pick_way(rows: int, codes: Codes, capability: tuple[int, int], multiprocessors: int) -> Way:
    """How so many rows are multiplied: by the codes as they are "stored" (`codes_linear`), "scaled", in 8-bit numbers
    as W and x then have them, or by numbers "decoded" before.

    FP8 tensor cores are there from compute capability 8.9 on, and rows of W must be at multiples of 16 bytes for the
    copies that feed them. Measured on an H200: 8-bit numbers are faster from 17 rows on, with scales for blocks of
    inputs from 33 where outputs are few; of other codes, decoding pays beyond some 128 rows. Elsewhere, an estimate.
    """
    if is_scaled(codes, capability):
        form, _, _ = form_of(codes, _BLOCK_K, fast=False)
        least = 17 if form.mode == "end" or codes.outputs > 64 * multiprocessors else 33
        if capability[0] != 9:
            tiles = -(-rows // 128) * -(-codes.outputs // 128)
            least = 65 if tiles >= multiprocessors else MOST_ROWS + 1
        return "scaled" if rows >= least else "stored"
    return "stored" if rows <= _STORED else "decoded"


def is_scaled(codes: Codes, capability: tuple[int, int]) -> bool:
    """Whether many rows are multiplied in 8-bit numbers, on the tensor cores for those."""
    form, tile, _ = form_of(codes, _BLOCK_K, fast=False)
    enough = codes.kind == "int8" or (codes.kind == "e4m3" and capability >= (8, 9))
    plain = form.mode in ("end", "tile") and tile >= 32 and not form.has_zeros and form.zero == 0
    return codes.rounds and enough and plain and codes.columns % 16 == 0


def gemm_config(
    codes: Codes, rows: int, capability: tuple[int, int], shared_memory: int, multiprocessors: int
) -> GemmConfig:
    """For a device whose programs may have so many bytes of shared memory. Measured in FP8 on an H200; elsewhere, and
    for int8 of many rows, estimates."""
    form, tile, _ = form_of(codes, _BLOCK_K, fast=False)
    block_k = _BLOCK_K if form.mode == "end" else tile
    large = shared_memory > 200 << 10
    block_m, block_n, warps, stages = 128, 128, 8, 4
    columns = -(-codes.outputs // 128)
    if large and rows <= 64 and 2 * columns <= multiprocessors:
        block_m, block_n, warps, stages = 64, 64, 4, 6
    elif large and (rows <= 64 or form.mode == "tile" or -(-rows // 64) * columns <= multiprocessors):
        # A block's sums in float32 beside those of the tensor cores leave no registers for more.
        block_m, warps, stages = 64, 4, 5
    elif large and codes.kind == "int8":
        block_n = 256
    stages = min(stages, (shared_memory - 4096) // ((block_m + block_n) * block_k))
    return GemmConfig(block_m, block_n, block_k, warps, stages, tma=capability >= (9, 0))


def quantize_rows(
    x_TK: Tensor,
    kind: Literal["e4m3", "int8"],
    block: int | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    columns_first: bool = False,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """norm(x) as numbers of 8 bits [T, K] and what each is to be multiplied by, float32 [T, ceil(K / block)].

    x_TK: [T, K], columns contiguous. block: inputs that share a scale, a power of two; None: all of a row. A scale is
    the largest size in its block over the largest number of the kind (448 or 127), 1 where all are zero, and no finite
    number where one of them is none. norm: (weight
    [K], eps) of an RMSNorm, which rounds as `rms_norm` does. columns_first: a block's scales of all rows are beside
    each other, and rows of no meaning make up a multiple of four, both as cuBLAS wants it.
    """
    rows, columns = x_TK.shape
    width = next_power_of_2(columns)
    block = width if block is None else block
    width = max(width, block)
    held, blocks = (-(-rows // 4) * 4 if columns_first else rows), -(-columns // block)
    q_TK = torch.empty((held, columns), dtype=_DTYPES[kind], device=x_TK.device)
    scales_TG = torch.empty(
        (blocks, held) if columns_first else (held, blocks), dtype=torch.float32, device=x_TK.device
    )
    if columns_first:
        scales_TG = scales_TG.T
    if rows == 0:
        return q_TK, scales_TG
    quantize_kernel[(rows,)](
        x_TK,
        q_TK,
        scales_TG,
        x_TK if norm is None else norm[0],
        x_TK.stride(0),
        *scales_TG.stride(),
        columns,
        0.0 if norm is None else norm[1],
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        LARGEST=LARGEST[kind],
        WIDTH=width,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(1, width // 512)),
        **launch_options(pdl),
    )
    return q_TK, scales_TG


def quantize_rows_reference(
    x_TK: Tensor,
    kind: Literal["e4m3", "int8"],
    block: int | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch."""
    x = x_TK if norm is None else rms_norm_reference(x_TK, norm[0], norm[1], unit_offset=unit_offset)
    rows, columns = x.shape
    block = columns if block is None else block
    padded = torch.nn.functional.pad(x.float(), (0, -columns % block)).view(rows, -1, block)
    scales = padded.abs().amax(-1) / LARGEST[kind]
    scales = torch.where(scales == 0, 1.0, scales)
    q = (padded / scales[..., None]).clamp(-LARGEST[kind], LARGEST[kind]).flatten(1)[:, :columns]
    return (q if kind == "e4m3" else q.round()).to(_DTYPES[kind]), scales


def scaled_gemm(
    q_TK: Tensor,
    scales_TG: Tensor,
    codes: Codes,
    config: GemmConfig,
    *,
    bias_N: Tensor | None = None,
    out: Tensor,
    pdl: bool = False,
) -> Tensor:
    """(q * scales) @ decode(codes).T + bias into `out` [T, N], on the tensor cores for 8-bit numbers.

    q_TK, scales_TG: what `quantize_rows` gave for the kind of the codes, in blocks of config.block_k where the codes
    have more than one scale a row. Codes that `pick_way` calls "scaled".
    """
    rows, columns = q_TK.shape
    form, _, _ = form_of(codes, config.block_k, fast=False)
    q: Tensor | TensorDescriptor = q_TK
    w: Tensor | TensorDescriptor = codes.values
    if config.tma:
        q = TensorDescriptor(q_TK, [rows, columns], [columns, 1], [config.block_m, config.block_k])
        w = TensorDescriptor(codes.values, [codes.outputs, columns], [columns, 1], [config.block_n, config.block_k])
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(codes.outputs, config.block_n),)
    scaled_gemm_kernel[grid](
        q,
        w,
        scales_TG,
        as_bytes(codes.scales, q_TK),
        scales_TG if codes.rows is None else codes.rows,
        scales_TG if codes.factors is None else codes.factors,
        scales_TG if bias_N is None else bias_N,
        out,
        rows,
        codes.outputs,
        out.stride(0),
        FORM=form,
        HAS_BIAS=bias_N is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        TMA=config.tma,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return out


def scaled_gemm_reference(q_TK: Tensor, scales_TG: Tensor, codes: Codes, block: int | None = None) -> Tensor:
    """`scaled_gemm` in plain torch, in float64, without bias."""
    block = q_TK.shape[1] if block is None else block
    scales = scales_TG.double().repeat_interleave(block, 1)[:, : q_TK.shape[1]]
    return (q_TK.double() * scales) @ decode(codes).double().T


def decode_rows(codes: Codes, start: int, stop: int, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """`codes.decode` in one launch: the numbers of outputs start to stop, [stop - start, K]."""
    numbers = torch.empty((stop - start, codes.columns), dtype=dtype, device=codes.values.device)
    decode_into(numbers, codes, start, stop, pdl=pdl)
    return numbers


def decode_into(numbers: Tensor, codes: Codes, start: int, stop: int, *, matrices: int = 1, pdl: bool = False) -> None:
    """Those of a matrix, or of as many as there are, each [.., outputs, K], the first ``matrices``; into numbers,
    contiguous."""
    form, tile, parts = form_of(codes, 64, fast=False)
    grid = triton.cdiv(stop - start, _DECODED_N), triton.cdiv(form.row_bytes, tile), matrices
    decode_kernel[grid](
        as_bytes(codes.values, numbers),
        as_bytes(codes.scales, numbers),
        as_bytes(codes.zeros, codes.values.view(torch.uint8)),
        as_bytes(codes.rows, numbers),
        as_bytes(codes.groups, numbers),
        as_bytes(codes.factors, numbers),
        numbers,
        start,
        stop,
        codes.outputs,
        codes.scales.shape[-2],
        FORM=form,
        BLOCK_N=_DECODED_N,
        BYTES=tile,
        GROUPS=parts,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def decoded_linear(x_TK: Tensor, codes: Codes, bias_N: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """x @ decode(codes).T + bias, by cuBLAS on numbers in x's dtype, of at most 2^26 of them at a time."""
    step = max(1, _DECODED // codes.columns)
    if codes.outputs <= step:
        weight = decode_rows(codes, 0, codes.outputs, x_TK.dtype, pdl=pdl)
        return torch.nn.functional.linear(x_TK, weight, bias_N)
    out = x_TK.new_empty((x_TK.shape[0], codes.outputs))
    for start in range(0, codes.outputs, step):
        stop = min(start + step, codes.outputs)
        weight = decode_rows(codes, start, stop, x_TK.dtype, pdl=pdl)
        if bias_N is None:
            torch.mm(x_TK, weight.T, out=out[:, start:stop])
        else:
            torch.addmm(bias_N[start:stop], x_TK, weight.T, out=out[:, start:stop])
    return out
