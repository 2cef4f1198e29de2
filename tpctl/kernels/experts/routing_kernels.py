"""The device code of `routing`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranks(values, index, SIZE: tl.constexpr):
    """How many of `values` [SIZE] stand before each: the larger ones, and among equals those of a smaller index.

    Threads lie along the last axis, so that each has one of them and counts by itself.
    """
    there, here = values[:, None], values[None, :]
    before = (there > here) | ((there == here) & (index[:, None] < index[None, :]))
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def _keep_best_groups(choice, GROUPS: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """`choice` [ROWS, SIZE], a group a row, with -inf where a group is not among the TOP best of GROUPS."""
    at = tl.broadcast_to(tl.arange(0, SIZE)[None, :], [ROWS, SIZE])
    best = tl.max(choice, 1)
    first = tl.min(tl.where(choice == best[:, None], at, SIZE), 1)  # of equal ones one alone is the best
    second = tl.max(tl.where(at == first[:, None], float("-inf"), choice), 1)
    group = tl.arange(0, ROWS)
    total = best if SIZE == 1 else best + second
    total = tl.where(group < GROUPS, total, float("-inf"))
    return tl.where((_ranks(total, group, ROWS) < TOP)[:, None], choice, float("-inf"))


@triton.jit
def _scores(logits, real, SCORES: tl.constexpr):
    """What experts are scored by; what is "softmax of chosen" is not scored before it is chosen."""
    if SCORES == "softmax":
        highest = tl.max(tl.max(tl.where(real, logits, float("-inf")), 1), 0)
        scores = tl.where(real, tl.exp(logits - highest), 0.0)
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    elif SCORES == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = logits
    return scores


@triton.jit
def ranked(
    logits,  # [ROWS, SIZE] float32: the experts by groups
    expert,  # their numbers
    real,  # whether there is such an expert
    correction_ptr,
    SCORES: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The place of every expert in the order of choice, int32 [ROWS * SIZE]. What is not a number is chosen last.

    Scores grow with logits: where nothing is added to them, logits alone decide.
    """
    choice = logits
    if HAS_CORRECTION or TOP_GROUPS < GROUPS:
        choice = _scores(logits, real, SCORES)
    if HAS_CORRECTION:
        choice += tl.load(correction_ptr + expert, mask=real, other=0.0).to(tl.float32)
    choice = tl.where(real & (choice == choice), choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        choice = _keep_best_groups(choice, GROUPS, TOP_GROUPS, ROWS, SIZE)
    WIDTH: tl.constexpr = ROWS * SIZE
    # Behind all that are real: where some of those are -inf as well, padding comes after them.
    index = tl.where(tl.reshape(real, [WIDTH]), tl.arange(0, WIDTH), WIDTH + tl.arange(0, WIDTH))
    return _ranks(tl.reshape(choice, [WIDTH]), index, WIDTH)


@triton.jit
def weighed(
    logits,
    real,
    rank,  # [ROWS * SIZE]
    SCORES: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """By what every expert would count, float32 [ROWS * SIZE] (`arch.routing`)."""
    scores = tl.reshape(_scores(logits, real, SCORES), [rank.shape[0]])
    chosen = rank < PER_TOKEN
    if SCORES == "softmax of chosen":
        highest = tl.max(tl.where(chosen, scores, float("-inf")), 0)
        scores = tl.exp(scores - highest)
        scores = scores / tl.sum(tl.where(chosen, scores, 0.0), 0)
    if RENORMALISE:
        scores = scores / (tl.sum(tl.where(chosen, scores, 0.0), 0) + EPSILON)
    return scores * SCALE


@triton.jit
def choose(
    logits,  # [ROWS, SIZE] float32: the experts by groups
    expert,  # their numbers
    real,  # whether there is such an expert
    correction_ptr,
    ids_ptr,  # of one token
    weights_ptr,
    SCORES: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One token's experts and weights."""
    rank = ranked(logits, expert, real, correction_ptr, SCORES, HAS_CORRECTION, GROUPS, TOP_GROUPS, ROWS, SIZE)
    weights = weighed(logits, real, rank, SCORES, RENORMALISE, SCALE, EPSILON, PER_TOKEN)
    tl.store(ids_ptr + rank, tl.reshape(expert, [ROWS * SIZE]), mask=rank < PER_TOKEN)
    tl.store(weights_ptr + rank, weights, mask=rank < PER_TOKEN)


@triton.jit
def _experts(COUNT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The numbers of experts by groups, [ROWS, SIZE], and which of them there are."""
    EACH: tl.constexpr = COUNT // GROUPS
    group = tl.arange(0, ROWS)[:, None]
    within = tl.arange(0, SIZE)[None, :]
    return group * EACH + within, (group < GROUPS) & (within < EACH)


@triton.jit
def route_kernel(
    logits_ptr,
    correction_ptr,
    ids_ptr,
    weights_ptr,
    logits_stride,
    SCORES: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    COUNT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert, real = _experts(COUNT, GROUPS, ROWS, SIZE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=real, other=0.0).to(tl.float32)
    choose(logits, expert, real, correction_ptr, ids_ptr + token * PER_TOKEN, weights_ptr + token * PER_TOKEN, SCORES,
           RENORMALISE, HAS_CORRECTION, GROUPS, TOP_GROUPS, SCALE, EPSILON, PER_TOKEN, ROWS, SIZE)  # fmt: skip


@triton.jit
def _normed(x, norm, eps, IN_FEATURES: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """RMSNorm of one row of `x`, rounded as `common.norm` rounds it."""
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / IN_FEATURES + eps)
    if UNIT_OFFSET:
        value = value * (1.0 + norm)
    else:
        value = value.to(x.dtype).to(tl.float32) * norm
    return value.to(x.dtype)


@triton.jit
def leave_logits(
    x_ptr,  # of one token
    gate_ptr,  # [COUNT, IN_FEATURES]
    bias_ptr,
    shared_ptr,  # [IN_FEATURES]
    norm_ptr,
    logits_ptr,  # [COUNT + 1] float32
    normed_ptr,
    block,
    keep,  # whether this program stores the normed row
    eps,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of experts block * BLOCK_N and on; what they weigh is loaded before the wait for x. Returns x, normed."""
    BLOCKS: tl.constexpr = (COUNT + BLOCK_N - 1) // BLOCK_N
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_ok = k < IN_FEATURES
    rows = gate_ptr + n[:, None] * IN_FEATURES
    if HAS_SHARED:  # the block behind those of the experts
        shared = block == BLOCKS
        rows = tl.where(shared, shared_ptr + 0 * n[:, None], rows)
        n_ok = (n < COUNT) | (shared & (n == BLOCKS * BLOCK_N))
    else:
        n_ok = n < COUNT
    gate = tl.load(rows + k[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0.0)
    norm = k
    if HAS_NORM:
        norm = tl.load(norm_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + k, mask=k_ok, other=0.0)
    if HAS_NORM:
        x = _normed(x, norm, eps, IN_FEATURES, UNIT_OFFSET)
        if keep:
            tl.store(normed_ptr + k, x, mask=k_ok)
    logits = tl.sum(gate.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + n, mask=n < COUNT, other=0.0).to(tl.float32)
    if HAS_SHARED:
        tl.store(logits_ptr + tl.where(block == BLOCKS, COUNT, n), logits, mask=n_ok)
    else:
        tl.store(logits_ptr + n, logits, mask=n_ok)
    return x


@triton.jit
def left_logits(
    logits_ptr,  # what `leave_logits` of all programs has left
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COPIES: tl.constexpr,  # of each logit in the threads; of fewer logits than threads, each would load them all
):
    """One token's logits by groups, [ROWS, SIZE], the experts' numbers, and which of them there are."""
    expert, real = _experts(COUNT, GROUPS, ROWS, SIZE)
    at = expert[None, :, :] + tl.zeros([COPIES, 1, 1], tl.int32)
    logits = tl.max(tl.load(logits_ptr + at, mask=real[None, :, :], other=0.0, cache_modifier=".cg"), 0)
    return logits, expert, real


@triton.jit
def leave_factor(logits_ptr, factor_ptr, COUNT: tl.constexpr):
    """By what a token's shared expert counts."""
    factor = tl.load(logits_ptr + COUNT, cache_modifier=".cg")
    tl.store(factor_ptr, 1.0 / (1.0 + tl.exp(-factor)))


@triton.jit
def gate_kernel(
    x_ptr,
    gate_ptr,  # [COUNT, IN_FEATURES]
    bias_ptr,
    shared_ptr,  # [IN_FEATURES]
    norm_ptr,
    correction_ptr,
    logits_ptr,  # [T, COUNT + 1] float32
    counters_ptr,  # [T], zero between calls
    normed_ptr,
    ids_ptr,
    weights_ptr,
    factors_ptr,
    x_stride,
    normed_stride,
    eps,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    SCORES: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    COUNT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of BLOCK_N experts for one token; the program that comes last chooses."""
    block, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits_ptr += token * (COUNT + 1)
    leave_logits(x_ptr + token * x_stride, gate_ptr, bias_ptr, shared_ptr, norm_ptr, logits_ptr,
                 normed_ptr + token * normed_stride, block, block == 0, eps, IN_FEATURES, HAS_BIAS, HAS_SHARED,
                 HAS_NORM, UNIT_OFFSET, COUNT, BLOCK_N, BLOCK_K, PDL)  # fmt: skip
    tl.debug_barrier()
    done = tl.atomic_add(counters_ptr + token, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(counters_ptr + token, 0)
        if HAS_SHARED:
            leave_factor(logits_ptr, factors_ptr + token, COUNT)
        logits, expert, real = left_logits(logits_ptr, COUNT, GROUPS, ROWS, SIZE, COPIES)
        choose(logits, expert, real, correction_ptr, ids_ptr + token * PER_TOKEN, weights_ptr + token * PER_TOKEN,
               SCORES, RENORMALISE, HAS_CORRECTION, GROUPS, TOP_GROUPS, SCALE, EPSILON, PER_TOKEN, ROWS,
               SIZE)  # fmt: skip
