"""Triton's interpreter, without work that it does again and again: what runs there takes a third of the time.

* For every call of a jitted function by another it looks through the members of ``triton.language`` for builtins to
  replace, though they are replaced while a kernel runs.
* Every sum and product of integers is made a second time in 64 bits and compared with what 32 bits hold, for an
  assertion that is left out unless ``debug`` is set.
* Two tensors of one type are cast and broadcast to that type, and constants are made anew.
* Every value has a type of its own, whose shape is checked and wrapped again, dimension by dimension.

What is computed, by which operations and in which types, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_look = interpreter._patch_lang
_check = TritonSemantic.binary_op_type_checking_impl
_broadcast = TritonSemantic.broadcast_impl_value
_scalar_constant = TritonSemantic.scalar_constant
_init_block = tl.block_type.__init__
_get_np_dtype = interpreter._get_np_dtype
_unwrap_containers = tl.core._unwrap_if_constexpr

_WRAPPER = tl.core.add.__code__
"""Of what every builtin is wrapped in."""
_SCALAR = tl.constexpr(1), tl.tuple([])
"""A scalar's number of elements, and its shape."""
_BLOCKS: dict[tuple[str | int, ...], dict[str, Any]] = {}
"""What is known of each type of blocks, with the number of elements and the shape as their tensors show them."""
_CONSTANTS: dict[tuple[object, type, str], tl.tensor] = {}
_NUMPY: dict[str, np.dtype] = {}
_UNCHANGED = {"fp32", "fp64", "int1", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
"""Types of which two operands are computed with as they are, whatever the operation."""
_BITS = {"int32": 32, "int64": 64}
_NO_CONTAINERS = {int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}


def _look_once(function: FunctionType) -> interpreter._LangPatchScope:
    """What is to be taken back after ``function``: nothing, where all that it sees of the language is replaced."""
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if seen and not any(tl.core.is_builtin(lang.load) for lang in seen):
        return interpreter._LangPatchScope()
    return _look(function)


def _bind(obj: Any, name: str, member: Any, _: Any, scope: interpreter._LangPatchScope) -> None:
    """``member`` with the interpreter's semantic; without the wrapper that asks whether there is one."""
    call = member.__wrapped__ if member.__code__ is _WRAPPER else member

    def bound(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return call(*args, **kwargs)

    scope.set_attr(obj, name, bound)


def _check_unlike(semantic: TritonSemantic, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> tuple[Any, Any]:
    """Where both are of one type that stays, or a number is beside a type that it becomes: nothing is promoted."""
    if lhs.__class__ is tl.tensor and rhs.__class__ is tl.tensor:
        if lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in _UNCHANGED:
            return _broadcast_unlike(semantic, lhs, rhs)
    elif lhs.__class__ is tl.tensor and _takes(lhs.dtype, rhs):
        return _broadcast_unlike(semantic, lhs, _constant(semantic, rhs, lhs.dtype))
    elif rhs.__class__ is tl.tensor and _takes(rhs.dtype, lhs):
        return _broadcast_unlike(semantic, _constant(semantic, lhs, rhs.dtype), rhs)
    return _check(semantic, lhs, rhs, *flags, **named)


def _takes(dtype: tl.dtype, number: Any) -> bool:
    """Whether a number becomes one of this type beside a tensor of it."""
    if dtype.name == "fp32":
        return number.__class__ is float or number.__class__ is int
    return number.__class__ is int and number.bit_length() < _BITS.get(dtype.name, 0)


def _broadcast_unlike(semantic: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    if not (lhs.type.is_block() and rhs.type.is_block()):
        return _broadcast(semantic, lhs, rhs)
    left, right = lhs.type.shape.values, rhs.type.shape.values
    if left == right:
        return lhs, rhs
    shape = [max(one, other) for one, other in zip(left, right, strict=False)]
    if len(left) == len(right) and all(1 in pair or pair[0] == pair[1] for pair in zip(left, right, strict=True)):
        return _broadcast_to(semantic, lhs, shape), _broadcast_to(semantic, rhs, shape)
    return _broadcast(semantic, lhs, rhs)


def _broadcast_to(semantic: TritonSemantic, value: tl.tensor, shape: list[int]) -> tl.tensor:
    if value.type.shape.values == shape:
        return value
    return tl.tensor(semantic.builder.create_broadcast(value.handle, shape), tl.block_type(value.dtype, shape))


def _constant(semantic: TritonSemantic, value: Any, dtype: tl.dtype) -> tl.tensor:
    key = (value, value.__class__, dtype.name)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = _scalar_constant(semantic, value, dtype)
    return _CONSTANTS[key]


def _make_block(block: tl.block_type, element_ty: tl.dtype, shape: Iterable[int | tl.constexpr]) -> None:
    key = (element_ty.name, *(size.value if size.__class__ is tl.constexpr else size for size in shape))
    if key not in _BLOCKS:
        _init_block(block, element_ty, shape)
        block.shown = tl.constexpr(block.numel), tl.tuple([tl.constexpr(size) for size in block.shape])
        _BLOCKS[key] = block.__dict__
    block.__dict__ = _BLOCKS[key]


def _make_tensor(tensor: tl.tensor, handle: Any, type: tl.dtype) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.numel, tensor.shape = type.shown if type.is_block() else _SCALAR


def _equals(dtype: tl.dtype, other: object) -> bool:
    other = _unwrap(other)
    return isinstance(other, tl.dtype) and dtype.name == other.name


def _unwrap(value: Any) -> Any:
    if value.__class__ is tl.constexpr:
        return value.value
    return value if value.__class__ in _NO_CONTAINERS else _unwrap_containers(value)


def _np_dtype(type: tl.dtype) -> np.dtype:
    if type.name not in _NUMPY:
        _NUMPY[type.name] = _get_np_dtype(type)
    return _NUMPY[type.name]


def _fits(array: np.ndarray, type: tl.dtype) -> bool:
    return type.__class__ is tl.pointer_type or 8 * array.itemsize <= max(8, type.primitive_bitwidth)


def hasten() -> None:
    interpreter._patch_lang, interpreter._patch_attr = _look_once, _bind
    interpreter._get_np_dtype, interpreter._validate_np_data_size = _np_dtype, _fits
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    TritonSemantic.binary_op_type_checking_impl = _check_unlike
    TritonSemantic.broadcast_impl_value = _broadcast_unlike
    TritonSemantic.scalar_constant = _constant
    tl.core._unwrap_if_constexpr = _unwrap
    tl.block_type.__init__ = _make_block
    tl.tensor.__init__ = _make_tensor
    tl.dtype.__eq__ = _equals
