"""One token of each of many sequences, in one launch: convolution, gates, the delta rule and the gated norm.

A program has one value head of one sequence, so its matrix is read once and written once. It is on its way before the
kernel waits for the projection: no other kernel of a step touches it.

Where drafts are computed a sequence may have several rows, a run: a program then takes one after the other, with the
matrix in registers, and leaves the state behind each in a slot of its own. None is the slot that the run goes on from,
which programs of other heads may still read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import ANYWHERE, launch_options, next_power_of_2
from tpctl.kernels.delta_net.convolution import keep_in_run, keep_input, past, past_in_run
from tpctl.kernels.delta_net.inputs import (
    NetShape,
    NetState,
    NetWeights,
    Projected,
    constants,
    head_gates,
    silu_rounded,
)

MOST_STATE = 1 << 15
"""Numbers of a head's matrix that a program's registers hold at most, each dimension a power of two."""


REGISTERS = 128
"""Of a thread, so that two programs of eight warps are on a multiprocessor."""

COUNTED_PROGRAMS = 288
"""Where rows are counted on the device, about what runs at once: more would mostly find nothing to do."""


class StepRows(NamedTuple):
    """Where each row of a step has its state, int32 [S]: the slot that it goes on from (-1: it begins), that it is left
    in (-1: the row is none, and gets zeros) and one that it is copied to (-1: none). ``lens``: tokens of the sequence,
    the row's own included. In a run a row goes on from the one before: its ``reads`` is -1 - n, of n rows of the run
    that are to come, itself included."""

    reads: torch.Tensor
    writes: torch.Tensor
    copies: torch.Tensor
    lens: torch.Tensor


@triton.jit
def _channels(head, KEYS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """The convolution's of a value head: of its query and key [2, D], and which there are; of its values [E], too.

    Query and key are one tile: as two, smaller than a program has threads, Triton has each thread compute all that it
    multiplies its part of the state by.
    """
    of = tl.arange(0, 2)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_E)
    of_keys = (of * KEYS + head // GROUP) * KEY_DIM + d
    return of_keys, (d < KEY_DIM) & (of >= 0), 2 * KEYS * KEY_DIM + head * VALUE_DIM + e, e < VALUE_DIM


@triton.jit
def _add_2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _state_at(head, KEYS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Where a head's matrix lies in a slot, [D, E], and which of that there is."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = (d < KEY_DIM)[:, None] & (e < VALUE_DIM)[None, :]
    return head.to(tl.int64) * (KEY_DIM * VALUE_DIM) + d[:, None] * VALUE_DIM + e[None, :], inside


@triton.jit
def _move_on(
    state,  # the head's matrix, [D, E]
    head,
    row,
    write,
    copy,
    qk_past,  # what `past` gives
    qk_tap,
    v_past,
    v_tap,
    dt_bias,
    a_log,
    weight,  # of the norm
    q_ptr,
    v_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    matrices_ptr,
    out_ptr,
    qkv_stride,
    z_stride,
    gate_stride,
    qk_step,
    key_step,
    v_step,
    z_step,
    gate_step,
    eps,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One head of one row: what it gives is stored, and its state. That, and what came in of query, key and values.

    The next kernel waits for all of it, so little may depend on what comes before: all is loaded at once, sums of the
    state's products are taken with q and k as they are, beside those of their lengths, and what is kept is stored last.
    """
    key = head // GROUP
    member = head % GROUP
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    of = tl.arange(0, 2)
    dtype = out_ptr.dtype.element_ty
    SLOT: tl.constexpr = KEYS * GROUP * KEY_DIM * VALUE_DIM
    in_d = (d < KEY_DIM)[None, :] & (of >= 0)[:, None]
    in_e = e < VALUE_DIM
    qk_at = q_ptr + row * qkv_stride + key * key_step + of[:, None] * qk_step + d[None, :]
    qk_in = tl.load(qk_at, mask=in_d, other=0.0)
    v_in = tl.load(v_ptr + row * qkv_stride + key * v_step + member * VALUE_DIM + e, mask=in_e, other=0.0)
    z = tl.load(z_ptr + row * z_stride + key * z_step + member * VALUE_DIM + e, mask=in_e, other=0.0).to(tl.float32)
    gate_at = row * gate_stride + key * gate_step + member
    a = tl.load(a_ptr + gate_at).to(tl.float32)
    b = tl.load(b_ptr + gate_at)

    qk = silu_rounded(qk_past + qk_in.to(tl.float32) * qk_tap, dtype)
    q, k = tl.split(tl.trans(qk))
    q_length, k_length, qk_product = tl.reduce((q * q, k * k, q * k), 0, _add_3)
    known, queried = tl.reduce((state * k[:, None], state * q[:, None]), 0, _add_2)
    v = silu_rounded(v_past + v_in.to(tl.float32) * v_tap, dtype)
    g, beta = head_gates(a, b, dt_bias, a_log)
    decay = tl.exp(g)
    k_scale = tl.rsqrt(k_length + 1e-6)
    q_scale = tl.rsqrt(q_length + 1e-6) * (1.0 / tl.sqrt(KEY_DIM * 1.0))
    new = beta * (v - known * (decay * k_scale)) * k_scale
    queried = (queried * decay + qk_product * new) * q_scale
    x = queried.to(dtype).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / VALUE_DIM + eps)).to(dtype).to(tl.float32)
    x = (x * weight.to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out_ptr + (row * (KEYS * GROUP) + head) * VALUE_DIM + e, (x * (z / (1.0 + tl.exp(-z)))).to(dtype),
             mask=in_e)  # fmt: skip
    state = state * decay + k[:, None] * new[None, :]
    place, inside = _state_at(head, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_E)
    tl.store(matrices_ptr + write * SLOT + place, state, mask=inside)
    if copy >= 0:
        tl.store(matrices_ptr + copy * SLOT + place, state, mask=inside)
    return state, qk_in, v_in


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def step_kernel(
    q_ptr,
    v_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    taps_ptr,
    dt_bias_ptr,
    a_log_ptr,
    norm_ptr,
    matrices_ptr,
    inputs_ptr,
    out_ptr,
    reads_ptr,
    writes_ptr,
    copies_ptr,
    lens_ptr,
    count_ptr,
    qkv_stride,
    z_stride,
    gate_stride,
    qk_step,
    key_step,
    v_step,
    z_step,
    gate_step,
    eps,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COUNTED: tl.constexpr,
    RUNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program a head and row, or run; or, where rows are counted on the device, all rows that a program comes by."""
    head = tl.program_id(0)
    own_keys = head % GROUP == 0  # of a key head's channels one of its value heads moves the state on
    place, inside = _state_at(head, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_E)
    SLOT: tl.constexpr = KEYS * GROUP * KEY_DIM * VALUE_DIM
    CHANNELS: tl.constexpr = 2 * KEYS * KEY_DIM + KEYS * GROUP * VALUE_DIM
    of_keys, in_d, of_values, in_e = _channels(head, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_E)
    dt_bias = tl.load(dt_bias_ptr + head)
    a_log = tl.load(a_log_ptr + head)
    weight = tl.load(norm_ptr + tl.arange(0, BLOCK_E), mask=in_e, other=0.0)
    if COUNTED:
        for at in tl.range(tl.program_id(1), tl.load(count_ptr), tl.num_programs(1), num_stages=1):
            row = tl.full([], 0, tl.int64) + at  # in the interpreter `at` is a plain int
            read = tl.load(reads_ptr + row).to(tl.int64)
            write = tl.load(writes_ptr + row).to(tl.int64)
            copy = tl.load(copies_ptr + row).to(tl.int64)
            position = tl.load(lens_ptr + row) - 1
            state = tl.load(matrices_ptr + read * SLOT + place, mask=inside & (read >= 0), other=0.0)
            qk_past, qk_tap = past(taps_ptr, inputs_ptr, of_keys, in_d, position, read, CHANNELS, TAPS)
            v_past, v_tap = past(taps_ptr, inputs_ptr, of_values, in_e, position, read, CHANNELS, TAPS)
            state, qk_in, v_in = _move_on(
                state, head, row, write, copy, qk_past, qk_tap, v_past, v_tap, dt_bias, a_log, weight, q_ptr, v_ptr,
                z_ptr, b_ptr, a_ptr, matrices_ptr, out_ptr, qkv_stride, z_stride, gate_stride, qk_step, key_step,
                v_step, z_step, gate_step, eps, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_E)  # fmt: skip
            keep_input(qk_in, inputs_ptr, of_keys, in_d & own_keys, position, read, write, copy, CHANNELS, TAPS)
            keep_input(v_in, inputs_ptr, of_values, in_e, position, read, write, copy, CHANNELS, TAPS)
    else:
        row = tl.program_id(1).to(tl.int64)
        read = tl.load(reads_ptr + row).to(tl.int64)
        write = tl.load(writes_ptr + row).to(tl.int64)
        copy = tl.load(copies_ptr + row).to(tl.int64)
        position = tl.load(lens_ptr + row) - 1
        state = tl.load(matrices_ptr + read * SLOT + place, mask=inside & (read >= 0) & (write >= 0), other=0.0)
        qk_past, qk_tap = past(taps_ptr, inputs_ptr, of_keys, in_d, position, read, CHANNELS, TAPS)
        v_past, v_tap = past(taps_ptr, inputs_ptr, of_values, in_e, position, read, CHANNELS, TAPS)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        if write < 0:
            e = tl.arange(0, BLOCK_E)
            nothing = tl.zeros([BLOCK_E], out_ptr.dtype.element_ty)
            tl.store(out_ptr + (row * (KEYS * GROUP) + head) * VALUE_DIM + e, nothing, mask=e < VALUE_DIM)
        elif read >= -1:
            state, qk_in, v_in = _move_on(
                state, head, row, write, copy, qk_past, qk_tap, v_past, v_tap, dt_bias, a_log, weight, q_ptr, v_ptr,
                z_ptr, b_ptr, a_ptr, matrices_ptr, out_ptr, qkv_stride, z_stride, gate_stride, qk_step, key_step,
                v_step, z_step, gate_step, eps, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_E)  # fmt: skip
            keep_input(qk_in, inputs_ptr, of_keys, in_d & own_keys, position, read, write, copy, CHANNELS, TAPS)
            keep_input(v_in, inputs_ptr, of_values, in_e, position, read, write, copy, CHANNELS, TAPS)
            if RUNS:
                behind = tl.load(reads_ptr + row + 1, mask=row + 1 < tl.num_programs(1), other=-1)
                of = tl.arange(0, 2)[:, None]
                d = tl.arange(0, BLOCK_D)[None, :]
                e = tl.arange(0, BLOCK_E)
                qk_first = q_ptr + head // GROUP * key_step + of * qk_step + d
                v_first = v_ptr + head // GROUP * v_step + head % GROUP * VALUE_DIM + e
                for at in tl.range(1, tl.maximum(-1 - behind, 0) + 1, num_stages=1):
                    row += 1
                    position += 1
                    write = tl.load(writes_ptr + row).to(tl.int64)
                    qk_at = qk_first + row * qkv_stride
                    v_at = v_first + row * qkv_stride
                    qk_past, qk_tap = past_in_run(taps_ptr, qk_at, qkv_stride, inputs_ptr, of_keys, in_d, position,
                                                   read, at, CHANNELS, TAPS)  # fmt: skip
                    v_past, v_tap = past_in_run(taps_ptr, v_at, qkv_stride, inputs_ptr, of_values, in_e, position,
                                                 read, at, CHANNELS, TAPS)  # fmt: skip
                    state, qk_in, v_in = _move_on(
                        state, head, row, write, -1, qk_past, qk_tap, v_past, v_tap, dt_bias, a_log, weight, q_ptr,
                        v_ptr, z_ptr, b_ptr, a_ptr, matrices_ptr, out_ptr, qkv_stride, z_stride, gate_stride, qk_step,
                        key_step, v_step, z_step, gate_step, eps, KEYS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_D,
                        BLOCK_E)  # fmt: skip
                    keep_in_run(qk_in, qk_at, qkv_stride, inputs_ptr, of_keys, in_d & own_keys, position, read, at,
                                 write, CHANNELS, TAPS)  # fmt: skip
                    keep_in_run(v_in, v_at, qkv_stride, inputs_ptr, of_values, in_e, position, read, at, write,
                                 CHANNELS, TAPS)  # fmt: skip


def warps(block_d: int, block_e: int) -> int:
    """Of a program: its state takes 64 registers, or 128."""
    return max(1, min(8, block_d * block_e // 2048))


def step(
    projected: Projected,
    weights: NetWeights,
    state: NetState,
    rows: StepRows,
    shape: NetShape,
    out: torch.Tensor,
    *,
    count_1: torch.Tensor | None = None,
    runs: bool = False,
    pdl: bool = False,
) -> None:
    """The tokens of S rows, each of a sequence of its own or behind the one before in a run, into ``out`` [S, N * E];
    states are moved on.

    count_1: int32 [1], how many of the rows there are, none of them a row that is none; the others are left alone.
    runs: whether there may be any.

    Raises:
        ValueError: a head's matrix is larger than ``MOST_STATE``; or rows that are counted are launched early, or in
            runs.
    """
    block_d, block_e = next_power_of_2(shape.key_dim), next_power_of_2(shape.value_dim)
    if block_d * block_e > MOST_STATE:
        raise ValueError(f"matrices of {block_d} x {block_e} exceed the {MOST_STATE} numbers of a program")
    if count_1 is not None and pdl:
        raise ValueError("rows that are counted on the device are launched behind what comes before them")
    if count_1 is not None and runs:
        raise ValueError("rows that are counted on the device are each of a sequence of its own")
    programs = len(out) if count_1 is None else min(len(out), triton.cdiv(COUNTED_PROGRAMS, shape.value_heads))
    if not programs:
        return
    step_kernel[(shape.value_heads, programs)](
        projected.q,
        projected.v,
        projected.z,
        projected.b,
        projected.a,
        weights.taps,
        weights.dt_bias,
        weights.a_log,
        weights.norm,
        *state,
        out,
        *rows,
        rows.lens if count_1 is None else count_1,
        *projected.strides,
        projected.qk_step,
        *projected.steps,
        weights.eps,
        **constants(shape),
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        COUNTED=count_1 is not None,
        RUNS=runs,
        PDL=pdl,
        num_warps=warps(block_d, block_e),
        maxnreg=REGISTERS,
        **launch_options(pdl),
    )
