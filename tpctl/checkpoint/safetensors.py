"""The safetensors container: strict headers, and headers made before the data.

The format (https://github.com/huggingface/safetensors): eight bytes, little-endian, with the length N of the
header; N bytes of JSON ``{"name": {"dtype", "shape", "data_offsets": [begin, end]}, …, "__metadata__": {str:
str}}``; then the data, which the offsets (relative to the header's end) must cover without gap or overlap. No
byte of a file is trusted.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple

from tpctl.errors import CheckpointError, counted, shorten, shown
from tpctl.manifest.records import LONGEST_TEXT, SourceFile
from tpctl.partition.dtypes import DTYPE_BITS, MOST_AXES, MOST_BYTES

_STRUCTURE = (b"{", b"[", b",", b":")
_NAME = 120
"""Characters of a tensor's name that a message repeats."""

_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}

MAX_HEADER = 100_000_000
"""Longest header in bytes that the reference reader accepts."""

MOST_VALUES = 6_000_000
"""Most brackets, commas and colons in a header, about nine a tensor: what bounds the memory that reading it takes."""


class FileTensor(NamedTuple):
    """One tensor of a file; ``start`` and ``stop`` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


_KINDS = 1000
"""Dtypes with shapes whose sizes are kept in mind while a header is read."""


@dataclass(frozen=True)
class Header:
    """A parsed header. ``text`` is its JSON as stored, padding included; ``size`` counts the length field too."""

    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]
    text: str
    size: int

    @property
    def raw(self) -> bytes:
        """The first ``size`` bytes of the file."""
        body = self.text.encode()
        return struct.pack("<Q", len(body)) + body

    @property
    def file_size(self) -> int:
        """The size in bytes of a file with this header."""
        return max((info.stop for info in self.tensors.values()), default=self.size)


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """The number of bytes of a tensor.

    Raises:
        CheckpointError: the dtype is unknown, the elements do not fill whole bytes, or are too many for any file.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise CheckpointError(
            f"dtype {shorten(dtype)!r} is unknown; safetensors defines {', '.join(sorted(DTYPE_BITS))}"
        )
    # Looked at before they are multiplied, which takes for ever with numbers that are long enough.
    if len(shape) > MOST_AXES or max(shape, default=0) > MOST_BYTES:
        raise CheckpointError(f"shape {shown(list(shape))} is none that a tensor can have")
    total = prod(shape) * bits
    if total > 8 * MOST_BYTES:
        raise CheckpointError(f"shape {shown(list(shape))} is none that a tensor can have")
    if total % 8:
        raise CheckpointError(f"{prod(shape)} elements of {dtype} do not fill whole bytes")
    return total // 8


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read or breaks the format; the message names file and reason.
    """
    try:
        mode = path.stat().st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):  # reading a pipe would wait for ever
            raise CheckpointError(f"{path} is no safetensors file: it is a pipe or a device")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = header_length(prefix, size, str(path))
            return parse_header(file.read(length), size, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The header's length in bytes from a file's first eight; ``file_size`` bounds it. Errors as ``read_header``."""
    if len(prefix) < 8:
        raise CheckpointError(
            f"{where} is no safetensors file: it has {counted(file_size, 'byte')}, at least 8 are needed; "
            "fetch it again"
        )
    if prefix == _LFS_POINTER:
        raise CheckpointError(
            f"{where} is no safetensors file but the pointer to one that Git LFS leaves in its place; run `git lfs "
            "pull` in the clone, or fetch the model with `tpctl download`"
        )
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise CheckpointError(f"{where} is no safetensors file: its header would be {length} bytes long")
    if 8 + length > file_size:
        raise CheckpointError(
            f"{where} is truncated: its header ends at byte {8 + length}, the file has {file_size}; fetch it again"
        )
    return length


_LFS_POINTER = b"version "
"""How the text begins that Git LFS has in place of a large file: its first line names the pointers' version."""

_FIELDS = {"dtype", "shape", "data_offsets"}


def parse_header(body: bytes, file_size: int, where: str) -> Header:
    """Check a header's JSON ``body`` for a file of ``file_size`` bytes. Errors as ``read_header``."""

    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{where} has a bad safetensors header: {reason}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise bad(f"the key {shown(twice)} occurs twice")
        return found

    if sum(map(body.count, _STRUCTURE)) > MOST_VALUES:
        raise bad(f"it holds more than {MOST_VALUES:,} values")
    try:
        text = body.decode("utf-8")
        entries = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise bad("it is nested too deeply") from None
    except ValueError as error:
        raise bad(f"no valid JSON ({error})") from None
    if not isinstance(entries, dict) or not text.startswith("{"):
        raise bad("not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("__metadata__ is not an object of strings")
    for name in (*entries, *metadata, *metadata.values()):
        if not name.isascii() and name.encode("utf-8", "replace") != name.encode("utf-8", "surrogatepass"):
            raise bad(f"{shown(name)} holds half a character")
    base = 8 + len(body)
    tensors: dict[str, FileTensor] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for name, entry in entries.items():
        info = _like_another(name, entry, base, sizes)
        if info is None:
            info = _tensor(name, entry, base, bad)
            if len(sizes) < _KINDS:
                sizes[_kind(info.dtype, info.shape)] = info.nbytes
        tensors[name] = info
    reach = base
    for info in sorted(tensors.values(), key=attrgetter("start", "stop")):
        if info.start != reach:
            kind = "overlaps another tensor" if info.start < reach else "leaves a gap before it"
            place = f"begins at byte {info.start - base}, expected {reach - base}"
            raise bad(f"tensor {shorten(info.name, _NAME)} {kind} ({place})")
        reach = info.stop
    if reach > file_size:
        raise CheckpointError(
            f"{where} is truncated: its tensors end at byte {reach}, the file has {file_size}; fetch it again"
        )
    if reach < file_size:
        raise CheckpointError(
            f"{where} is damaged: its tensors end at byte {reach}, but the file has {file_size}; fetch it again"
        )
    return Header(tensors, metadata, text, base)


def source_headers(files: Iterable[SourceFile], manifest: Path | None = None) -> dict[str, Header]:
    """The headers of a shard folder's source, by file; a message names the ``manifest`` that they stand in.

    Raises:
        CheckpointError: one breaks the format.
    """
    within = "" if manifest is None else f" in {manifest}"
    return {file.name: parse_header(file.header.encode(), file.size, file.name + within) for file in files}


def _like_another(name: str, entry: Any, base: int, sizes: Mapping[tuple[Any, ...], int]) -> FileTensor | None:
    """The tensor of a sound ``entry`` whose dtype and shape are those of an earlier one, which has the size given;
    ``None``: it has to be looked at as a whole. Experts are thousands of tensors of a few kinds."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        nbytes = sizes.get(_kind(dtype, shape))
    except (KeyError, TypeError, ValueError):
        return None
    if nbytes is None or type(shape) is not list or len(entry) != len(_FIELDS) or len(name) > LONGEST_TEXT:
        return None
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= MOST_BYTES or end - begin != nbytes:
        return None
    return FileTensor(name, dtype, tuple(shape), base + begin, base + end)


def _kind(dtype: Any, shape: Iterable[Any]) -> tuple[Any, ...]:
    return dtype, *shape, *map(type, shape)  # types too, since 1 is equal to true and to 1.0


def _tensor(name: str, entry: Any, base: int, bad: Callable[[str], CheckpointError]) -> FileTensor:
    if len(name) > LONGEST_TEXT:
        raise bad(f"the tensor {shorten(name, _NAME)} has a name of {len(name):,} characters")

    def wrong(what: str) -> CheckpointError:
        return bad(f"tensor {shorten(name, _NAME)}{what}")

    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise wrong(" does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f" has the unknown dtype {shown(dtype)}")
    if not _are_natural(shape):
        raise wrong(f" has the shape {shown(shape)}")
    if not _are_natural(offsets) or len(offsets) != 2:
        raise wrong(f" has the offsets {shown(offsets)}")
    begin, end = offsets
    try:
        wanted = tensor_nbytes(dtype, shape)
    except CheckpointError as error:
        raise wrong(f": {error}") from None
    if max(offsets) > MOST_BYTES or end - begin != wanted:
        span = shown(end - begin) if max(offsets) <= MOST_BYTES else "more than any file's"
        raise wrong(f" spans {span} bytes, but {dtype} of shape {shown(shape)} has {wanted}")
    return FileTensor(name, dtype, tuple(shape), base + begin, base + end)


def _are_natural(values: Any) -> bool:
    """Whether ``values`` is a list of whole numbers that are not below zero."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class TensorSpec(NamedTuple):
    """What a tensor is, wherever its bytes may be: one to be written, or of a model that is not here."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


def build_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> Header:
    """The header of a file that will hold ``tensors``, so that it can be written before any data.

    Tensors are laid out as the reference writer does, widest dtype first and then by name, which keeps every
    one aligned to its element size, and the header is padded with spaces to a multiple of eight bytes.
    """
    order = sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in order:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return parse_header(body, 8 + len(body) + offset, "new file")
