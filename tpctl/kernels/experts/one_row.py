"""The mixture of one token, router and norm included, its experts read once.

    norm, router ┬─ shared gate·up ───────────────┐
                 └─ choice ─ gate·up of K experts ┴─ down: all K and the shared one in one sum, plus the residual,
                                                     or sent to the peers

One row only streams its weights, so everything runs on the CUDA cores, in three launches: logits; choice, which every
program makes for itself, and gate·up; down. The sum runs over the slots in their order. Each multiprocessor has one
program, with more than half of its memory: smaller ones, placed while the kernel before still runs, would crowd the
multiprocessors that are free first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.launch import launch_options, next_power_of_2, num_multiprocessors, shared_memory
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.finish import finish_options
from tpctl.kernels.experts.matrices import ExpertMatrices, SharedMatrices
from tpctl.kernels.experts.one_row_kernels import one_row_kernel
from tpctl.kernels.experts.routing import GateScratch, Router, check_scratch, choice_flags, copies


class RowConfig(NamedTuple):
    """Output features and inputs of the tiles of gate_up and down, and how many of them are under way; warps."""

    up_n: int
    up_k: int
    up_stages: int
    down_n: int
    down_k: int
    down_stages: int
    num_warps: int = 8

    @property
    def num_stages(self) -> int:
        return self.up_stages


def pick_row(hidden: int, width: int, *, itemsize: int, programs: int, limit: int) -> RowConfig:
    """For experts of such sizes on this rank, of at most `itemsize` bytes a weight, and `limit` bytes of shared memory.

    More than half of it is for weights under way, so that no multiprocessor gets two programs. Measured on an H200 at
    2048 x 768, gate_up and down each beside another tile of the other; whole rows were better than parts there.
    """
    up_k = 2048 if 1024 < hidden <= 2048 else max(512, _least_padded(hidden))
    down_k = next_power_of_2(width) if 512 < width <= 1024 else _least_padded(width)
    up_n, down_n = max(8, 8192 // up_k), max((16, 8, 4), key=lambda n: (round(_balance(hidden, n, programs), 1), n))
    up_stages, down_stages = (
        2 + limit // 2 // tile for tile in (2 * up_n * up_k * itemsize, down_n * down_k * itemsize)
    )
    return RowConfig(up_n, up_k, up_stages, down_n, down_k, down_stages)


def _least_padded(inputs: int) -> int:
    """Inputs in a tile: of 256 to 1024, what comes closest to whole tiles, and the most of those alike."""
    return min((1024, 512, 256), key=lambda k: -(-inputs // k) * k)


def _balance(outputs: int, block_n: int, programs: int) -> float:
    """What part of the time a program has work, where blocks are dealt out."""
    blocks = -(-outputs // block_n)
    return blocks / (-(-blocks // programs) * programs)


_HELD = 32 << 10  # bytes of the shared expert's weights that a program has in registers, while it waits


def held_of_shared(hidden: int, width: int, itemsize: int, programs: int, config: RowConfig) -> tuple[int, bool]:
    """What a program reads of the shared expert, whose weights no choice decides about, before it waits: of how many of
    the features (0: none; they are read like those of the others), and whether its part of down.

    So little of both is left to each that nothing else would hide the time until it has come.
    """
    if not width:
        return 0, False
    each = next_power_of_2(-(-width // programs))
    held = 2 * each * next_power_of_2(hidden) * itemsize <= _HELD
    once = width <= config.down_k and hidden <= programs * config.down_n
    return each if held else 0, once and config.down_n * config.down_k * itemsize <= _HELD


def one_row(
    x_1H: torch.Tensor,
    router: Router,
    scratch: GateScratch,
    experts: ExpertMatrices[DenseMatrix],
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    shared: SharedMatrices | None = None,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    outlet: PeerBuffer | None = None,
    config: RowConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[1, H]: residual + the weighed experts of one token + the shared one, in x's dtype (`out`, if given).

    x_1H: in the weights' dtype. norm: (weight [H], eps) of an RMSNorm over x. residual_TH: may be `out`, and x.
    outlet: sends the result as well; the all-reduce that follows must be told so. Raises ValueError for more rows and
    for what an outlet does not take.
    """
    rows, hidden = x_1H.shape
    if rows != 1:
        raise ValueError(f"{rows} rows are more than one; use `grouped`")
    check_scratch(scratch, rows, router.experts)
    programs = num_multiprocessors(x_1H.device)
    if config is None:
        config = pick_row(
            experts.hidden,
            experts.width,
            itemsize=x_1H.element_size(),
            programs=programs,
            limit=shared_memory(x_1H.device),
        )
    gate_n = next_power_of_2(-(-router.experts // (programs - (router.shared is not None))))
    shared_width = 0 if shared is None else shared.gate_up.shape[0] // 2
    shared_n, shared_read = held_of_shared(hidden, shared_width, x_1H.element_size(), programs, config)
    out = torch.empty_like(x_1H) if out is None else out
    normed = x_1H if norm is None else x_1H.new_empty(programs, hidden)
    ids = x_1H.new_empty(programs, router.per_token, dtype=torch.int32)
    weights = x_1H.new_empty(router.per_token, dtype=torch.float32)
    factor = x_1H.new_empty(1, dtype=torch.float32)
    # In float32, of which threads copy one each ahead; fewer bytes than four they would load when they are needed.
    h = x_1H.new_empty(router.per_token, experts.width, dtype=torch.float32)
    shared_h = x_1H.new_empty(1, shared_width, dtype=torch.float32)
    flags = choice_flags(router.routing, router.experts, router.per_token, router.correction)
    for stage in (1, 2, 3):
        one_row_kernel[(programs,)](
            x_1H,
            router.weight,
            x_1H if router.bias is None else router.bias,
            router.weight if router.shared is None else router.shared,
            x_1H if norm is None else norm[0],
            x_1H if router.correction is None else router.correction,
            experts.gate_up.values,
            x_1H if experts.gate_up_bias is None else experts.gate_up_bias,
            experts.down.values,
            x_1H if experts.down_bias is None else experts.down_bias,
            x_1H if shared is None else shared.gate_up,
            x_1H if shared is None else shared.down,
            scratch.logits,
            normed,
            ids,
            weights,
            factor,
            h,
            shared_h,
            eps=0.0 if norm is None else norm[1],
            first=experts.first,
            count=experts.count,
            **finish_options(out, residual_TH, outlet, config.down_n),
            IN_FEATURES=hidden,
            HAS_GATE_BIAS=router.bias is not None,
            HAS_SHARED_GATE=router.shared is not None,
            HAS_NORM=norm is not None,
            UNIT_OFFSET=unit_offset,
            **flags,
            COPIES=copies(flags, config.num_warps),
            SLOTS=next_power_of_2(router.per_token),
            WIDTH=experts.width,
            SHARED_WIDTH=shared_width,
            SHARED_N=shared_n,
            SHARED_READ=shared_read,
            HAS_UP_BIAS=experts.gate_up_bias is not None,
            HAS_DOWN_BIAS=experts.down_bias is not None,
            GATING=experts.activation,
            INTERLEAVED=experts.interleaved,
            GATE_N=gate_n,
            GATE_K=next_power_of_2(hidden),
            UP_N=config.up_n,
            UP_K=config.up_k,
            UP_STAGES=config.up_stages,
            DOWN_N=config.down_n,
            DOWN_K=config.down_k,
            DOWN_STAGES=config.down_stages,
            STAGE=stage,
            PDL=pdl,
            num_warps=config.num_warps,
            **launch_options(pdl),
        )
    return out
