"""From the tensors of a quantised linear, as a checkpoint's format has them, to ``Codes``.

What the formats' tensors are is said in ``arch.formats``. Values that lie as ``Codes`` has them, e4m3, int8 and four
bits along the inputs, stay where they are; others are unpacked and packed again, a run of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tpctl.arch.held import HeldLinear
from tpctl.arch.storage import Axis, Coding, Entry
from tpctl.errors import ShardFolderError
from tpctl.kernels.common.codes import Codes, Kind, as_floats

_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Codes that are unpacked together: 1 MB of their 32-bit words, which a core's cache holds, or 16 MB. malloc keeps what
is freed for what is asked for next, and puts weights that stay among it: from 16 MB on, holes of twice their size."""

_WORD = 32


def to_codes(held: HeldLinear, tensors: Mapping[str, Tensor]) -> tuple[Codes, ...]:
    """The weights of ``held``, whose ``tensors`` are by kind, each [...] or, of experts, [E, ...].

    They are one matrix, unless inputs are of other groups for other outputs (GPTQ's ``g_idx``); then several, below
    each other.

    Raises:
        ShardFolderError: a tensor has another dtype than the format, or names a group that has no scale.
    """
    storage = held.linear.storage
    coding = storage.coding
    assert coding is not None, storage
    stacked, outputs, inputs = held.experts is not None, held.out_features, held.in_features
    values, scales = held.entry("values"), held.entry("scales")
    assert values is not None and scales is not None, storage
    rows = held.rows(scales)
    own_rows = rows == list(range(outputs))
    zeros, order = held.entry("zeros"), held.entry("order")
    factor = held.entry("divisor") or held.entry("factor")
    device = tensors[values.name].device
    found_scales = _grid(scales, tensors[scales.name], stacked)
    codes = Codes(
        kind=_kind(coding),
        columns=inputs,
        values=_values(held, values, coding, tensors[values.name]),
        scales=found_scales if found_scales.dtype == torch.uint8 else _plain(found_scales),
        rows=None if own_rows else torch.tensor(rows, dtype=torch.int32, device=device),
        unit=1 if scales.inp is None else min(scales.inp.unit, 1 << 30),
        first=0 if order is not None else held.within(scales),
        zero=coding.zero if coding.bits < 8 else coding.zero - 128 * (coding.kind == "uint"),
        zeros=None if zeros is None else _zeros(zeros, coding, tensors[zeros.name], held, stacked),
        factors=None if factor is None else _factors(held, factor, tensors[factor.name], stacked),
        rounds=coding.rounds,
    )
    if order is None:
        return (codes,)
    groups = tensors[order.name]
    _check_order(held.name + order.name, groups, codes.scales.shape[-1])
    return tuple(_ordered(held, codes, groups))


def _check_order(name: str, groups: Tensor, count: int) -> None:
    """Refuse an order that names groups which are not there."""
    low, high = (int(one) for one in groups.aminmax())
    if low < 0 or high >= count:
        raise ShardFolderError(
            f"{name} puts an input into group {low if low < 0 else high}, but the weights have scales for groups 0 to "
            f"{count - 1}; the checkpoint is damaged, or was written wrongly"
        )


def orders(held: HeldLinear, groups: Tensor) -> tuple[Tensor, ...]:
    """The groups [.., K] of each source's inputs that ``groups`` [.., P * K] say; one, if all P say the same."""
    each = groups.reshape(*groups.shape[:-1], -1, held.in_features).unbind(-2)
    return each[:1] if all(torch.equal(one, each[0]) for one in each) else each


def _ordered(held: HeldLinear, codes: Codes, groups: Tensor) -> Iterator[Codes]:
    """``codes``, apart where ``groups`` [.., P * K] say other things of each of P sources' inputs."""
    each = orders(held, groups)
    if len(each) == 1:
        yield replace(codes, groups=each[0])
        return
    start = 0
    for found, features in zip(each, held.outputs, strict=True):
        yield replace(codes.between(start, start + len(features)), groups=found)
        start += len(features)


def _kind(coding: Coding) -> Kind:
    if coding.kind in ("e4m3", "e2m1"):
        return coding.kind
    return "int8" if coding.bits == 8 or coding.kind == "int" else "uint4"


def _plain(scales: Tensor) -> Tensor:
    """Powers of two in a dtype of their own as float32; other floats as they are."""
    exponents = scales.dtype == getattr(torch, "float8_e8m0fnu", None)
    return as_floats(scales.view(torch.uint8)) if exponents else scales


def _matrix(entry: Entry, tensor: Tensor, stacked: bool) -> Tensor:
    """[.., out, in] of a tensor whose features run along other axes; what is behind them is put behind."""
    lead = int(stacked)
    if entry.out is not None and entry.inp is not None:
        return tensor.movedim((lead + entry.out.dim, lead + entry.inp.dim), (lead, lead + 1))
    return tensor


def _grid(entry: Entry, tensor: Tensor, stacked: bool) -> Tensor:
    """Scales or zeros as [.., R, C]."""
    lead = tensor.shape[: int(stacked)]
    if entry.out is not None and entry.inp is not None:
        return _matrix(entry, tensor, stacked).contiguous()
    if entry.inp is not None:
        return tensor.reshape(*lead, 1, -1)
    return tensor.reshape(*lead, -1, 1)


def _values(held: HeldLinear, entry: Entry, coding: Coding, tensor: Tensor) -> Tensor:
    """The values as ``Codes`` has them."""
    name, stacked, outputs, inputs = held.name, held.experts is not None, held.out_features, held.in_features
    lead = tensor.shape[: int(stacked)]
    matrix = _matrix(entry, tensor, stacked)
    if coding.kind in ("e4m3", "int"):
        wanted_dtype = torch.float8_e4m3fn if coding.kind == "e4m3" else torch.int8
        if matrix.dtype != wanted_dtype:
            raise ShardFolderError(f"{name}{entry.name} is {matrix.dtype}, but its format has {wanted_dtype}")
        if coding.kind == "e4m3" and matrix.is_cuda:
            check_numbers(name + entry.name, matrix)
        return matrix.contiguous()
    if coding.kind == "e2m1":  # bytes of two, along the inputs
        return matrix.reshape(*lead, outputs, -1).contiguous()
    assert entry.out is not None and entry.inp is not None
    if not entry.out.packed and coding.bits in (4, 8):  # a word's bytes are in order: the lowest first
        if matrix.stride(-1) != 1:  # also where a dimension of one entry passes for contiguous
            matrix = matrix.clone(memory_format=torch.contiguous_format)
        codes = matrix.contiguous().view(torch.uint8)[..., : -(-inputs * coding.bits // 8)]
        return codes.contiguous() if coding.bits == 4 else _signed(codes)
    shape = (outputs, inputs) if coding.bits == 8 else (outputs, -(-inputs // 2))
    found = torch.empty((*lead, *shape), dtype=torch.uint8, device=tensor.device)
    flat, source = found.view(-1, *shape), matrix.reshape(-1, *matrix.shape[-2:])
    # Words of outputs end where a part does, so that one may hold fewer than fit.
    per, places = (_WORD // coding.bits, held.places(entry)) if entry.out.packed else (1, list(range(outputs)))
    step = max(1, _AT_ONCE[tensor.device.type] // inputs // per) * per
    for one, target in zip(source, flat, strict=True):
        for start in range(0, outputs, step):
            wanted = places[start : start + step]
            first = wanted[0] // per
            codes = _unpacked(one[first : wanted[-1] // per + 1], coding, entry.out, entry.inp)[:, :inputs]
            codes = codes.index_select(0, torch.tensor(wanted, device=tensor.device) - first * per)
            target[start : start + step] = codes if coding.bits == 8 else _nibbles(codes)
    return _signed(found) if coding.bits == 8 else found


def check_numbers(name: str, values: Tensor) -> None:
    """Refuse e4m3 codes that stand for no number, which kernels on GPUs would take for 480; a CPU computes with them,
    and the request that meets one ends with an error.

    Raises:
        ShardFolderError: there is one.
    """
    found = int((values.view(torch.uint8) & 127 == 127).sum())
    if found:
        raise ShardFolderError(
            f"{name} holds {found} of {values.numel()} values that are no numbers (NaN); take another copy of the model"
        )


def _signed(codes: Tensor) -> Tensor:
    """0 to 255 as -128 to 127."""
    return (codes ^ 128).view(torch.int8)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes [n, K] below 16, two a byte [n, ceil(K/2)]."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return padded[..., ::2] | padded[..., 1::2] << 4


def _unpacked(words: Tensor, coding: Coding, out: Axis | None, inp: Axis | None) -> Tensor:
    """Words [.., R, C] as codes, uint8, apart along the axis that is packed."""
    per = _WORD // coding.bits
    order = coding.order or range(per)
    places = torch.empty(per, dtype=torch.int32, device=words.device)
    for place, one in enumerate(order):
        places[one] = place * coding.bits
    along = -2 if out is not None and out.packed else -1
    apart = (words.movedim(along, -1).unsqueeze(-1) >> places) & ((1 << coding.bits) - 1)
    return apart.flatten(-2).movedim(-1, along).to(torch.uint8)


def _zeros(entry: Entry, coding: Coding, tensor: Tensor, held: HeldLinear, stacked: bool) -> Tensor:
    """The codes that stand for zero, [.., R, C] beside the scales."""
    grid = _grid(entry, tensor, stacked)
    if coding.kind != "uint":
        return grid
    # Packed along the outputs, of which each has scales of its own.
    places = torch.tensor(held.places(entry), device=grid.device)
    codes = _unpacked(grid, coding, entry.out, entry.inp).index_select(-2, places)
    if coding.bits == 8:
        return codes.to(torch.int16) + (coding.above - 128)
    return codes + coding.above


def _factors(held: HeldLinear, entry: Entry, tensor: Tensor, stacked: bool) -> Tensor:
    """What all scales are multiplied by, for each output: float32 [.., N]."""
    rows = torch.tensor(held.rows(entry), device=tensor.device)
    found = tensor.reshape(*tensor.shape[: int(stacked)], -1).float()
    return (found.reciprocal() if entry.role == "divisor" else found).index_select(-1, rows)
