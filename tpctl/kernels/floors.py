"""Top-k, top-p and min-p as floors: the smallest logit of each row that may still be sampled, found without sorting.

A floor is the largest t for which the tokens of at least t weigh enough: number k of them where they are counted
(top-k), a share p of all probability where they are summed (top-p). It is found bit by bit: bits of a number in an
order-preserving code (`_code`), three at a time, from the highest. A launch weighs, in every block of the vocabulary,
what reaches each of eight thresholds; the next one adds the blocks up, takes the highest threshold that is still
reached, and divides the step above it into eight again. Six launches find the floor of 16-bit logits exactly, eleven
that of float32, whatever the distribution looks like, and the host learns nothing of it, so that graphs can hold it.
A block that holds nothing as high as a threshold is done with at once.

Tokens equal to the floor are all kept, as in `engine.filters`. Sums are taken in the same order every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpctl.kernels.launch import launch_options, next_power_of_2

_BITS = 3  # found by a launch
_WAYS = tl.constexpr(1 << _BITS)
_FEW_ROWS = 8  # up to which small blocks busy more of the device
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
def _searched(temperature, top_k, top_p, min_p, SECOND: tl.constexpr):
    """Whether a row takes part. One with top-k and top-p is counted first, then summed; min-p wants its maximum."""
    if SECOND:
        filtered = (top_k > 0) & (top_p < 1.0)
    else:
        filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    return filtered & (temperature > 0.0)


@triton.jit
def _step_up(
    weights_ptr,
    maxima_ptr,
    low,
    target,
    row,
    num_blocks,
    top_k,
    top_p,
    inverse,
    by_mass,
    shift,
    first,
    BLOCKS: tl.constexpr,
):
    """Where the search goes on after the weights of a launch: the new low end, and what must be reached."""
    block = tl.arange(0, BLOCKS)
    way = tl.arange(0, _WAYS)
    held = block < num_blocks
    at = row * num_blocks + block
    weight = tl.load(weights_ptr + at[:, None] * _WAYS + way[None, :], mask=held[:, None], other=0.0)
    if by_mass:
        # Each block has weighed relative to its own largest logit.
        largest = tl.load(maxima_ptr + at, mask=held, other=float("-inf"))
        top = tl.max(largest, 0)
        scale = tl.where(largest > float("-inf"), tl.exp((largest - top) * inverse), 0.0)
        weight *= scale[:, None]
    weight = tl.sum(weight, 0)
    if first:
        everything = tl.sum(tl.where(way == 0, weight, 0.0), 0)
        target = tl.where(by_mass, top_p * everything, top_k.to(tl.float32))
    highest = tl.max(tl.where(weight >= target, way, 0), 0)
    return low + (highest << shift), target


@triton.jit(do_not_specialize=["rows", "launch", "shift", "last_shift"])
def _weigh_kernel(
    logits_ptr,  # [ranks, rows, width]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    weights_ptr,  # float32 [2, rows, blocks, ways]: written and read in turns
    maxima_ptr,  # float32 [rows, blocks]: of what is weighed
    lows_ptr,  # int32 [launches, rows]
    targets_ptr,  # float32 [rows]
    counted_ptr,  # int32 [rows]: codes that the search before has found
    rank_stride,
    row_stride,
    width,
    vocab_size,
    rows,
    blocks_per_rank,
    num_blocks,
    launch,  # of this search
    shift,  # bits below those that this launch finds
    last_shift,  # and the one before
    LOWEST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    if _searched(temperature, top_k, top_p, min_p, SECOND):
        rank = block // blocks_per_rank
        at = (block % blocks_per_rank) * BLOCK + tl.arange(0, BLOCK)
        most = tl.minimum(width, vocab_size - rank * width)  # of this rank's columns, those that are tokens
        base = logits_ptr + rank.to(tl.int64) * rank_stride + row * row_stride
        value = tl.load(base + at, mask=at < most, other=float("-inf"))

        by_mass = (top_k <= 0) | SECOND
        inverse = 1.0 / temperature
        half = rows.to(tl.int64) * num_blocks * _WAYS
        low = tl.full([], LOWEST, tl.int32)
        if launch > 0:
            low = tl.load(lows_ptr + (launch - 1) * rows + row)
            target = tl.load(targets_ptr + row, mask=launch > 1, other=0.0)
            low, target = _step_up(
                weights_ptr + ((launch - 1) % 2) * half,
                maxima_ptr,
                low,
                target,
                row,
                num_blocks,
                top_k,
                top_p,
                inverse,
                by_mass,
                last_shift,
                launch == 1,
                BLOCKS,
            )
            tl.store(targets_ptr + row, target, mask=(block == 0) & (launch == 1))
        tl.store(lows_ptr + launch * rows + row, low, mask=block == 0)

        code = _code(value)
        number = value.to(tl.float32)
        seen = (at < most) & (number == number)  # NaN is no token
        if SECOND:
            seen &= code >= tl.load(counted_ptr + row)
        largest = tl.max(tl.where(seen, number, float("-inf")), 0)
        tl.store(maxima_ptr + row * num_blocks + block, largest, mask=launch == 0)
        out = weights_ptr + (launch % 2) * half + (row * num_blocks + block) * _WAYS
        highest = tl.max(tl.where(seen, code, LOWEST), 0)
        if (launch > 0) & (highest < low + (1 << shift)):
            tl.store(out + tl.arange(0, _WAYS), tl.zeros([_WAYS], tl.float32))
        else:
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if by_mass:
                weight = tl.exp((number - largest) * inverse)
                weight = tl.where(weight == weight, weight, 0.0)  # -inf less -inf
            weight = tl.where(seen, weight, 0.0)
            for way in tl.static_range(_WAYS):
                tl.store(out + way, tl.sum(tl.where(code >= low + (way << shift), weight, 0.0), 0))


@triton.jit(do_not_specialize=["rows"])
def _found_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    weights_ptr,
    maxima_ptr,
    lows_ptr,
    targets_ptr,
    counted_ptr,
    floors_ptr,
    rows,
    num_blocks,
    LAUNCHES: tl.constexpr,
    LOWEST: tl.constexpr,
    SECOND: tl.constexpr,
    LAST: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    min_p = tl.load(min_p_ptr + row)
    low = tl.full([], LOWEST, tl.int32)
    if SECOND:
        low = tl.load(counted_ptr + row)
    if _searched(temperature, top_k, top_p, min_p, SECOND) & ((top_k > 0) | (top_p < 1.0)):
        low, _ = _step_up(
            weights_ptr + ((LAUNCHES - 1) % 2) * rows.to(tl.int64) * num_blocks * _WAYS,
            maxima_ptr,
            tl.load(lows_ptr + (LAUNCHES - 1) * rows + row),
            tl.load(targets_ptr + row),
            row,
            num_blocks,
            top_k,
            top_p,
            1.0 / temperature,
            (top_k <= 0) | SECOND,
            0,
            False,
            BLOCKS,
        )
    tl.store(counted_ptr + row, low)
    if LAST:
        floor = _decoded(low, logits_ptr.dtype.element_ty)
        if (min_p > 0.0) & (temperature > 0.0):
            block = tl.arange(0, BLOCKS)
            largest = tl.load(maxima_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
            floor = tl.maximum(floor, tl.max(largest, 0) + temperature * tl.log(min_p))
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
    block, num_warps = (1024, 4) if rows <= _FEW_ROWS else (8192, 4)
    blocks_per_rank = triton.cdiv(width, block)
    num_blocks = ranks * blocks_per_rank
    device = logits_WRV.device
    weights = torch.empty(2, rows, num_blocks, 1 << _BITS, dtype=torch.float32, device=device)
    maxima = torch.empty(rows, num_blocks, dtype=torch.float32, device=device)
    lows = torch.empty(launches, rows, dtype=torch.int32, device=device)
    targets = torch.empty(rows, dtype=torch.float32, device=device)
    counted = torch.empty(rows, dtype=torch.int32, device=device)
    floors_R = torch.empty(rows, dtype=torch.float32, device=device)
    for second in (False, True) if both else (False,):
        flags = {"LOWEST": lowest, "SECOND": second, "BLOCKS": next_power_of_2(num_blocks), "PDL": pdl}
        for launch in range(launches):
            _weigh_kernel[(num_blocks, rows)](
                logits_WRV,
                *filters,
                weights,
                maxima,
                lows,
                targets,
                counted,
                logits_WRV.stride(0),
                logits_WRV.stride(1),
                width,
                vocab_size,
                rows,
                blocks_per_rank,
                num_blocks,
                launch,
                max(0, bits - _BITS * (launch + 1)),
                bits - _BITS * launch,
                BLOCK=block,
                **flags,
                num_warps=num_warps,
                **launch_options(pdl),
            )
        _found_kernel[(rows,)](
            logits_WRV,
            *filters,
            weights,
            maxima,
            lows,
            targets,
            counted,
            floors_R,
            rows,
            num_blocks,
            LAUNCHES=launches,
            LAST=second or not both,
            **flags,
            num_warps=4,
            **launch_options(pdl),
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
