"""Top-k, top-p and min-p as floors: the smallest logit of each row that may still be sampled, found without sorting.

A floor is the largest t for which the tokens of at least t weigh enough: number k of them where they are counted
(top-k), a share p of all probability where they are summed (top-p). It is found bit by bit: bits of a number in an
order-preserving code (`_code`), three at a time, from the highest. A launch weighs, in every part of the vocabulary,
what reaches each of eight thresholds; the next one adds the parts up, takes the highest threshold that is still
reached, and divides the step above it into eight again. Six launches find the floor of 16-bit logits exactly, eleven
that of float32, whatever the distribution looks like, and the host learns nothing of it, so that graphs can hold it.
A launch before finds the largest logit of every chunk: chunks that reach no threshold are not read again.

Tokens equal to the floor are all kept, as in `engine.sampling.filters`. Sums are taken in the same order every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.common.launch import launch_options, next_power_of_2, num_multiprocessors

_BITS = 3  # found by a launch
_WAYS = tl.constexpr(1 << _BITS)
_CHUNK = 1024  # values
_PROGRAMS = 8  # a multiprocessor, where there are so many chunks
_LANE = tl.constexpr(8)  # neighbouring values that are added up first, by one thread
MAX_TOP_K = 1 << 24
"""As far as tokens are counted: no vocabulary has so many."""
_CODE_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}


class Filters(NamedTuple):
    """What rows keep. temperature: float32 [R]; 0 keeps all. top_k: int32 [R]; 0 keeps all. top_p: float32 [R]; 1 keeps
    all. min_p: float32 [R]; 0 keeps all. Those of each row are applied in this order."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    @staticmethod
    def allocate(rows: int, device: torch.device) -> Filters:
        """For so many greedy rows."""
        temperature, top_p, min_p = torch.zeros(3, rows, dtype=torch.float32, device=device)
        return Filters(temperature, torch.zeros(rows, dtype=torch.int32, device=device), top_p + 1, min_p)

    def rows(self, which: slice | torch.Tensor) -> Filters:
        """Those of some rows."""
        return Filters(*(values[which] for values in self))


@triton.jit
def _code(value):
    """Integers, int32, in the order of the floats (a negative float's bits count backwards)."""
    if value.dtype.primitive_bitwidth == 16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        code = bits ^ ((bits >> 15) & 0x7FFF)
    else:
        bits = value.to(tl.int32, bitcast=True)
        code = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return code


@triton.jit
def _decoded(code, dtype: tl.constexpr):
    """The float32 value of a code; -inf for codes below every number's."""
    if dtype.primitive_bitwidth == 16:
        bits = code ^ ((code >> 15) & 0x7FFF)
        value = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        bits = code ^ ((code >> 31) & 0x7FFFFFFF)
        value = bits.to(tl.float32, bitcast=True)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _searched(temperature, top_k, top_p, SECOND: tl.constexpr):
    """Whether a row takes part. One with top-k and top-p is counted first, then summed."""
    if SECOND:
        filtered = (top_k > 0) & (top_p < 1.0)
    else:
        filtered = (top_k > 0) | (top_p < 1.0)
    return filtered & (temperature > 0.0)


@triton.jit
def _chunk(logits_ptr, row, chunk, rank_stride, row_stride, width, vocab_size, chunks_per_rank, CHUNK: tl.constexpr):
    """A chunk's values, and which of them are tokens and numbers."""
    rank = chunk // chunks_per_rank
    at = (chunk % chunks_per_rank) * CHUNK + tl.arange(0, CHUNK)
    most = tl.minimum(width, vocab_size - rank * width)  # of this rank's columns, those that are tokens
    base = logits_ptr + rank.to(tl.int64) * rank_stride + row * row_stride
    value = tl.load(base + at, mask=at < most, other=float("-inf"))
    number = value.to(tl.float32)
    return value, (at < most) & (number == number)


@triton.jit
def _largest_kernel(
    logits_ptr,  # [ranks, rows, width]
    temperature_ptr,
    maxima_ptr,  # [rows, chunks], the logits' dtype: of each chunk
    rank_stride,
    row_stride,
    width,
    vocab_size,
    chunks_per_rank,
    num_chunks,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tl.load(temperature_ptr + row) > 0.0:
        value, live = _chunk(logits_ptr, row, chunk, rank_stride, row_stride, width, vocab_size, chunks_per_rank, CHUNK)
        largest = tl.max(tl.where(live, value.to(tl.float32), float("-inf")), 0)
        tl.store(maxima_ptr + row * num_chunks + chunk, largest.to(value.dtype))


@triton.jit
def _step_up(weights_ptr, low, target, row, num_parts, top_k, top_p, by_mass, shift, first, PARTS: tl.constexpr):
    """Where the search goes on after the weights of a launch: the new low end, and what must be reached."""
    part = tl.arange(0, PARTS)
    way = tl.arange(0, _WAYS)
    at = (row * num_parts + part)[:, None] * _WAYS + way[None, :]
    weight = tl.sum(tl.load(weights_ptr + at, mask=(part < num_parts)[:, None], other=0.0), 0)
    if first:
        everything = tl.sum(tl.where(way == 0, weight, 0.0), 0)
        target = tl.where(by_mass, top_p * everything, top_k.to(tl.float32))
    highest = tl.max(tl.where(weight >= target, way, 0), 0)
    return low + (highest << shift), target


@triton.jit
def _added(code, threshold, weight, CHUNK: tl.constexpr):
    """Weights of what reaches a threshold, a thread's neighbours together: [CHUNK / _LANE]."""
    return tl.sum(tl.reshape(tl.where(code >= threshold, weight, 0.0), [CHUNK // _LANE, _LANE]), 1)


@triton.jit(do_not_specialize=["rows", "launch", "shift", "last_shift"])
def _weigh_kernel(
    logits_ptr,  # [ranks, rows, width]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,  # [rows, chunks]
    weights_ptr,  # float32 [2, rows, parts, ways]: written and read in turns
    lows_ptr,  # int32 [launches, rows]
    targets_ptr,  # float32 [rows]
    counted_ptr,  # int32 [rows]: codes that the search before has found
    rank_stride,
    row_stride,
    width,
    vocab_size,
    rows,
    chunks_per_rank,
    num_chunks,
    num_parts,
    launch,  # of this search
    shift,  # bits below those that this launch finds
    last_shift,  # and the one before
    LOWEST: tl.constexpr,
    SECOND: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if _searched(temperature, top_k, top_p, SECOND):
        by_mass = (top_k <= 0) | SECOND
        half = rows.to(tl.int64) * num_parts * _WAYS
        low = tl.full([], LOWEST, tl.int32)
        lowest = low
        if SECOND:
            lowest = tl.load(counted_ptr + row)  # nothing below counts any more
        if launch > 0:
            last = weights_ptr + ((launch - 1) % 2) * half
            low = tl.load(lows_ptr + (launch - 1) * rows + row)
            target = tl.load(targets_ptr + row, mask=launch > 1, other=0.0)
            low, target = _step_up(
                last, low, target, row, num_parts, top_k, top_p, by_mass, last_shift, launch == 1, PARTS
            )
            tl.store(targets_ptr + row, target, mask=(part == 0) & (launch == 1))
        tl.store(lows_ptr + launch * rows + row, low, mask=part == 0)
        step = tl.full([], 1, tl.int32) << shift
        needed = tl.maximum(tl.where(launch == 0, low, low + step), lowest)  # what a chunk must reach to be read

        chunks = tl.arange(0, CHUNKS)
        all_maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
        top = tl.max(all_maxima.to(tl.float32), 0)
        inverse = 1.0 / temperature
        w0 = tl.zeros([CHUNK // _LANE], tl.float32)
        w1 = tl.zeros([CHUNK // _LANE], tl.float32)
        w2 = tl.zeros([CHUNK // _LANE], tl.float32)
        w3 = tl.zeros([CHUNK // _LANE], tl.float32)
        w4 = tl.zeros([CHUNK // _LANE], tl.float32)
        w5 = tl.zeros([CHUNK // _LANE], tl.float32)
        w6 = tl.zeros([CHUNK // _LANE], tl.float32)
        w7 = tl.zeros([CHUNK // _LANE], tl.float32)
        for chunk in range(part, num_chunks, num_parts):
            if _code(tl.load(maxima_ptr + row * num_chunks + chunk)) >= needed:
                value, live = _chunk(
                    logits_ptr, row, chunk, rank_stride, row_stride, width, vocab_size, chunks_per_rank, CHUNK
                )
                code = _code(value)
                weight = tl.full([CHUNK], 1.0, tl.float32)
                if by_mass:
                    weight = tl.exp((value.to(tl.float32) - top) * inverse)
                    weight = tl.where(weight == weight, weight, 0.0)  # -inf less -inf
                weight = tl.where(live & (code >= lowest), weight, 0.0)
                w0 += _added(code, low, weight, CHUNK)
                w1 += _added(code, low + step, weight, CHUNK)
                w2 += _added(code, low + 2 * step, weight, CHUNK)
                w3 += _added(code, low + 3 * step, weight, CHUNK)
                w4 += _added(code, low + 4 * step, weight, CHUNK)
                w5 += _added(code, low + 5 * step, weight, CHUNK)
                w6 += _added(code, low + 6 * step, weight, CHUNK)
                w7 += _added(code, low + 7 * step, weight, CHUNK)
        out = weights_ptr + (launch % 2) * half + (row * num_parts + part) * _WAYS
        tl.store(out, tl.sum(w0, 0))
        tl.store(out + 1, tl.sum(w1, 0))
        tl.store(out + 2, tl.sum(w2, 0))
        tl.store(out + 3, tl.sum(w3, 0))
        tl.store(out + 4, tl.sum(w4, 0))
        tl.store(out + 5, tl.sum(w5, 0))
        tl.store(out + 6, tl.sum(w6, 0))
        tl.store(out + 7, tl.sum(w7, 0))


@triton.jit(do_not_specialize=["rows"])
def _found_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    weights_ptr,
    lows_ptr,
    targets_ptr,
    counted_ptr,
    floors_ptr,
    rows,
    num_chunks,
    num_parts,
    LAUNCHES: tl.constexpr,
    LOWEST: tl.constexpr,
    SECOND: tl.constexpr,
    LAST: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The end of a search: its floor as a code in `counted`, and after the last one all of them as values."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    low = tl.full([], LOWEST, tl.int32)
    if SECOND:
        low = tl.load(counted_ptr + row)
    if _searched(temperature, top_k, top_p, SECOND):
        low, _ = _step_up(
            weights_ptr + ((LAUNCHES - 1) % 2) * rows.to(tl.int64) * num_parts * _WAYS,
            tl.load(lows_ptr + (LAUNCHES - 1) * rows + row),
            tl.load(targets_ptr + row),
            row,
            num_parts,
            top_k,
            top_p,
            (top_k <= 0) | SECOND,
            0,
            False,
            PARTS,
        )
    tl.store(counted_ptr + row, low)
    if LAST:
        floor = _decoded(low, maxima_ptr.dtype.element_ty)
        min_p = tl.load(min_p_ptr + row)
        if (min_p > 0.0) & (temperature > 0.0):
            chunks = tl.arange(0, CHUNKS)
            maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
            floor = tl.maximum(floor, tl.max(maxima.to(tl.float32), 0) + temperature * tl.log(min_p))
        tl.store(floors_ptr + row, floor)


def sampling_floors(
    logits_WRV: torch.Tensor, filters: Filters, *, vocab_size: int, both: bool, pdl: bool = False
) -> torch.Tensor:
    """The smallest logit of each row that may be sampled, float32 [R]; -inf where nothing is filtered.

    logits_WRV: [W, R, V] in bfloat16, float16 or float32, columns contiguous: W ranks' slices of the vocabulary, one
    after the other. vocab_size: how many of all W * V columns are tokens. both: whether any row has top-k and top-p,
    which takes a second search.
    """
    ranks, rows, width = logits_WRV.shape
    bits = _CODE_BITS[logits_WRV.dtype]
    launches, lowest = triton.cdiv(bits, _BITS), -1 << (bits - 1)
    chunks_per_rank = triton.cdiv(width, _CHUNK)
    num_chunks = ranks * chunks_per_rank
    device = logits_WRV.device
    # Programs a row, each of several chunks: enough to fill the device, and no more.
    num_parts = min(num_chunks, max(1, _PROGRAMS * num_multiprocessors(device) // rows))
    maxima = torch.empty(rows, num_chunks, dtype=logits_WRV.dtype, device=device)
    weights = torch.empty(2, rows, num_parts, 1 << _BITS, dtype=torch.float32, device=device)
    lows = torch.empty(launches, rows, dtype=torch.int32, device=device)
    targets = torch.empty(rows, dtype=torch.float32, device=device)
    counted = torch.empty(rows, dtype=torch.int32, device=device)
    floors_R = torch.empty(rows, dtype=torch.float32, device=device)
    where = (logits_WRV.stride(0), logits_WRV.stride(1), width, vocab_size)
    options = {"num_warps": 4, **launch_options(pdl)}
    _largest_kernel[(num_chunks, rows)](
        logits_WRV, filters.temperature, maxima, *where, chunks_per_rank, num_chunks, CHUNK=_CHUNK, PDL=pdl, **options
    )
    for second in (False, True) if both else (False,):
        flags = {"LOWEST": lowest, "SECOND": second, "PDL": pdl}
        flags |= {"CHUNKS": next_power_of_2(num_chunks), "PARTS": next_power_of_2(num_parts)}
        for launch in range(launches):
            _weigh_kernel[(num_parts, rows)](
                logits_WRV,
                *filters,
                maxima,
                weights,
                lows,
                targets,
                counted,
                *where,
                rows,
                chunks_per_rank,
                num_chunks,
                num_parts,
                launch,
                max(0, bits - _BITS * (launch + 1)),
                bits - _BITS * launch,
                CHUNK=_CHUNK,
                **flags,
                **options,
            )
        _found_kernel[(rows,)](
            *filters,
            maxima,
            weights,
            lows,
            targets,
            counted,
            floors_R,
            rows,
            num_chunks,
            num_parts,
            LAUNCHES=launches,
            LAST=second or not both,
            **flags,
            **options,
        )
    return floors_R


def sampling_floors_reference(logits_WRV: torch.Tensor, filters: Filters, *, vocab_size: int) -> torch.Tensor:
    """The same in plain torch, row by row, by sorting."""
    whole_RV = torch.cat(list(logits_WRV), dim=1)[:, :vocab_size].float()
    floors = torch.full((len(whole_RV),), float("-inf"), device=whole_RV.device)
    for row, (logits, temperature, top_k, top_p, min_p) in enumerate(zip(whole_RV, *filters, strict=True)):
        if temperature == 0:
            continue
        kept = logits.sort(descending=True).values
        if top_k > 0:
            kept = kept[: int(top_k)]
            if int(top_k) <= len(logits):
                floors[row] = kept[-1]
        if top_p < 1:
            mass = torch.cumsum((kept.double() / temperature.double()).softmax(0), 0)
            floors[row] = kept[int((mass < top_p.double()).sum().clamp(max=len(kept) - 1))]
        if min_p > 0:
            floors[row] = torch.maximum(floors[row], logits.max() + temperature * torch.log(min_p))
    return floors
