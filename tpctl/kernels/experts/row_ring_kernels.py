"""The device code of `row_ring`: rows of the chosen experts come through a ring in shared memory.

As in `linear.codes_ring` a thread reads back from the ring only what it asked for itself, so no warp waits for another
one until the last sums meet. Its inputs are in registers all the time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import (
    barrier,
    commit,
    from_lane,
    launch_dependents,
    shared_base,
    store_float,
    wait_for_all_but,
    wait_for_kernel_before,
)
from tpctl.kernels.experts.gating import gated
from tpctl.kernels.experts.row_ring_choice_kernels import chosen_ids, chosen_weights
from tpctl.kernels.experts.row_ring_rows_kernels import (
    ask_for_chunk,
    lane_sums,
    of_expert,
    own_chunks,
    row_of,
    row_sum,
    scale_column,
    scales_of,
    sum_of,
)
from tpctl.kernels.experts.row_ring_tiles_kernels import load_inputs, load_weighed


@gluon.jit
def _of_unit(unit, ids, first, count, CUT: gl.constexpr):
    """Feature and expert of one of gate_up's results, and whether the expert is here."""
    slot = gl.minimum(unit // CUT.width, CUT.per_token - 1)
    expert = from_lane(ids, slot) - first
    here = (expert >= 0) & (expert < count)
    return unit - slot * CUT.width, gl.where(here, expert, 0), here


@gluon.jit
def _ask_for_half(at, scale_at, w_ptr, scales_ptr, row, rank, go, real, CUT: gl.constexpr):
    """A team's chunks of an expert's row, with a group of copies of their own; rank: a thread's in its team."""
    w_ptr += row * (CUT.row_chunks * 16) + rank * 16
    scales_ptr = scales_of(scales_ptr, row, CUT) + scale_column(rank, CUT)
    CHUNKS: gl.constexpr = CUT.chunks
    for j in gl.static_range(CHUNKS):
        here = go if j < CUT.full else go & real[j]
        ask_for_chunk(at + j * (CUT.team * 16), scale_at + j * (CUT.team * 4), w_ptr + j * (CUT.team * 16),
                      scales_ptr + scale_column(j * CUT.team, CUT), here.to(gl.int32), CUT)  # fmt: skip
    commit(rank)


@gluon.jit
def _biases(bias_ptr, thread, start, mine, ids, first, count, HALF: gl.constexpr, CUT: gl.constexpr):
    found = ()
    RESULTS: gl.constexpr = CUT.results
    for i in gl.static_range(RESULTS):
        unit = thread + i * CUT.threads
        n, expert, here = _of_unit(start + unit, ids, first, count, CUT)
        place = expert.to(gl.int64) * CUT.outputs + row_of(n, HALF, CUT)
        found += (gl.load(bias_ptr + place, mask=here & (unit < mine), other=0.0).to(gl.float32),)  # type: ignore[assignment]
    return found


@gluon.jit(do_not_specialize=["first", "count"])
def row_ring_gate_up_kernel(
    logits_ptr,  # float32, of all experts
    correction_ptr,
    x_ptr,  # [inputs / 2], words of two bfloat16 numbers, in pieces
    w_ptr,  # bytes
    scales_ptr,  # bytes
    bias_ptr,
    h_ptr,  # [K * width], in pieces of H_PIECE numbers, as down's chunks of H_SIZE inputs are read
    first,
    count,
    CUT: gl.constexpr,
    CHOICE: gl.constexpr,
    GATING: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    H_SIZE: gl.constexpr,
    H_PIECE: gl.constexpr,
    PDL: gl.constexpr,
):
    """h of all chosen experts; a program has neighbouring features, gates and ups. Of an expert that is another rank's,
    h is noise."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [CUT.warps], [0])
    whole = gl.allocate_shared_memory(gl.int32, [CUT.bytes // 256, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    whole.index(CUT.bytes // 256 - 1).store(gl.zeros([64], gl.int32, ONE))  # else it would not be there
    pid = gl.program_id(0)
    thread = gl.arange(0, CUT.threads, layout=ONE)
    lane = thread % 32
    team = thread // CUT.team
    rank = thread % CUT.team
    base = shared_base(thread * 0)
    slot_at = base + team * (CUT.ahead * CUT.row_bytes) + rank * 16
    scale_at = base + CUT.scales + team * (CUT.ahead * CUT.row_bytes // 4) + rank * 4
    start = pid * CUT.units // CUT.programs
    mine = (pid + 1) * CUT.units // CUT.programs - start
    chunks, real = own_chunks(rank, CUT)
    if PDL:  # in this order: what starts now may read what the launch before has left
        wait_for_kernel_before(thread)
        launch_dependents(thread)
    ids = chosen_ids(logits_ptr, correction_ptr, lane, CHOICE)
    UNITS: gl.constexpr = CUT.step_units
    TURNS: gl.constexpr = CUT.turns
    for turn in gl.static_range(TURNS):
        for i in gl.static_range(UNITS):
            unit = (turn * CUT.teams + team) * UNITS + i
            n, expert, here = _of_unit(start + unit, ids, first, count, CUT)
            w, scales = of_expert(w_ptr, scales_ptr, expert, CUT)
            for half in gl.static_range(2):
                at = ((turn * UNITS + i) * 2 + half) * CUT.row_bytes
                _ask_for_half(slot_at + at, scale_at + at // 4, w, scales, row_of(n, half, CUT), rank,
                              here & (unit < mine), real, CUT)  # fmt: skip
    inputs, factors = (), ()
    CHUNKS: gl.constexpr = CUT.chunks
    for i in gl.static_range(CHUNKS):
        x, factor = load_inputs(x_ptr, chunks[i], CUT)
        inputs += (x,)  # type: ignore[assignment]
        factors += (factor,)  # type: ignore[assignment]
    biases, up_biases = (), ()
    if HAS_BIAS:
        biases = _biases(bias_ptr, thread, start, mine, ids, first, count, 0, CUT)
        up_biases = _biases(bias_ptr, thread, start, mine, ids, first, count, 1, CUT)

    partial = base + CUT.partial
    steps = (mine + UNITS * CUT.teams - 1) // (UNITS * CUT.teams)
    turn = 0
    for step in range(steps):
        block = step * CUT.teams + team
        row_at = slot_at + turn * (2 * UNITS * CUT.row_bytes)
        row_scale_at = scale_at + turn * (UNITS * CUT.row_bytes // 2)
        totals = ()
        for i in gl.static_range(UNITS):
            unit = start + block * UNITS + i
            n = unit - gl.minimum(unit // CUT.width, CUT.per_token - 1) * CUT.width
            ahead = (block + CUT.turns * CUT.teams) * UNITS + i
            next_n, expert, here = _of_unit(start + ahead, ids, first, count, CUT)
            w, scales = of_expert(w_ptr, scales_ptr, expert, CUT)
            for half in gl.static_range(2):
                to = row_at + (2 * i + half) * CUT.row_bytes
                scale_to = row_scale_at + (2 * i + half) * (CUT.row_bytes // 4)
                wait_for_all_but(thread, CUT.ahead - 1)
                totals += (row_sum(to, scale_to, inputs, factors, row_of(n, half, CUT), chunks, real, CUT),)  # type: ignore[assignment]
                _ask_for_half(to, scale_to, w, scales, row_of(next_n, half, CUT), rank, here & (ahead < mine), real,
                              CUT)  # fmt: skip
        row = block * CUT.step + lane // (32 // CUT.step)
        store_float(partial + (row * CUT.share + rank // 32) * 4, lane_sums(totals, lane, CUT))
        turn = turn + 1
        turn = gl.where(turn == CUT.turns, 0, turn) if CUT.turns > 1 else 0
    barrier()

    RESULTS: gl.constexpr = CUT.results
    for i in gl.static_range(RESULTS):
        unit = thread + i * CUT.threads
        row = 2 * gl.minimum(unit, CUT.most - 1)
        gate, up = sum_of(partial, row, CUT), sum_of(partial, row + 1, CUT)
        if HAS_BIAS:
            gate += biases[i]
            up += up_biases[i]
        chunk, within = (start + unit) // H_SIZE, (start + unit) % H_SIZE
        place = (within // H_PIECE * (CUT.units // H_SIZE) + chunk) * H_PIECE + within % H_PIECE
        gl.store(h_ptr + place, gated(gate, up, GATING).to(h_ptr.dtype.element_ty), mask=unit < mine)
    whole._keep_alive()


@gluon.jit
def _ask_for_row(at, scale_at, w_ptrs, scales_ptrs, row, own, there, CUT: gl.constexpr):
    """A team's chunks of a row of all experts, with a group of copies of their own."""
    CHUNKS: gl.constexpr = CUT.chunks
    for j in gl.static_range(CHUNKS):
        here = there if j < CUT.full else there & own[j]
        ask_for_chunk(at + j * (CUT.team * 16), scale_at + j * (CUT.team * 4), w_ptrs[j] + row * (CUT.row_chunks * 16),
                      scales_of(scales_ptrs[j], row, CUT), here.to(gl.int32), CUT)  # fmt: skip
    commit(at)


@gluon.jit
def _weighed_biases(bias_ptr, thread, start, mine, ids, weights, first, count, CUT: gl.constexpr):
    """Those of all experts, in one sum."""
    found = ()
    RESULTS: gl.constexpr = CUT.results
    SLOTS: gl.constexpr = CUT.per_token
    for i in gl.static_range(RESULTS):
        unit = thread + i * CUT.threads
        value = thread * 0.0
        for slot in gl.static_range(SLOTS):
            expert = from_lane(ids, thread * 0 + slot) - first
            weight = from_lane(weights.to(gl.int32, bitcast=True), thread * 0 + slot).to(gl.float32, bitcast=True)
            here = (expert >= 0) & (expert < count)
            place = gl.where(here, expert, 0).to(gl.int64) * CUT.outputs + start + unit
            value += weight * gl.load(bias_ptr + place, mask=here & (unit < mine), other=0.0).to(gl.float32)
        found += (value,)  # type: ignore[assignment]
    return found


@gluon.jit(do_not_specialize=["first", "count"])
def row_ring_down_kernel(
    logits_ptr,  # float32, of all experts: those of the launch before the last one
    correction_ptr,
    h_ptr,  # of all experts, in pieces, as words
    w_ptr,  # bytes
    scales_ptr,  # bytes
    bias_ptr,
    residual_ptr,
    out_ptr,
    first,
    count,
    CUT: gl.constexpr,
    CHOICE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    PDL: gl.constexpr,
):
    """All of the token's experts, weighed; a program has neighbouring outputs. It chooses, and asks for as many rows as
    the ring holds, before it waits for h: what chose the experts had ended before the launch before let this one start.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [CUT.warps], [0])
    whole = gl.allocate_shared_memory(gl.int32, [CUT.bytes // 256, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    whole.index(CUT.bytes // 256 - 1).store(gl.zeros([64], gl.int32, ONE))  # else it would not be there
    pid = gl.program_id(0)
    thread = gl.arange(0, CUT.threads, layout=ONE)
    lane = thread % 32
    team = thread // CUT.team
    rank = thread % CUT.team
    base = shared_base(thread * 0)
    slot_at = base + team * (CUT.ahead * CUT.row_bytes) + rank * 16
    scale_at = base + CUT.scales + team * (CUT.ahead * CUT.row_bytes // 4) + rank * 4
    start = pid * CUT.units // CUT.programs
    mine = (pid + 1) * CUT.units // CUT.programs - start
    chunks, real = own_chunks(rank, CUT)
    ids = chosen_ids(logits_ptr, correction_ptr, lane, CHOICE)
    w_ptrs, scales_ptrs, columns, own = (), (), (), ()
    CHUNKS: gl.constexpr = CUT.chunks
    for i in gl.static_range(CHUNKS):
        expert = from_lane(ids, chunks[i] // CUT.row_chunks) - first
        column = chunks[i] % CUT.row_chunks
        here = (expert >= 0) & (expert < count)
        w, scales = of_expert(w_ptr, scales_ptr, gl.where(here, expert, 0), CUT)
        w_ptrs += (w + column * 16,)  # type: ignore[assignment]
        scales_ptrs += (scales + scale_column(column, CUT),)  # type: ignore[assignment]
        columns += (column,)  # type: ignore[assignment]
        own += (here & real[i],)  # type: ignore[assignment]
    STEP: gl.constexpr = CUT.step_units
    TURNS: gl.constexpr = CUT.turns
    for turn in gl.static_range(TURNS):
        for i in gl.static_range(STEP):
            unit = (turn * CUT.teams + team) * STEP + i
            at = (turn * STEP + i) * CUT.row_bytes
            _ask_for_row(slot_at + at, scale_at + at // 4, w_ptrs, scales_ptrs, start + unit, own, unit < mine, CUT)
    weights = chosen_weights(logits_ptr, ids, lane, CHOICE)
    added = ()
    if HAS_BIAS:
        added = _weighed_biases(bias_ptr, thread, start, mine, ids, weights, first, count, CUT)
    if PDL:
        launch_dependents(thread)
        wait_for_kernel_before(thread)
    inputs, factors = (), ()
    for i in gl.static_range(CHUNKS):
        weight = from_lane(weights.to(gl.int32, bitcast=True), chunks[i] // CUT.row_chunks)
        x, factor = load_weighed(h_ptr, chunks[i], weight.to(gl.float32, bitcast=True), CUT)
        inputs += (x,)  # type: ignore[assignment]
        factors += (factor,)  # type: ignore[assignment]
    residuals = ()
    RESULTS: gl.constexpr = CUT.results
    if HAS_RESIDUAL:
        for i in gl.static_range(RESULTS):
            unit = thread + i * CUT.threads
            value = gl.load(residual_ptr + start + unit, mask=unit < mine, other=0.0).to(gl.float32)
            residuals += (value,)  # type: ignore[assignment]

    partial = base + CUT.partial
    steps = (mine + STEP * CUT.teams - 1) // (STEP * CUT.teams)
    turn = 0
    for step in range(steps):
        block = step * CUT.teams + team
        totals = ()
        for i in gl.static_range(STEP):
            unit = block * STEP + i
            ahead = unit + CUT.turns * CUT.teams * STEP
            to = slot_at + turn * (STEP * CUT.row_bytes) + i * CUT.row_bytes
            scale_to = scale_at + turn * (STEP * CUT.row_bytes // 4) + i * (CUT.row_bytes // 4)
            wait_for_all_but(thread, CUT.ahead - 1)
            totals += (row_sum(to, scale_to, inputs, factors, start + unit, columns, own, CUT),)  # type: ignore[assignment]
            _ask_for_row(to, scale_to, w_ptrs, scales_ptrs, start + ahead, own, ahead < mine, CUT)
        row = block * STEP + lane // (32 // STEP)
        store_float(partial + (row * CUT.share + rank // 32) * 4, lane_sums(totals, lane, CUT))
        turn = turn + 1
        turn = gl.where(turn == CUT.turns, 0, turn) if CUT.turns > 1 else 0
    barrier()

    for i in gl.static_range(RESULTS):
        unit = thread + i * CUT.threads
        value = sum_of(partial, gl.minimum(unit, CUT.most - 1), CUT)
        if HAS_BIAS:
            value += added[i]
        if HAS_RESIDUAL:
            value += residuals[i]
        gl.store(out_ptr + start + unit, value.to(out_ptr.dtype.element_ty), mask=unit < mine)
    whole._keep_alive()
