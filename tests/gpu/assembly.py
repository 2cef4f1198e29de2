"""What Triton's interpreter cannot do, done: PTX that kernels hold inline, products of bfloat16, rounding to it and to
FP8."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.gpu.here import INTERPRET

Words = Any  # np.ndarray of uint32, or a number


def as_floats(halves: Any) -> Any:
    """bfloat16 numbers, as uint16, in float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def as_halves(numbers: Any) -> Any:
    """Numbers that float32 holds, rounded to bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    found = np.zeros_like(a)
    for i in range(4):
        nibble = int(selector) >> 4 * i & 15
        assert nibble < 8, "copies of sign bits are not known here"
        source, byte = (a, nibble) if nibble < 4 else (b, nibble - 4)
        found |= ((np.asarray(source, np.uint32) >> 8 * byte) & 255).astype(np.uint32) << 8 * i
    return found


def _fma(a: Words, b: Words, c: Words) -> Words:
    found = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for shift in (0, 16):
        x, y, z = (
            as_floats((np.asarray(one, np.uint32) >> shift).astype(np.uint16)).astype(np.float64) for one in (a, b, c)
        )
        # Two products of 8 bits are exact, and the sum in float64 is for all that is tested.
        found |= as_halves(x * y + z).astype(np.uint32) << shift
    return found


OPERATIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma,
}


def run(assembly: str, inputs: Sequence[Any], outputs: int) -> list[Any]:
    """What registers $0 to $(outputs - 1) hold in the end; inputs: the registers that follow, uint32 arrays."""
    shape = np.shape(inputs[0])
    held = {f"${outputs + i}": one for i, one in enumerate(inputs)}

    def value(name: str) -> Words:
        found = held[name] if name in held else np.uint32(int(name, 0))
        return found if np.ndim(found) else np.broadcast_to(found, shape)

    for statement in re.sub(r"[{}]", "", assembly).split(";"):
        name, _, operands = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        out, *names = (one.strip() for one in operands.split(","))
        if name == "lop3.b32":
            assert names.pop() == "0xEA", "only a & b | c is known here"
            a, b, c = map(value, names)
            held[out] = a & b | c
        elif name == "prmt.b32":
            held[out] = _prmt(value(names[0]), value(names[1]), int(names[2], 0))
        else:
            held[out] = OPERATIONS[name](*map(value, names))
    return [np.broadcast_to(held[f"${i}"], shape) for i in range(outputs)]


def _registers(data: Any, pack: int) -> list[Any]:
    """Elements, ``pack`` neighbours at a time, as the registers that hold them."""
    flat = np.ascontiguousarray(data).reshape(-1, pack)
    words = flat.view(np.uint8).reshape(len(flat), -1).view(np.uint32)
    return [words[:, i].copy() for i in range(words.shape[1])]


def _create_inline_asm(
    self: Any, assembly: str, constraints: str, values: Sequence[Any], types: Sequence[Any], pure: bool, pack: int
) -> Any:
    inputs = [word for one in values for word in _registers(one.data, pack)]
    shape = values[0].data.shape
    kinds = [kind.scalar for kind in types]
    widths = [kind.primitive_bitwidth * pack // 32 for kind in kinds]
    found = run(assembly, inputs, sum(widths))
    results = []
    for kind, width in zip(kinds, widths, strict=True):
        words = np.stack([found.pop(0) for _ in range(width)], axis=1)
        data = np.ascontiguousarray(words).view({16: np.uint16, 32: np.int32}[kind.primitive_bitwidth]).reshape(shape)
        results.append(TensorHandle(data, kind))
    return SimpleNamespace(get_result=lambda i: results[i])


def _dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (
            TensorHandle(as_floats(one.data), tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b)
        )
        return plain(self, a, b, d, *options)

    return create_dot


def _cast(plain: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:  # Triton's interpreter cuts bits off
            return TensorHandle(as_halves(source.data), tl.bfloat16)
        return plain(self, source, kind)

    return cast_impl


def _to_e4m3(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.float8e4nv:  # it rounds 15.9 down to 8 there
            wide = torch.from_numpy(np.ascontiguousarray(source.data))
            return TensorHandle(wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)
        return plain(self, source, kind, rounding)

    return create_fp_to_fp


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter run kernels as GPUs have them in bfloat16; on a GPU, nothing."""
    if not INTERPRET:
        return
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", _create_inline_asm)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot(InterpreterBuilder.create_dot))
    to_e4m3 = _to_e4m3(InterpreterBuilder.create_fp_to_fp)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", to_e4m3)
    cast = _cast(InterpreterBuilder.cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", lambda self, source, kind: cast(self, source, kind))
