"""Linear layers for a handful of rows, with what stands before and after them fused in.

At such batches a linear layer only streams its weights, so cuBLAS's tiles gain nothing and every extra launch
costs. One row runs on the CUDA cores, a few on the tensor cores with the weights as the wide operand. `pick` says
which, with tuned parameters, or that cuBLAS is faster.

A fused RMSNorm is applied to the sums: its scale is one number a row, so x * norm_weight goes into the
products and the squares of x are summed on the way. That rounds less than norm-then-multiply does, so results
differ from it by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import Activation, act_and_mul_reference
from tpctl.kernels.common.launch import interprets, is_hopper, launch_options, next_power_of_2
from tpctl.kernels.common.norm import rms_norm_reference
from tpctl.kernels.linear.gemv_kernels import small_linear_kernel


class GemvConfig(NamedTuple):
    """Output features and input columns per tile, splits of the input, launch parameters; dot: tensor cores.

    prefetch: tiles behind the first that a program of one row asks the L2 cache for while it waits (if there is a gate,
    of the gate alone). early: whether it lets the next kernel start before its first tile has come.
    """

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    dot: bool = False
    prefetch: int = 0
    early: bool = False


# Measured at one row, by (out_features, in_features); gated ones by their half.
_ONE_ROW: dict[tuple[int, int], GemvConfig] = {
    (4096, 1024): GemvConfig(8, 512, num_warps=2),
    (1024, 2048): GemvConfig(8, 2048, num_warps=8),
    (1024, 3072): GemvConfig(8, 2048, num_warps=8),
    (2048, 1024): GemvConfig(2, 512, num_warps=2),
    (1024, 1024): GemvConfig(4, 1024, num_warps=4),
    (1024, 1536): GemvConfig(4, 2048, num_warps=4),
    (6144, 4096): GemvConfig(2, 2048, num_warps=2),
    (4096, 4096): GemvConfig(8, 2048, num_warps=8),
    (4096, 14336): GemvConfig(4, 4096, num_warps=8),
    (3072, 4096): GemvConfig(8, 1024, num_warps=4, prefetch=1),
    (4096, 2048): GemvConfig(8, 1024, num_warps=4),
    (4096, 7168): GemvConfig(4, 2048, num_warps=4),
    (5120, 2048): GemvConfig(2, 1024, num_warps=1, prefetch=1),
    (2048, 4096): GemvConfig(4, 2048, num_warps=4, prefetch=1),
    (2880, 4096): GemvConfig(8, 1024, num_warps=4, prefetch=1),
    (3840, 4096): GemvConfig(8, 512, num_warps=2, prefetch=1),
    (3840, 15360): GemvConfig(2, 2048, num_warps=4, prefetch=1),
}
_ONE_ROW_GATED: dict[tuple[int, int], GemvConfig] = {
    (3072, 1024): GemvConfig(2, 512, num_warps=1),
    (1536, 1024): GemvConfig(2, 512, num_warps=1),
    (14336, 4096): GemvConfig(1, 4096, num_warps=4, early=True),
    (7168, 4096): GemvConfig(2, 4096, num_warps=8, early=True),
}
# Measured at two rows and at four, where the CUDA cores win: of short linears, whose launch and first bytes are most.
_TWO_ROWS: dict[tuple[int, int], GemvConfig] = {
    (4096, 1024): GemvConfig(4, 512, num_warps=2),
    (1024, 2048): GemvConfig(8, 2048, num_warps=8),
    (1024, 3072): GemvConfig(4, 2048, num_warps=8),
}
_FOUR_ROWS: dict[tuple[int, int], GemvConfig] = {
    (4096, 1024): GemvConfig(8, 256, num_warps=2),
    (1024, 2048): GemvConfig(2, 2048, num_warps=8),
    (1024, 3072): GemvConfig(4, 2048, num_warps=8),
}
_SHORT = 13 << 20
"""Bytes of weights in bfloat16 up to which they win at two rows; 33 MB lost."""
_MAX_SKINNY_ROWS = 16
_MAX_CUDA_ROWS = 4
"""Rows whose products the CUDA cores make while the weights come."""


def few_rows(device: torch.device) -> int:
    """Most rows that the kernels here are for: 16 on Hopper, whose shared memory they fill (and on a CPU, in Triton's
    interpreter); one elsewhere, beyond which cuBLAS does the rest."""
    return _MAX_SKINNY_ROWS if interprets(device) or is_hopper(device) else 1


def pick(
    rows: int,
    out_features: int,
    in_features: int,
    *,
    gated: bool = False,
    most: int = _MAX_SKINNY_ROWS,
    itemsize: int = 2,
) -> GemvConfig | None:
    """The tuned configuration for a linear of [out_features, in_features], or None where cuBLAS is faster.

    With `gated`, out_features counts one half of the merged [gate; up] weight. most: what `few_rows` says. itemsize:
    bytes of a weight.
    """
    if rows > most:
        return None
    if rows == 1:
        tuned = (_ONE_ROW_GATED if gated else _ONE_ROW).get((out_features, in_features))
        if tuned is not None:
            return tuned
        width = next_power_of_2(in_features)
        if out_features >= 32768:  # an lm_head: bandwidth alone
            return GemvConfig(2, width, 1, 4) if 2048 <= width <= 4096 else GemvConfig(2, min(width, 512), 1, 2)
        if gated:
            if width <= 1024:
                return GemvConfig(2, min(width, 512), 1, 1)
            # The kernel measured at 14336 x 4096, for other sizes.
            return GemvConfig(1, min(width, 4096), num_warps=4, early=width >= 4096)
        if width <= 1024:
            return GemvConfig(4, min(width, 512), 1, 1)
        if width <= 4096:  # the best, or nearly, of 5120 x 2048, 5120 x 2880 and 8192 x 3840; and of 2880 x 4096
            return GemvConfig(4, 512, num_warps=1 if out_features > 4096 else 2, prefetch=1)
        return GemvConfig(4, 2048, num_warps=4)
    if rows <= _MAX_CUDA_ROWS:
        on_cuda_cores = _pick_cuda_cores(rows, out_features, in_features, gated=gated)
        if on_cuda_cores is not None:
            return on_cuda_cores
    return pick_tensor_cores(rows, out_features, in_features, gated=gated, itemsize=itemsize)


def _pick_cuda_cores(rows: int, out_features: int, in_features: int, *, gated: bool) -> GemvConfig | None:
    """That of two to four rows on the CUDA cores, or None where tensor cores are faster. Sums of every row stay in
    registers, so a tile of two rows has half as many weights as one of one."""
    if not gated:
        tuned = (_TWO_ROWS if rows == 2 else _FOUR_ROWS).get((out_features, in_features))
        if tuned is not None:
            return tuned
    size = (4 if gated else 2) * out_features * in_features
    if rows > 2 or size > _SHORT or (gated and in_features > 1024):
        return None
    one = pick(1, out_features, in_features, gated=gated)
    assert one is not None
    if one.block_n > 2 and not gated:
        return one._replace(block_n=one.block_n // 2)
    return one._replace(block_k=one.block_k // 2)


def pick_tensor_cores(rows: int, out_features: int, in_features: int, *, gated: bool, itemsize: int = 2) -> GemvConfig:
    """That of a few rows on the tensor cores. Bytes in flight decide: 64 x 256 weights of 16 bits three deep; short
    outputs are split to busy most of the chip."""
    block_k = 512 // itemsize
    while block_k > 32 and in_features % block_k:
        block_k //= 2
    blocks = -(-out_features // 64)
    split = 1
    # Gate and up are long, but for those of a shared expert.
    while (not gated or blocks <= 16) and split < 8 and blocks * split * 2 <= 132 and in_features >= 1024 * split:
        split *= 2
    return GemvConfig(64, block_k, split, 4, 3, True)


@dataclass(frozen=True)
class GemvScratch:
    """Device memory that split linears on one stream share: partial sums and counters (zero between calls)."""

    partial: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def allocate(device: torch.device, *, partial_elements: int = 1 << 22, blocks: int = 1 << 14) -> GemvScratch:
        """partial_elements: splits * rows * (1, or 2 gated) * out_features at most. blocks: output blocks at most."""
        return GemvScratch(
            partial=torch.empty(partial_elements, dtype=torch.float32, device=device),
            counters=torch.zeros(blocks, dtype=torch.int32, device=device),
        )


def small_linear(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    scratch: GemvScratch,
    *,
    bias_O: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: GemvConfig | None = None,
    outlet: PeerBuffer | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """residual + act_and_mul(norm(x) @ weight.T + bias), each part optional, in one launch.

    x_TH: [T, H], T <= 64, columns contiguous. weight_OH: [O, H] contiguous, x's dtype. bias_O: [O]. norm:
    (weight [H], eps) of an RMSNorm over x (`unit_offset`: Gemma's 1 + weight). activation: weight_OH is the
    merged [gate; up] and the result act(gate) * up has O / 2 columns. residual_TO: added last; it may be
    `out`. outlet: sends the result through it as well; the all-reduce that follows must be told so (`sent`). The
    result's columns and block_n must then be even. Returns `out`, or a new [T, O] (or [T, O / 2]) in x's dtype.

    Raises ValueError where `pick` advises against and no config is given, or for what an outlet does not take.
    """
    rows, in_features = x_TH.shape
    out_features = weight_OH.shape[0] // 2 if activation else weight_OH.shape[0]
    if config is None:
        most = few_rows(x_TH.device)
        gated, itemsize = activation is not None, x_TH.element_size()
        config = pick(rows, out_features, in_features, gated=gated, most=most, itemsize=itemsize)
        if config is None:
            raise ValueError(f"{rows} rows are more than {most}; use torch.nn.functional.linear")
    if rows > _MAX_CUDA_ROWS and not config.dot:
        raise ValueError(f"a configuration without dot takes {_MAX_CUDA_ROWS} rows at most, got {rows}")
    if out is None:
        out = x_TH.new_empty((rows, out_features))
    if outlet is not None:
        if out_features % 2 or config.block_n % 2:
            raise ValueError(f"{out_features} features in blocks of {config.block_n} cannot be sent in pairs")
        outlet.check(out, sent=True)
    if config.split_k > 1:
        needed = config.split_k * rows * weight_OH.shape[0]
        if needed > scratch.partial.numel():
            raise ValueError(f"{needed} partial sums exceed the scratch of {scratch.partial.numel()}")
    args = (
        x_TH,
        weight_OH,
        out,
        bias_O if bias_O is not None else x_TH,
        residual_TO if residual_TO is not None else x_TH,
        norm[0] if norm is not None else x_TH,
        scratch.partial,
        scratch.counters,
        outlet.pointers if outlet is not None else scratch.counters,
        outlet.epochs if outlet is not None else scratch.counters,
        rows,
        out_features,
        x_TH.stride(0),
        out.stride(0),
        residual_TO.stride(0) if residual_TO is not None else 0,
        outlet.layout.row_words if outlet is not None else 0,
        outlet.layout.plane_words if outlet is not None else 0,
        norm[1] if norm is not None else 0.0,
    )
    flags = {
        "IN_FEATURES": in_features,
        "HAS_BIAS": bias_O is not None,
        "HAS_RESIDUAL": residual_TO is not None,
        "HAS_NORM": norm is not None,
        "UNIT_OFFSET": unit_offset,
        "ACTIVATION": activation or "",
        "BLOCK_M": max(16 if config.dot else 1, next_power_of_2(rows)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "DOT": config.dot,
        "STAGES": config.num_stages,
        "PREFETCH": config.prefetch,
        "EARLY": config.early,
        "RANK": outlet.rank if outlet is not None else 0,
        "WORLD": outlet.world if outlet is not None else 1,
        "PEERS": next_power_of_2(outlet.world) if outlet is not None else 1,
        "PDL": pdl,
        "num_warps": config.num_warps,
        **launch_options(pdl),
    }
    grid = (triton.cdiv(out_features, config.block_n), config.split_k)
    small_linear_kernel[grid](*args, **flags)
    return out


def small_linear_reference(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    *,
    bias_O: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    activation: Activation | None = None,
    residual_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """`small_linear` in plain torch: norm, linear, activation and addition one after the other."""
    x = x_TH if norm is None else rms_norm_reference(x_TH, norm[0], norm[1], unit_offset=unit_offset)
    y = torch.nn.functional.linear(x, weight_OH, bias_O)
    if activation is not None:
        y = act_and_mul_reference(y, activation=activation)
    return y if residual_TO is None else residual_TO + y
