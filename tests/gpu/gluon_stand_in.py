"""Gluon kernels for Hopper on a processor: their own code, with what stands for the language.

Each part of a program is a thread. Copies arrive late. Products are computed only when they are waited for, from what
is then in shared memory, so that a buffer given back too early shows; a barrier that nobody completes is an error
within seconds. What the compiler sees to is not looked at: layouts, and barriers within a part.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.gpu import assembly

PATIENCE_S = 20
"""Within which a barrier is completed."""
LATE_S = 0.002
"""By how much a copy or a wait is late at most."""

_failed = threading.Event()  # in some part, so that others need not wait for it
_part = threading.local()  # grid, program, and the products under way of this part


class Shared:
    """A buffer in shared memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.dtype = list(values.shape), values.dtype

    def index(self, at: Tensor | int) -> Shared:
        return Shared(self.values[int(at)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.values[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.values.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)


class Barrier:
    """Completed by so many arrivals and all the bytes that were announced, again and again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._left = self._bytes = self._phase = 0

    def start(self, count: int) -> None:
        self._count = self._left = count

    def arrive(self, announced: int = 0) -> None:
        with self._changed:
            assert self._left, "more arrivals than a phase has"
            self._left -= 1
            self._bytes += announced
            self._look()

    def receive(self, size: int) -> None:
        with self._changed:
            self._bytes -= size
            self._look()

    def wait(self, phase: Tensor | int) -> None:
        """Until a phase of this parity is the last completed one."""
        with self._changed:
            until = time.monotonic() + PATIENCE_S
            while not self._changed.wait_for(lambda: self._phase % 2 != int(phase), 0.1):
                assert time.monotonic() < until and not _failed.is_set(), "a barrier that nobody completes"

    def _look(self) -> None:
        if not self._left and not self._bytes:
            self._phase, self._left = self._phase + 1, self._count
            self._changed.notify_all()


class Barriers:
    def __init__(self, count: int) -> None:
        self._all = [Barrier() for _ in range(count)]

    def index(self, at: Tensor | int) -> Barrier:
        return self._all[int(at)]


class Pointer:
    def __init__(self, values: Tensor, offset: Tensor | int = 0) -> None:
        self.values, self.offset = values, offset

    @property
    def memory(self) -> Tensor:
        """All that is there from where the values begin, whatever their strides."""
        size = self.values.untyped_storage().size() // self.values.element_size() - self.values.storage_offset()
        return self.values.as_strided((size,), (1,))

    def __add__(self, offset: Tensor | int) -> Pointer:
        return Pointer(self.values, self.offset + offset)


class Descriptor:
    """Of a matrix that is copied a block at a time; beyond its borders are zeros."""

    def __init__(self, matrix: Tensor, block: list[int]) -> None:
        self.matrix, self.dtype, self.layout = matrix, matrix.dtype, None
        self.block_type = SimpleNamespace(shape=block, nbytes=block[0] * block[1] * matrix.element_size())

    def copy(self, at: list[Tensor], barrier: Barrier, target: Shared) -> None:
        row, column = (int(one) for one in at)
        rows, columns = self.block_type.shape
        block = torch.zeros(rows, columns, dtype=self.dtype)
        there = self.matrix[row : row + rows, column : column + columns]
        block[: len(there)] = there
        target.values.fill_(_lost(self.dtype))  # what was there is, from now on

        def arrive() -> None:
            time.sleep(LATE_S * random.random())
            target.values.copy_(block)
            barrier.receive(self.block_type.nbytes)

        threading.Thread(target=arrive).start()


class Product:
    """a @ b, or added to sums, under way."""

    def __init__(self, a: Any, b: Shared, sums: Tensor | Product, added: bool) -> None:
        self._a, self._b, self._sums, self._added = a, b, sums, added
        self.result: Tensor | None = None

    def compute(self) -> None:
        a = self._a.values if isinstance(self._a, Shared) else self._a
        result = a.float() @ self._b.values.float()
        before = self._sums.result if isinstance(self._sums, Product) else self._sums
        self.result = before + result if self._added else result


def _multiply(a: Any, b: Shared, sums: Tensor | Product, use_acc: bool = True, is_async: bool = False) -> Product:
    """Products under way may be added to: they are computed in order."""
    assert is_async
    _part.products.append(Product(a, b, sums, use_acc))
    return _part.products[-1]  # type: ignore[no-any-return]


def _wait(most: int, deps: list[Any]) -> Any:
    time.sleep(LATE_S * random.random())
    while len(_part.products) > most:
        _part.products.pop(0).compute()
    results = tuple(one.result if isinstance(one, Product) else one for one in deps)
    assert all(one is not None for one in results), "a product that was not waited for"
    return results if len(results) > 1 else results[0]


def _tensor(value: Any, like: Any = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=like.dtype if isinstance(like, Tensor) else None)


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    flat, offset = pointer.memory, _tensor(pointer.offset).long()
    if mask is None:
        return flat[offset]
    mask, offset = torch.broadcast_tensors(mask, offset)
    return torch.where(mask, flat[offset.where(mask, 0)], torch.tensor(other, dtype=flat.dtype))


def _store(pointer: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand(values.shape)
    pointer.memory[_tensor(pointer.offset).expand(values.shape)[kept]] = values[kept]


def _together(calls: list[Callable[[], None]]) -> None:
    """Each call in a thread of its own."""
    failures: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as failure:
            failures.append(failure)
            _failed.set()

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _specialize(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    grid, program = _part.grid, _part.program

    def run(part: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _part.grid, _part.program, _part.products = grid, program, []
        part(*arguments)

    _together([partial(run, *one) for one in parts])


def _lost(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0x55


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, _lost(dtype), dtype=dtype))


def _assembly(
    code: str, constraints: str, values: list[Tensor], dtype: torch.dtype, is_pure: bool, pack: int
) -> Tensor | None:
    """What has no operands is about launches alone. ``pack`` neighbours make registers."""
    if not values:
        return None
    values = [one.contiguous() for one in torch.broadcast_tensors(*values)]
    words = [one.view(torch.uint8).numpy().reshape(-1, pack * one.element_size()).view(np.uint32) for one in values]
    found = assembly.run(code, [one[:, i] for one in words for i in range(one.shape[1])], pack * dtype.itemsize // 4)
    return torch.from_numpy(np.stack(found, 1)).view(dtype).view(values[0].shape)


def _tell(flag: Pointer) -> None:
    flag.memory[int(flag.offset)] = 1


def _wait_for(flag: Pointer) -> None:
    until, flags, at = time.monotonic() + PATIENCE_S, flag.memory, int(flag.offset)
    while not flags[at]:
        assert time.monotonic() < until and not _failed.is_set(), "a flag that nobody sets"
        time.sleep(LATE_S)
    flags[at] = 0


def _layout(*arguments: object) -> None:
    return None


_LANGUAGE = SimpleNamespace(
    constexpr=lambda value: value,
    static_range=range,
    int32=torch.int32,
    int64=torch.int64,
    uint8=torch.uint8,
    bfloat16=torch.bfloat16,
    float32=torch.float32,
    arange=lambda first, end, layout: torch.arange(first, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    where=lambda choice, a, b: torch.where(_tensor(choice), _tensor(a, b), _tensor(b, a)),
    minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
    maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
    max=lambda values, axis: values.amax(axis),
    sum=lambda values, axis: values.sum(axis),
    exp2=torch.exp2,
    cdiv=lambda a, b: -(-_tensor(a) // b),
    convert_layout=lambda values, layout: values,
    join=lambda a, b: torch.stack([a, b], -1),
    split=lambda values: values.unbind(-1),
    inline_asm_elementwise=_assembly,
    load=_load,
    store=_store,
    num_programs=lambda axis: _part.grid,
    program_id=lambda axis: torch.tensor(_part.program, dtype=torch.int32),
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    NVMMADistributedLayout=_layout,
    BlockedLayout=_layout,
    SliceLayout=_layout,
    DotOperandLayout=_layout,
)
_HOPPER = {
    "fence_async_shared": lambda: None,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=_layout,
        init=lambda barrier, count: barrier.start(count),
        expect=lambda barrier, size: barrier.arrive(size),
        arrive=lambda barrier: barrier.arrive(),
        wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
    ),
    "tma": SimpleNamespace(async_copy_global_to_shared=lambda matrix, at, barrier, to: matrix.copy(at, barrier, to)),
    "tl": SimpleNamespace(constexpr=None, exp=torch.exp),
    "tell": _tell,
    "wait_for": _wait_for,
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _wait,
}


def launch(module: ModuleType, name: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of ``module``, all programs at once. Tensors are given as ``Pointer`` or ``Descriptor``."""
    names: dict[str, Any] = {"gl": _LANGUAGE, **_HOPPER}
    functions = [value.fn for value in vars(module).values() if isinstance(value, JITFunction)]
    for key, value in (item for function in functions for item in function.__globals__.items()):
        if key in _HOPPER:
            continue
        if isinstance(value, JITFunction | InterpretedFunction):
            names[key] = FunctionType(value.fn.__code__, names, key)
        elif key.isupper():
            names[key] = getattr(value, "value", value)
    _failed.clear()

    def run(program: int) -> None:
        _part.grid, _part.program = programs, program
        names[name](*arguments, **constants)

    _together([partial(run, program) for program in range(programs)])
