"""The choice of one row's experts, by every warp for itself: lane s has slot s."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import first_lane, from_lane, lane_sum, lanes_where, most_of_lanes

_NEVER = gl.constexpr(-2147483648)


@gluon.jit
def _key(value):
    """An integer that is larger where a number is; what is not a number stands with the smallest."""
    value = gl.where(value == value, value + 0.0, float("-inf"))
    bits = value.to(gl.int32, bitcast=True)
    return gl.where(bits < 0, bits ^ 2147483647, bits)


@gluon.jit
def chosen_ids(logits_ptr, correction_ptr, lane, CHOICE: gl.constexpr):
    """The best experts in their order, of equal ones the smaller number first. A lane's experts are neighbours."""
    EACH: gl.constexpr = CHOICE.each
    keys = ()
    for i in gl.static_range(EACH):
        expert = lane * EACH + i
        real = expert < CHOICE.experts
        value = gl.load(logits_ptr + expert, mask=real, other=0.0, cache_modifier=".cg")
        if CHOICE.corrected:
            if CHOICE.scores == "sigmoid":
                value = 1.0 / (1.0 + gl.exp(-value))
            value += gl.load(correction_ptr + expert, mask=real, other=0.0).to(gl.float32)
        keys += (gl.where(real, _key(value), _NEVER),)  # type: ignore[assignment]
    ids = lane * 0
    below = (lane * 0 + 1 << lane) - 1
    SLOTS: gl.constexpr = CHOICE.per_token
    for slot in gl.static_range(SLOTS):
        best = keys[0]  # type: ignore[misc]
        for i in gl.static_range(1, EACH):
            best = gl.maximum(best, keys[i])
        mine = lane * EACH
        for i in gl.static_range(1, EACH):
            mine = gl.where(keys[EACH - i] == best, lane * EACH + (EACH - i), mine)
        mine = gl.where(keys[0] == best, lane * EACH, mine)  # type: ignore[misc]
        ours = best == most_of_lanes(best)
        lanes = lanes_where(ours.to(gl.int32))
        ids = gl.where(lane == slot, from_lane(mine, first_lane(lanes)), ids)
        taken = ours & (lanes & below == 0)
        rest = ()
        for i in gl.static_range(EACH):
            rest += (gl.where(taken & (mine == lane * EACH + i), _NEVER, keys[i]),)  # type: ignore[assignment]
        keys = rest
    return ids


@gluon.jit
def chosen_weights(logits_ptr, ids, lane, CHOICE: gl.constexpr):
    """By what the chosen experts count; of lanes without a slot, zero."""
    there = lane < CHOICE.per_token
    logit = gl.load(logits_ptr + ids, mask=there, other=0.0, cache_modifier=".cg")
    if CHOICE.scores == "sigmoid":
        score = 1.0 / (1.0 + gl.exp(-logit))
    else:
        first = gl.where(lane == 0, logit, 0.0)
        top = lane_sum(first, 32)
        score = gl.exp(logit - top)
        if CHOICE.scores == "softmax":
            total = lane * 0.0
            EACH: gl.constexpr = CHOICE.each
            for i in gl.static_range(EACH):
                expert = lane * EACH + i
                real = expert < CHOICE.experts
                other = gl.load(logits_ptr + expert, mask=real, other=0.0, cache_modifier=".cg")
                total += gl.where(real, gl.exp(other - top), 0.0)
            score = score / lane_sum(total, 32)
        else:
            score = score / lane_sum(gl.where(there, score, 0.0), 32)
    score = gl.where(there, score, 0.0)
    if CHOICE.renormalise:
        score = score / (lane_sum(score, 32) + CHOICE.epsilon)
    return score * CHOICE.scale
