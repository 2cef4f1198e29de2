"""gate_up_proj and its activation in one launch, for a few dozen rows.

One program a multiprocessor, all at work until the end: the columns are cut in equal strides, whatever their width,
while cuBLAS' tiles of 128 leave 15% of an H100 idle with 14,336 of them. A program multiplies a tile as wide as the
next power of two, so neighbours compute a few columns twice; at these batches only the reading of the weights counts,
and those columns come from the L2 cache.

    columns     |   program 0   |   program 1   |   program 2   | ...      stride: 112 of 14,336
    gate tile   |------ 128 -------|                                       tile:   128
                                |------ 128 -------|
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tpctl.kernels.common.activation import Activation, act, act_and_mul_reference
from tpctl.kernels.common.launch import launch_options, next_power_of_2

_MIN_ROWS, _MAX_ROWS = 17, 128
_BUFFER_BYTES = 200 << 10  # of an H100's 227 KiB of shared memory


class GatedConfig(NamedTuple):
    """Columns from program to program and in a tile, rows in a tile, inputs a step, launch parameters."""

    stride: int
    tile: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def pick_gated(rows: int, intermediate: int, hidden: int, num_sms: int, itemsize: int = 2) -> GatedConfig | None:
    """How to cut [2 * intermediate, hidden] of values of itemsize bytes into a program for each of num_sms
    multiprocessors.

    None where another way is faster: few or many rows, or a stride that fills too little of its tile; or where rows of
    the weight do not begin at multiples of 16 bytes. Measured on an H100, whose shared memory it fills.
    """
    stride = -(-intermediate // (8 * num_sms)) * 8
    tile = next_power_of_2(stride)
    if not (_MIN_ROWS <= rows <= _MAX_ROWS and 32 <= tile <= 128 and 4 * stride >= 3 * tile and hidden % 8 == 0):
        return None
    block_m = 64 if rows <= 64 else 128
    block_k = 64 if tile == 128 else 128
    num_stages = _BUFFER_BYTES // ((2 * tile + block_m) * block_k * itemsize)
    return GatedConfig(stride, tile, block_m, block_k, 8 if block_m == tile == 128 else 4, num_stages)


@triton.jit
def _gated_kernel(
    x_desc,  # [rows, hidden], blocks [BLOCK_M, BLOCK_K]
    weight_desc,  # [2 * intermediate, hidden], blocks [TILE, BLOCK_K]
    out_ptr,
    rows,
    intermediate,
    hidden,
    out_stride,
    ACTIVATION: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * STRIDE
    gate = tl.zeros([BLOCK_M, TILE], tl.float32)
    up = tl.zeros([BLOCK_M, TILE], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for k in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([0, k])
        gate = tl.dot(x, weight_desc.load([first, k]).T, gate, input_precision="ieee")
        up = tl.dot(x, weight_desc.load([intermediate + first, k]).T, up, input_precision="ieee")
    # Rounded like a linear and an activation of their own.
    dtype = out_ptr.dtype.element_ty
    gated = act(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    result = (gated * up.to(dtype).to(tl.float32)).to(dtype)
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, TILE)[None, :]
    mask = (row < rows) & (col < STRIDE) & (first + col < intermediate)
    tl.store(out_ptr + row * out_stride + first + col, result, mask=mask)


def gated_linear(
    x_TH: torch.Tensor,
    weight_FH: torch.Tensor,
    config: GatedConfig,
    *,
    activation: Activation = "silu",
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """act(x @ gate.T) * (x @ up.T) of the merged weight_FH = [gate; up], [2I, H] contiguous.

    x_TH: [T, H], T <= config.block_m, columns contiguous, in the weight's dtype; a row's H values must be a multiple of
    16 bytes. Returns [T, I] (`out` when given). Raises ValueError for more rows than the configuration takes.
    """
    rows, hidden = x_TH.shape
    intermediate = weight_FH.shape[0] // 2
    if rows > config.block_m:
        raise ValueError(f"{rows} rows are more than the {config.block_m} of this configuration")
    out_TI = x_TH.new_empty((rows, intermediate)) if out is None else out
    x_desc = TensorDescriptor(x_TH, [rows, hidden], [x_TH.stride(0), 1], [config.block_m, config.block_k])
    weight_desc = TensorDescriptor(weight_FH, [2 * intermediate, hidden], [hidden, 1], [config.tile, config.block_k])
    _gated_kernel[(triton.cdiv(intermediate, config.stride),)](
        x_desc,
        weight_desc,
        out_TI,
        rows,
        intermediate,
        hidden,
        out_TI.stride(0),
        ACTIVATION=activation,
        STRIDE=config.stride,
        TILE=config.tile,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return out_TI


def gated_linear_reference(
    x_TH: torch.Tensor, weight_FH: torch.Tensor, *, activation: Activation = "silu"
) -> torch.Tensor:
    """`gated_linear` in plain torch: a linear and its activation one after the other."""
    return act_and_mul_reference(torch.nn.functional.linear(x_TH, weight_FH), activation=activation)
