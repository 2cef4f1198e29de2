"""The header of one GGUF file, read strictly and without trust.

A number in the file may claim anything; what is read is bounded by the file's own size and by ``MAX_HEADER``, and
whatever breaks the format ends in one sentence. The layout, little-endian: the letters GGUF, a version (u32), the
numbers of tensors and of keys (u64 each); the keys, each a string, a type (u32) and a value; the tensors, each a
string, its number of sizes (u32), the sizes with the row's length first (u64 each), its type (u32) and where its data
begin (u64, counted from the data's start); padding to ``general.alignment``; the data. A string is its length (u64) and
its UTF-8 bytes.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

from tpctl.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from tpctl.errors import SourceError, shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 1 << 26
"""Bytes of keys and tensor records; the largest vocabularies take a fifth of it."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_SIZES = 4

Value = bool | int | float | str | list[str] | array  # type: ignore[type-arg]


class GgufError(Exception):
    """Why a file cannot be converted, as the end of a sentence; ``convert`` puts the file's name before it."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape, rows first as in torch, and its bytes ``start`` to ``stop`` of the file ``path``."""

    name: str
    shape: tuple[int, ...]
    type: int
    path: Path
    start: int
    stop: int

    @property
    def block(self) -> BlockType:
        return BLOCK_TYPES[self.type]


@dataclass(frozen=True)
class GgufHeader:
    """What one file says of itself. Arrays of numbers are ``array.array``, of strings lists."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_magic(path: Path) -> bytes:
    """The first four bytes of ``path``. Raises ``SourceError`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of the file ``path``.

    Raises:
        GgufError: it breaks the format, or is cut short.
        SourceError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _read(_Cursor(file), path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None


class _Cursor:
    """Takes values from a file, never more than the file and ``MAX_HEADER`` hold."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        self.place = file.seek(0)

    def bytes(self, count: int, what: str) -> bytes:
        if self.place + count > self.size:
            raise damaged(f"{what} would end at byte {self.place + count}, the file has {self.size}")
        if self.place + count > MAX_HEADER:
            raise damaged(f"its header would be longer than {MAX_HEADER >> 20} MiB")
        data = self.file.read(count)
        if len(data) < count:
            raise damaged("it became shorter while it was read")
        self.place += count
        return data

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}"), what))[0]
        return value

    def string(self, what: str, *, strict: bool = True) -> str:
        data = self.bytes(self.number("Q", what), what)
        try:
            return data.decode("utf-8", errors="strict" if strict else "replace")
        except UnicodeDecodeError:
            raise damaged(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, key: str) -> Value:
        strict = not key.startswith("general.")  # names and descriptions by anybody, which nothing depends on
        if kind in _SCALARS:
            data = self.bytes(struct.calcsize(f"<{_SCALARS[kind]}"), key)
            scalar: bool | int | float = struct.unpack(f"<{_SCALARS[kind]}", data)[0]
            return scalar
        if kind == _STRING:
            return self.string(key, strict=strict)
        if kind != _ARRAY:
            raise damaged(f"{key} has the type {kind}, which GGUF does not define")
        inner, count = self.number("I", key), self.number("Q", key)
        if inner == _STRING:
            return [self.string(key, strict=strict) for _ in range(self.bounded(count, 8, key))]
        if inner not in _SCALARS:
            raise damaged(f"{key} is an array of the type {inner}, which no model has")
        code = "B" if _SCALARS[inner] == "?" else _SCALARS[inner]
        width = struct.calcsize(f"<{code}")
        numbers = array(code.replace("I", "L") if array("I").itemsize != 4 else code)
        numbers.frombytes(self.bytes(self.bounded(count, width, key) * width, key))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def bounded(self, count: int, least: int, what: str) -> int:
        """``count``, unless that many things of at least ``least`` bytes each do not fit into the rest of the file."""
        if count * least > min(self.size, MAX_HEADER) - self.place:
            raise damaged(f"{what} would have {count} entries, more than the file holds")
        return count


def damaged(reason: str) -> GgufError:
    return GgufError(f"the file is damaged or cut short ({reason}); download it again")


def _read(cursor: _Cursor, path: Path) -> GgufHeader:
    magic = cursor.bytes(4, "the header")
    if magic != MAGIC:
        raise GgufError(f"it begins with {magic!r} instead of {MAGIC!r}; download it again")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise GgufError("it is a big-endian GGUF file, which is not supported; use a little-endian one")
        raise GgufError(f"it is GGUF version {version}; tpctl reads versions 2 and 3, so convert the model again")
    tensor_count = cursor.number("Q", "the number of tensors")
    key_count = cursor.number("Q", "the number of keys")
    metadata: dict[str, Value] = {}
    for _ in range(cursor.bounded(key_count, 13, "the list of keys")):
        key = cursor.string("a key")
        if key in metadata:
            raise damaged(f"the key {shorten(key)} occurs twice")
        metadata[key] = cursor.value(cursor.number("I", key), shorten(key, 80))
    records = [_record(cursor) for _ in range(cursor.bounded(tensor_count, 32, "the list of tensors"))]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged("general.alignment is no power of two")
    base = -(-cursor.place // alignment) * alignment
    return GgufHeader(path, metadata, _placed(records, base, alignment, cursor.size, path))


_Record = tuple[str, tuple[int, ...], int, int]


def _record(cursor: _Cursor) -> _Record:
    """The next tensor's name, shape, type and offset."""
    name = cursor.string("a tensor's name")
    shown = f"tensor {shorten(name, 80)}"
    count = cursor.number("I", shown)
    if not 1 <= count <= _MAX_SIZES:
        raise damaged(f"{shown} has {count} sizes, at most {_MAX_SIZES} are possible")
    shape = tuple(cursor.number("Q", shown) for _ in range(count))[::-1]
    return name, shape, cursor.number("I", shown), cursor.number("Q", shown)


def _placed(records: list[_Record], base: int, alignment: int, size: int, path: Path) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in records:
        shown = shorten(name, 80)
        if name in tensors:
            raise damaged(f"tensor {shown} occurs twice")
        block = BLOCK_TYPES.get(kind)
        if block is None:
            raise GgufError(f"tensor {shown} is of the type {kind}, which is not supported; use another quantisation")
        if 0 in shape or shape[-1] % block.values:
            raise damaged(f"tensor {shown} of shape {list(shape)} does not consist of whole blocks of {block.name}")
        if offset % alignment:
            raise damaged(f"tensor {shown} begins at byte {offset} of the data, no multiple of {alignment}")
        start = base + offset
        stop = start + prod(shape) // block.values * block.nbytes
        if stop > size:
            raise damaged(f"tensor {shown} would end at byte {stop}, the file has {size}")
        tensors[name] = GgufTensor(name, shape, kind, path, start, stop)
    reach = base
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < reach:
            raise damaged(f"tensor {shorten(tensor.name, 80)} overlaps another one")
        reach = tensor.stop
    return tuple(tensors.values())
