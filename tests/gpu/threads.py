"""Gluon kernels whose tensors have a number for each thread, on the processor: their PTX is done for all threads of a
program at once, and what it asks to be copied comes as late as it may."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl

from tests.gpu.assembly import OPERATIONS
from tests.gpu.thread_instructions import FLOATS, HALVES, e4m3_pair, half_pair, halves, product

OF_LAUNCHES = {"num_warps", "num_stages", "maxnreg", "launch_pdl"}
NOTHING = {".reg", "griddepcontrol.launch_dependents", "griddepcontrol.wait"}
OF_TRITON = {gl.float32: torch.float32, gl.int32: torch.int32}


class Numbers(torch.Tensor):
    """One for each thread."""

    def to(self, kind: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        return self.view(kind) if bitcast else super().to(kind)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc, override]
        """A new one: in Triton a name is given another value."""
        return self + other

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc, override]
        return self * other


class Pointer:
    """Places in a tensor: how many elements behind its first."""

    def __init__(self, tensor: torch.Tensor, place: Any = 0) -> None:
        self.tensor, self.place = tensor, place
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.place + other)

    def bytes(self) -> tuple[Any, Any]:
        """The tensor's memory, and the places there."""
        tensor = self.tensor
        size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
        return memory, self.place.numpy().astype(np.int64) * tensor.element_size()

    def elements(self) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = self.tensor
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return tensor.as_strided((size,), (1,)), self.place.long()


def _taken(memory: Any, places: Any, size: int) -> Any:
    """Bytes [T, size] of aligned places."""
    assert (places % size == 0).all() and places.min() >= 0 and places.max() + size <= len(memory)
    return memory[places[:, None] + np.arange(size)]


class Program:
    """One of a launch. Shared memory begins as noise."""

    def __init__(self, number: int) -> None:
        self.number, self.shared = number, np.zeros(0, np.uint8)
        self.asked: list[tuple[Any, Any]] = []  # since the last group was made
        self.groups: list[list[tuple[Any, Any]]] = []  # not waited for yet

    def allocate(self, _: Any, shape: Sequence[int], __: Any) -> Any:
        count, words = shape
        self.shared = np.random.default_rng(0).integers(0, 256, count * words * 4, np.uint8)

        def zeroed(i: int) -> Any:
            return SimpleNamespace(store=lambda _: self.shared[i * words * 4 : (i + 1) * words * 4].fill(0))

        return SimpleNamespace(index=zeroed, _keep_alive=lambda: None)

    def assembly(self, text: Any, constraints: Any, values: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
        text, constraints, dtype = (getattr(one, "value", one) for one in (text, constraints, dtype))
        kinds = [OF_TRITON.get(one, one) for one in (dtype if isinstance(dtype, tuple) else (dtype,))]
        assert pack == 1 and constraints.count("=") == len(kinds)
        held: dict[str, Any] = {"global_smem": np.uint32(0)}
        for i, one in enumerate(values):
            held[f"${len(kinds) + i}"] = one.bytes() if isinstance(one, Pointer) else one.numpy().view(np.uint32)
        inner = text.strip()
        if inner.startswith("{"):
            inner = inner[1 : inner.rindex("}")]
        for statement in inner.split(";"):
            self._do(statement.strip(), held)
        results = [held[f"${i}"] for i in range(len(kinds))]
        tensors = [
            torch.from_numpy(np.array(np.broadcast_to(one, self.threads)).view(np.int32))
            .view(kind)
            .as_subclass(Numbers)
            for one, kind in zip(results, kinds, strict=True)
        ]
        return tuple(tensors) if isinstance(dtype, tuple) else tensors[0]

    threads = 0

    def _do(self, statement: str, held: dict[str, Any]) -> None:
        lanes: Any = None
        if statement.startswith("@"):
            guard, _, statement = statement.partition(" ")
            lanes = held[guard[1:]]
        name, _, operands = statement.partition(" ")
        if not name or name in NOTHING:
            return
        parts = [one.strip() for one in re.findall(r"\{[^}]*\}|[^,{}]+", operands) if one.strip()]

        def value(text: str) -> Any:
            if text.startswith("{"):
                low, high = (value(one.strip()) for one in text[1:-1].split(","))
                return low | (high << 16)
            if text in held:
                return held[text]
            return np.uint32(int(text[2:], 16) if text.startswith("0f") else int(text, 0))

        def several(text: str) -> list[str]:
            return [one.strip() for one in text.strip("{}").split(",")]

        def place(text: str) -> Any:
            return held[text.strip("[]")]

        if name.startswith("cp.async."):
            self._copy(name, parts, lanes, place)
            return
        out, *names = parts
        if name.startswith("ld."):
            memory, places = place(names[0]) if "global" in name else (self.shared, place(names[0]).astype(np.int64))
            outs = several(out)
            size = {"32": 4, "16": 2, "u8": 1}[name[-2:]]
            found = _taken(memory, places, size * len(outs)).reshape(len(places), len(outs), size)
            for i, register in enumerate(outs):
                padded = np.zeros((len(places), 4), np.uint8)
                padded[:, :size] = found[:, i]
                held[register] = padded.view(np.uint32)[:, 0]
        elif name.startswith("st.shared"):
            words = [np.broadcast_to(value(one), self.threads) for one in several(names[0])]
            places = place(out).astype(np.int64)
            _taken(self.shared, places, 4 * len(words))
            self.shared[places[:, None] + np.arange(4 * len(words))] = np.stack(words, 1).view(np.uint8)
        elif name.startswith("mma."):
            assert name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
            a, b, c = ([value(one) for one in several(text)] for text in names)
            found = product(a, b, [one.view(np.float32) for one in c])
            held |= {register: one.view(np.uint32) for register, one in zip(several(out), found, strict=True)}
        elif name == "shfl.sync.bfly.b32":
            held[out] = value(names[0])[np.arange(self.threads) ^ int(names[1])]
        elif name == "shfl.sync.idx.b32":
            lane = value(names[1]).astype(np.int64)
            assert lane.max() < 32
            held[out] = value(names[0])[np.arange(self.threads) // 32 * 32 + lane]
        elif name == "redux.sync.max.s32":
            held[out] = value(names[0]).view(np.int32).reshape(-1, 32).max(1).repeat(32).view(np.uint32)
        elif name == "vote.sync.ballot.b32":
            lanes = np.left_shift(held[names[0]].astype(np.uint32), np.arange(self.threads, dtype=np.uint32) % 32)
            held[out] = lanes.reshape(-1, 32).sum(1, dtype=np.uint32).repeat(32)
        elif name == "brev.b32":
            bits = (value(names[0])[:, None] >> np.arange(32, dtype=np.uint32)) & 1
            held[out] = (bits << np.arange(31, -1, -1, dtype=np.uint32)).sum(1, dtype=np.uint32)
        elif name == "clz.b32":
            held[out] = np.array([32 - int(one).bit_length() for one in value(names[0])], np.uint32)
        elif name == "setp.ne.b32":
            held[out] = np.broadcast_to(value(names[0]) != value(names[1]), self.threads)
        elif name == "mul.wide.u32":
            a, b = map(value, names)
            held[out] = a.astype(np.uint64) * b
        elif name == "mov.b64":
            low, high = several(out)
            held |= {low: held[names[0]].astype(np.uint32), high: (held[names[0]] >> np.uint64(32)).astype(np.uint32)}
        elif name == "and.b64":
            assert names[1] == "-4", "only the word of a byte is known here"
            memory, places = held[names[0]]
            held[out] = memory, places & -4
        elif name == "mov.b32" and out.startswith("{"):
            low, high = several(out)
            held |= {low: value(names[0]) & 0xFFFF, high: value(names[0]) >> 16}
        elif name in FLOATS:
            given = [np.broadcast_to(value(one), self.threads).astype(np.uint32).view(np.float32) for one in names]
            held[out] = np.asarray(FLOATS[name](*given), np.float32).view(np.uint32)
        elif name == "cvt.rn.f16x2.f32":
            held[out] = half_pair(*(value(one).view(np.float32) for one in names))
        elif name == "cvt.rn.f16x2.e4m3x2":
            held[out] = e4m3_pair(value(names[0]))
        elif name in HALVES:
            held[out] = halves(HALVES[name], *(np.broadcast_to(value(one), self.threads) for one in names))
        elif name == "cvt.f32.f16":
            held[out] = value(names[0]).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
        elif name == "lop3.b32":
            assert names.pop() == "0xEA", "only a & b | c is known here"
            a, b, c = map(value, names)
            held[out] = a & b | c
        else:
            operation = OPERATIONS["mov.b32" if name.startswith("mov.") else name]
            held[out] = operation(*map(value, names))

    def _copy(self, name: str, parts: Sequence[str], lanes: Any, place: Callable[[str], Any]) -> None:
        if name == "cp.async.commit_group":
            self.groups.append(self.asked)
            self.asked = []
        elif name == "cp.async.wait_group":
            left = int(parts[0])
            come, self.groups = self.groups[: len(self.groups) - left], self.groups[len(self.groups) - left :]
            for to, found in (one for group in come for one in group):
                self.shared[to] = found
        else:
            (memory, places), to, size = place(parts[1]), place(parts[0]).astype(np.int64), int(parts[2])
            if lanes.any():
                found = _taken(memory, places[lanes], size)
                _taken(self.shared, to[lanes], size)
                self.asked.append((to[lanes][:, None] + np.arange(size), found))


def _language(program: Program) -> Any:
    """``gl``, of a program."""

    def load(pointer: Pointer, mask: Any, other: float, cache_modifier: str = "") -> Any:
        elements, places = pointer.elements()
        return torch.where(mask, elements[torch.where(mask, places, 0)], torch.tensor(other, dtype=elements.dtype))

    def store(pointer: Pointer, value: Any, mask: Any) -> None:
        elements, places = pointer.elements()
        elements[places[mask]] = value[mask]

    def arange(start: int, stop: int, layout: object) -> Any:
        program.threads = stop
        return torch.arange(start, stop, dtype=torch.int32).as_subclass(Numbers)

    def minimum(a: Any, b: Any) -> Any:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.int32))

    def where(mask: Any, a: Any, b: Any) -> Any:
        return torch.where(torch.as_tensor(mask), a, b)

    return SimpleNamespace(
        constexpr=None, int32=torch.int32, int64=torch.int64, float32=torch.float32, static_range=range,
        BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        allocate_shared_memory=program.allocate, inline_asm_elementwise=program.assembly,
        program_id=lambda _: torch.tensor(program.number, dtype=torch.int32).as_subclass(Numbers),
        arange=arange, zeros=lambda *_: None, load=load, store=store, minimum=minimum,
        maximum=torch.maximum, abs=torch.abs, where=where, exp=torch.exp, rsqrt=torch.rsqrt,
    )  # fmt: skip


def _plain(kernel: Any, language: Any, known: dict[int, dict[str, Any]]) -> Callable[..., Any]:
    """A Gluon function as one of Python that speaks another language, and so do those that it calls."""
    function = kernel.fn
    theirs = function.__globals__
    if id(theirs) not in known:
        mine = known[id(theirs)] = dict(theirs)
        for name, value in theirs.items():
            if value is gl or value is tl:
                mine[name] = language
            elif isinstance(value, gl.constexpr):
                mine[name] = value.value
            elif name == "barrier":
                mine[name] = lambda: None
            elif isinstance(getattr(value, "fn", None), FunctionType):  # Triton's are called too
                mine[name] = _plain(value, language, known)
    return FunctionType(function.__code__, known[id(theirs)], function.__name__, function.__defaults__)


class Threads:
    """A kernel that is launched as Triton's are."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            for number in range(grid[0]):
                given = [
                    Pointer(one)
                    if isinstance(one, torch.Tensor)
                    else torch.tensor(one, dtype=torch.int32).as_subclass(Numbers)
                    if isinstance(one, int)
                    else one
                    for one in args
                ]
                flags = {name: value for name, value in constants.items() if name not in OF_LAUNCHES}
                _plain(self._kernel, _language(Program(number)), {})(*given, **flags)

        return launch
