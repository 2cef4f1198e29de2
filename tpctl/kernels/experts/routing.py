"""From a token's row, or its router's logits, to its experts and their weights, in one launch.

For few rows the router's linear is part of the launch, and so are the norm before it and the gate of a shared expert:

    x ─ norm ─ normed x ─┬─ gate ─ logits ─ choice ─ ids, weights
                         └─ gate of the shared expert ─ sigmoid ─ factor

A program computes the logits of a few experts; the one that comes last for a token chooses. A token's experts are
ranked all at once: an expert's rank is how many stand before it, and its slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from tpctl.arch.routing import Routing
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.norm import rms_norm_reference
from tpctl.kernels.experts.routing_kernels import gate_kernel, route_kernel
from tpctl.kernels.experts.routing_reference import route as route_reference

GATE_ROWS = 16
"""Most rows whose router is multiplied here; each reads it anew, from the L2 cache."""

_VALUES = 1 << 13  # weights of a program, all in registers at once


class Routed(NamedTuple):
    """What experts take of a step.

    Attributes:
        x: [T, H], normed.
        ids: int32 [T, K].
        weights: float32 [T, K].
        factors: float32 [T], by which the shared expert counts; ``None``: fully, or there is none.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    factors: torch.Tensor | None = None


class Router(NamedTuple):
    """The linear that routes, and how.

    Attributes:
        weight: [E, H] contiguous, of any float dtype; products are summed in float32.
        bias: [E] of that linear.
        correction: [E], added to the scores for the choice alone.
        shared: [H], the linear that weighs a shared expert.
    """

    weight: torch.Tensor
    routing: Routing
    per_token: int
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    shared: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class GateScratch:
    """Device memory that the routers on one stream share: logits, and counters (zero between calls)."""

    logits: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def allocate(device: torch.device, *, rows: int = GATE_ROWS, experts: int = 512) -> GateScratch:
        return GateScratch(
            logits=torch.empty(rows * (experts + 1), dtype=torch.float32, device=device),
            counters=torch.zeros(rows, dtype=torch.int32, device=device),
        )


def route(
    logits_TE: torch.Tensor,
    routing: Routing,
    per_token: int,
    correction_E: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token, best first, and their weights: `routing_reference.route` in one launch.

    logits_TE: [T, E], columns contiguous. correction_E: [E]. Returns ids int32 [T, K] and weights float32 [T, K].
    """
    rows, count = logits_TE.shape
    ids, weights = _outputs(logits_TE, per_token)
    if rows == 0:
        return ids, weights
    flags = choice_flags(routing, count, per_token, correction_E)
    route_kernel[(rows,)](
        logits_TE,
        logits_TE if correction_E is None else correction_E,
        ids,
        weights,
        logits_TE.stride(0),
        **flags,
        PDL=pdl,
        num_warps=_warps(flags),
        **launch_options(pdl),
    )
    return ids, weights


def gate(
    x_TH: torch.Tensor,
    router: Router,
    scratch: GateScratch,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
    pdl: bool = False,
) -> Routed:
    """Norm, router and choice of few rows in one launch.

    x_TH: [T, H], T at most what the scratch has counters for, columns contiguous. norm: (weight [H], eps) of an
    RMSNorm over x, whose result is then `Routed.x`.

    Raises ValueError for more rows or experts than the scratch is for.
    """
    rows, hidden = x_TH.shape
    count = router.experts
    check_scratch(scratch, rows, count)
    ids, weights = _outputs(x_TH, router.per_token)
    normed = x_TH if norm is None else x_TH.new_empty(x_TH.shape)
    factors = None if router.shared is None else x_TH.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return Routed(normed, ids, weights, factors)
    block_k = next_power_of_2(hidden)
    block_n = max(1, min(4, _VALUES // block_k))
    flags = choice_flags(router.routing, count, router.per_token, router.correction)
    num_warps = max(4, _warps(flags))
    gate_kernel[(triton.cdiv(count, block_n) + (router.shared is not None), rows)](
        x_TH,
        router.weight,
        x_TH if router.bias is None else router.bias,
        router.weight if router.shared is None else router.shared,
        x_TH if norm is None else norm[0],
        x_TH if router.correction is None else router.correction,
        scratch.logits,
        scratch.counters,
        normed,
        ids,
        weights,
        weights if factors is None else factors,
        x_TH.stride(0),
        normed.stride(0),
        0.0 if norm is None else norm[1],
        IN_FEATURES=hidden,
        HAS_BIAS=router.bias is not None,
        HAS_SHARED=router.shared is not None,
        HAS_NORM=norm is not None,
        UNIT_OFFSET=unit_offset,
        **flags,
        COPIES=copies(flags, num_warps),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PDL=pdl,
        num_warps=num_warps,
        **launch_options(pdl),
    )
    return Routed(normed, ids, weights, factors)


def gate_reference(
    x_TH: torch.Tensor,
    router: Router,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    unit_offset: bool = False,
) -> Routed:
    """`gate` in plain torch: norm, linear and choice one after the other."""
    x = x_TH if norm is None else rms_norm_reference(x_TH, norm[0], norm[1], unit_offset=unit_offset)
    logits = x.float() @ router.weight.float().T
    if router.bias is not None:
        logits += router.bias.float()
    ids, weights = route_reference(logits, router.routing, router.per_token, router.correction)
    factors = None if router.shared is None else (x.float() @ router.shared.flatten().float()).sigmoid()
    return Routed(x, ids, weights, factors)


def check_scratch(scratch: GateScratch, rows: int, count: int) -> None:
    """Raises ValueError for more rows or experts than the scratch is for."""
    if rows > scratch.counters.numel() or rows * (count + 1) > scratch.logits.numel():
        raise ValueError(f"{rows} rows of {count} experts are more than the scratch of {scratch.logits.numel()} takes")


def _outputs(like: torch.Tensor, per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (like.shape[0], per_token)
    return like.new_empty(shape, dtype=torch.int32), like.new_empty(shape, dtype=torch.float32)


def choice_flags(routing: Routing, count: int, per_token: int, correction_E: torch.Tensor | None) -> dict[str, Any]:
    """What a kernel that chooses is compiled for."""
    if count % routing.groups:
        raise ValueError(f"{count} experts are not {routing.groups} equal groups")
    return {
        "SCORES": routing.scores,
        "RENORMALISE": routing.renormalise,
        "HAS_CORRECTION": correction_E is not None,
        "GROUPS": routing.groups,
        "TOP_GROUPS": routing.top_groups,
        "SCALE": routing.scale,
        "EPSILON": routing.epsilon,
        "COUNT": count,
        "PER_TOKEN": per_token,
        "ROWS": next_power_of_2(routing.groups),
        "SIZE": next_power_of_2(count // routing.groups),
    }


def copies(flags: dict[str, Any], num_warps: int) -> int:
    """How often a program of so many warps loads each logit of a choice, so that each thread loads one."""
    return max(1, 32 * num_warps // int(flags["ROWS"] * flags["SIZE"]))


def _warps(flags: dict[str, Any]) -> int:
    """Every expert is compared with every other: at most 256 comparisons a thread up to 256 experts."""
    width = flags["ROWS"] * flags["SIZE"]
    return 1 if width <= 32 else 4 if width <= 128 else 8
