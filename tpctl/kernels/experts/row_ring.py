"""The mixture of one token, its experts read through rings in shared memory; `one_row` and `codes_row` take what this
one does not.

    norm, router | choice, gate·up of K experts | down: all K in one sum, plus the residual

Three launches. Every warp chooses for itself, and `down` does so before it waits: most of its weights are on their way
while gate·up still runs, in the half of a multiprocessor's shared memory that gate·up leaves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tpctl.kernels.common.launch import launch_options, next_power_of_2, num_multiprocessors
from tpctl.kernels.experts.coded_matrix import CodedMatrix
from tpctl.kernels.experts.dense_matrix import DenseMatrix
from tpctl.kernels.experts.matrices import ExpertMatrices
from tpctl.kernels.experts.matrix import ExpertMatrix
from tpctl.kernels.experts.routing import GateScratch, Router, check_scratch
from tpctl.kernels.experts.row_logits_kernels import row_logits_kernel
from tpctl.kernels.experts.row_ring_cut import Choice, ExpertCut

row_ring_gate_up_kernel: Any
row_ring_down_kernel: Any
try:
    from tpctl.kernels.experts.row_ring_kernels import row_ring_down_kernel, row_ring_gate_up_kernel
except (ImportError, AttributeError):  # a Triton without Gluon, or with another one
    row_ring_gate_up_kernel = row_ring_down_kernel = None

_WHOLE = 228 << 10
"""Bytes of shared memory of a Hopper's multiprocessor; each program takes `_OWN` besides what it asks for."""
_OWN = 1024

_UP = 115968
"""Of gate_up's programs: only one fits, and down's beside it, which begin while gate_up runs."""

_WARPS = 8
"""Of a program: two of them, with 128 registers a thread, have all that a multiprocessor has."""

_LONGEST = 16
"""Rows on their way for a team; asking for the first of them is unrolled."""

_MOST = {"bf16": 48, "e4m3": 64, "e2m1": 96}
"""Inputs of a thread, in a register each, of codes in half of one, beside which it has where its chunks lie."""

_STEP = {"bf16": 2, "e4m3": 4, "e2m1": 4}
"""Rows at once: of codes four took 3% less on an H200 than two, of numbers as long."""


class RingConfig(NamedTuple):
    """Warps that share a row; teams of them, both powers of two; rows of a team that are on their way, and that it sums
    at once, 2 or 4, of which those are a multiple; most registers; least bytes of shared memory of a program."""

    share: int
    teams: int
    ahead: int
    step: int = 2
    registers: int = 128
    least: int = 0


RingConfigs = tuple[RingConfig, RingConfig]
"""Of gate_up and down."""


def ring_kind(matrix: ExpertMatrix) -> str | None:
    """As what the kernels read a matrix; None: not at all. Of e4m3 `in_blocks` is to hold, too."""
    if isinstance(matrix, DenseMatrix):
        values = matrix.values
        taken = values.dtype == torch.bfloat16 and values.shape[2] % 8 == 0 and _lies_well(values)
        return "bf16" if taken else None
    if not isinstance(matrix, CodedMatrix):
        return None
    codes = matrix.codes
    shifted = codes.zeros is not None or codes.zero != 0 or codes.first != 0
    if shifted or codes.groups is not None or codes.factors is not None or not _lies_well(codes.values, codes.scales):
        return None
    if codes.kind == "e2m1" and codes.unit == 32 and codes.rows is None and codes.scales.dtype == torch.uint8:
        return "e2m1" if codes.columns % 32 == 0 and codes.outputs * (codes.columns // 32) % 4 == 0 else None
    if codes.kind == "e4m3" and codes.unit == 128 and codes.rows is not None and codes.columns % 16 == 0:
        rows, columns = -(-codes.outputs // 128), -(-codes.columns // 128)
        whole = codes.scales.dtype == torch.float32 or (
            codes.scales.dtype == torch.bfloat16 and rows * columns % 2 == 0
        )
        return "e4m3" if whole and codes.scales.shape[1:] == (rows, columns) else None
    return None


def _lies_well(*tensors: Tensor) -> bool:
    """Whether 16 bytes can be copied at once."""
    return all(one.is_contiguous() and one.data_ptr() % 16 == 0 for one in tensors)


def in_blocks(matrix: ExpertMatrix) -> bool:
    """Whether 128 outputs after each other have a row of scales, where they do not have their own; the device is waited
    for. On the meta device, where nothing is known, it is taken for granted."""
    rows = matrix.codes.rows if isinstance(matrix, CodedMatrix) else None
    return rows is None or rows.is_meta or torch.equal(rows.long(), torch.arange(len(rows), device=rows.device) // 128)


def takes_row_ring(router: Router, experts: ExpertMatrices[Any]) -> bool:
    """Whether the kernels know such experts, `in_blocks` aside, and such a choice."""
    kinds = ring_kind(experts.gate_up), ring_kind(experts.down)
    routing = router.routing
    ordered = router.correction is None or routing.scores == "sigmoid"
    alone = router.shared is None and routing.top_groups == routing.groups and router.per_token <= 32
    return None not in kinds and ordered and alone


def pick_row_ring(
    router: Router, experts: ExpertMatrices[Any], *, multiprocessors: int, hopper: bool
) -> RingConfigs | None:
    """How to cut gate_up and down; None where others are for such experts, or such a GPU. Once for a layer, before
    anything is captured (`in_blocks`).

    gate_up's team is as few warps as have the inputs in their registers with few left idle, and down's all of a
    program. gate_up takes half of a multiprocessor's shared memory, so that none gets two of its programs; down, which
    begins while gate_up runs, what is left.
    """
    if row_ring_gate_up_kernel is None or not hopper or not takes_row_ring(router, experts):
        return None
    if not (in_blocks(experts.gate_up) and in_blocks(experts.down)):
        return None
    up = _pick(router, experts, multiprocessors, gated=True, limit=_UP)
    down = _pick(router, experts, multiprocessors, gated=False, limit=_WHOLE - _UP - 2 * _OWN)
    return None if up is None or down is None else (up._replace(least=_UP), down)


def _pick(
    router: Router, experts: ExpertMatrices[Any], multiprocessors: int, *, gated: bool, limit: int
) -> RingConfig | None:
    """With as many rows on their way as `limit` bytes have room for, and as there are."""
    step = _STEP[str(ring_kind(experts.gate_up if gated else experts.down))]
    teams = []
    for share in (1, 2, 4, 8) if gated else (_WARPS,):
        config = RingConfig(share, _WARPS // share, step, step)
        cut = cut_of(router, experts, config, gated=gated, multiprocessors=multiprocessors)
        if cut.chunks * cut.size <= _MOST[cut.kind]:
            idle = 1 - cut.all_chunks / (cut.chunks * cut.team)
            teams.append((round(idle, 1), config))
    if not teams:
        return None
    _, config = min(teams)
    found = None
    while True:
        cut = cut_of(router, experts, config, gated=gated, multiprocessors=multiprocessors)
        longer = cut.ahead > _LONGEST or cut.turns > cut.blocks // cut.teams
        if cut.bytes > limit or (longer and found is not None):
            return found
        found, config = config, config._replace(ahead=config.ahead + config.step)


def cut_of(
    router: Router, experts: ExpertMatrices[Any], config: RingConfig, *, gated: bool, multiprocessors: int
) -> ExpertCut:
    """What the kernel of gate_up (gated) or down is compiled for. Raises ValueError for a config that is none."""
    matrix = experts.gate_up if gated else experts.down
    warps = config.share * config.teams
    if config.step not in (2, 4) or config.ahead < config.step or config.ahead % config.step or warps & (warps - 1):
        raise ValueError(
            f"{config.share} x {config.teams} warps with {config.ahead} rows on their way, {config.step} at once: "
            "warps must be a power of 2, rows steps of 2 or 4"
        )
    units = experts.width * router.per_token if gated else experts.hidden
    return ExpertCut(
        kind=str(ring_kind(matrix)),
        per_token=router.per_token,
        inputs=experts.hidden if gated else experts.width,
        outputs=matrix.outputs,
        gated=gated,
        interleaved=gated and experts.interleaved,
        all_here=experts.count == router.experts,
        share=config.share,
        teams=config.teams,
        step=config.step,
        ahead=config.ahead,
        programs=min(multiprocessors, units),
        scale_bytes=matrix.codes.scales.element_size() if isinstance(matrix, CodedMatrix) else 0,
        least=config.least,
    )


def choice_of(router: Router) -> Choice:
    routing = router.routing
    return Choice(
        routing.scores,
        routing.renormalise,
        routing.scale,
        routing.epsilon,
        router.correction is not None,
        router.experts,
        router.per_token,
    )


def row_ring(
    x_1H: Tensor,
    router: Router,
    scratch: GateScratch,
    experts: ExpertMatrices[Any],
    *,
    norm: tuple[Tensor, float] | None = None,
    unit_offset: bool = False,
    residual_TH: Tensor | None = None,
    out: Tensor | None = None,
    configs: RingConfigs,
    pdl: bool = False,
) -> Tensor:
    """[1, H]: residual + the weighed experts of one token, in bfloat16 (`out`, if given).

    x_1H: bfloat16. norm: (weight [H], eps) of an RMSNorm over x. residual_TH: may be `out`, and x. configs: what
    `pick_row_ring` gave, or others. Raises ValueError for more rows, and for what `takes_row_ring` refuses.
    """
    rows, hidden = x_1H.shape
    taken = x_1H.dtype == torch.bfloat16 and _lies_well(x_1H) and takes_row_ring(router, experts)
    if rows != 1 or not taken:
        raise ValueError(f"{rows} rows of {x_1H.dtype} and such experts: use one_row or codes_row")
    programs = num_multiprocessors(x_1H.device)
    up, down = (
        cut_of(router, experts, config, gated=gated, multiprocessors=programs)
        for config, gated in zip(configs, (True, False), strict=True)
    )
    check_scratch(scratch, rows, router.experts)
    out = torch.empty_like(x_1H) if out is None else out
    normed = torch.empty_like(x_1H)
    h = x_1H.new_empty(up.units, dtype=torch.float32 if down.kind == "bf16" else torch.bfloat16)
    gate_n = next_power_of_2(-(-router.experts // programs))
    row_logits_kernel[(triton.cdiv(router.experts, gate_n),)](
        x_1H,
        router.weight,
        x_1H if router.bias is None else router.bias,
        x_1H if norm is None else norm[0],
        scratch.logits,
        normed,
        0.0 if norm is None else norm[1],
        IN_FEATURES=hidden,
        HAS_BIAS=router.bias is not None,
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        COUNT=router.experts,
        BLOCK_N=gate_n,
        BLOCK_K=next_power_of_2(hidden),
        SIZE=up.size,
        PDL=pdl,
        num_warps=8,
        **launch_options(pdl),
    )
    chosen = (scratch.logits, x_1H if router.correction is None else router.correction)
    row_ring_gate_up_kernel[(up.programs,)](
        *chosen,
        normed.view(torch.int32),
        *_stored(experts.gate_up, x_1H),
        x_1H if experts.gate_up_bias is None else experts.gate_up_bias,
        h,
        experts.first,
        experts.count,
        CUT=up,
        CHOICE=choice_of(router),
        GATING=experts.activation,
        HAS_BIAS=experts.gate_up_bias is not None,
        H_SIZE=down.size,
        H_PIECE=down.piece,
        PDL=pdl,
        num_warps=up.warps,
        maxnreg=configs[0].registers,
        **launch_options(pdl),
    )
    row_ring_down_kernel[(down.programs,)](
        *chosen,
        h.view(torch.int32),
        *_stored(experts.down, x_1H),
        x_1H if experts.down_bias is None else experts.down_bias,
        x_1H if residual_TH is None else residual_TH,
        out,
        experts.first,
        experts.count,
        CUT=down,
        CHOICE=choice_of(router),
        HAS_BIAS=experts.down_bias is not None,
        HAS_RESIDUAL=residual_TH is not None,
        PDL=pdl,
        num_warps=down.warps,
        maxnreg=configs[1].registers,
        **launch_options(pdl),
    )
    return out


def _stored(matrix: Any, unused: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and its scales, in bytes."""
    if isinstance(matrix, DenseMatrix):
        return matrix.values.view(torch.uint8), unused.view(torch.uint8)
    return matrix.codes.values.view(torch.uint8), matrix.codes.scales.view(torch.uint8)
