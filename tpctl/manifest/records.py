"""The entries of a shard folder's manifest, and how they look in JSON."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from tpctl.partition.dtypes import DTYPE_BITS, MOST_AXES, MOST_BYTES
from tpctl.partition.plan import Piece, Shape
from tpctl.partition.split import Rule

LONGEST_TEXT, LONGEST_ID = 1000, 5000
"""Characters of a name or label, and of a source's id, which may be a path."""

MOST_STACKED = 1_000_000
"""Pieces of single experts in a shard: of 60 layers of 512 experts in four tensors a weight there are half as many."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A safetensors file of the source. ``header`` is its JSON text, padding included, from which ``merge`` rebuilds
    the file byte for byte; ``sha256`` is known where the source's place in the Hub's cache tells it."""

    name: str
    size: int
    header: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What the shards were cut from. ``index`` is the text of the source's ``*.index.json``, if it has one.

    ``aliases`` names tensors of the source that are byte for byte another one (a tied head stored twice) and
    are therefore not stored.
    """

    id: str
    revision: str | None
    files: tuple[SourceFile, ...]
    index: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """A safetensors file of a shard; sizes in bytes, ``header_sha256`` over its first ``header_size`` bytes."""

    file: str
    size: int
    header_size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """A stored tensor: where it is, its BLAKE3 digest, and the pieces of source tensors that fill it.

    What no piece covers is ``fill``: zero for a padded vocabulary, one for a scale that a serving engine expects.
    ``stacked``: the first axis is of experts.
    """

    part: int
    dtype: str
    shape: Shape
    digest: str
    rule: Rule
    dim: int
    pieces: tuple[Piece, ...]
    fill: int = 0
    stacked: bool = False


@dataclass(frozen=True)
class Shard:
    """One rank's part files and the tensors in them, by name."""

    parts: tuple[Part, ...]
    tensors: Mapping[str, ManifestTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all part files."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file copied from the source as it is."""

    size: int
    digest: str


def shard_to_dict(shard: Shard) -> dict[str, Any]:
    return {
        "parts": [
            {
                "file": part.file,
                "size": part.size,
                "header_size": part.header_size,
                "header_sha256": part.header_sha256,
            }
            for part in shard.parts
        ],
        "tensors": {
            name: {
                "part": tensor.part,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "digest": tensor.digest,
                "rule": tensor.rule.value,
                "dim": tensor.dim,
                "fill": tensor.fill,
                "pieces": [
                    {
                        "source": piece.source,
                        "start": list(piece.start),
                        "shape": list(piece.shape),
                        "at": list(piece.at),
                        "label": piece.label,
                    }
                    for piece in tensor.pieces
                ],
                **({"stacked": True} if tensor.stacked else {}),
            }
            for name, tensor in shard.tensors.items()
        },
    }


def shard_from_dict(value: Mapping[str, Any]) -> Shard:
    """The inverse of ``shard_to_dict``. Raises ``ValueError``, ``TypeError``, ``KeyError`` or ``AttributeError`` for
    anything that ``shard_to_dict`` does not make: callers trust names, types and ranges of what they get."""
    parts = parts_from_list(value["parts"])
    found = {text(name): tensor_from_dict(entry, len(parts)) for name, entry in value["tensors"].items()}
    if not parts or not found:
        raise ValueError("a shard holds nothing")
    if {tensor.part for tensor in found.values()} != set(range(len(parts))):
        raise ValueError("a part holds nothing")
    if sum(tensor.shape[0] * len(tensor.pieces) for tensor in found.values() if tensor.stacked) > MOST_STACKED:
        raise ValueError("a shard holds more experts than there are")
    return Shard(parts, found)


def parts_from_list(value: Any) -> tuple[Part, ...]:
    """A shard's part files; errors as ``shard_from_dict``."""
    return tuple(_part(part) for part in value)


def _part(value: Mapping[str, Any]) -> Part:
    size = natural(value["size"])
    header_size = natural(value["header_size"], most=size)
    return Part(plain_name(value["file"]), size, header_size, digest(value["header_sha256"]))


def tensor_from_dict(value: Mapping[str, Any], num_parts: int) -> ManifestTensor:
    """A stored tensor of a shard of ``num_parts`` part files; errors as ``shard_from_dict``."""
    shape = _shape(value["shape"])
    stacked = flag(value.get("stacked", False))
    dim = natural(value["dim"], most=max(0, len(shape) - 1))
    pieces = tuple(_piece(piece, len(shape)) for piece in value["pieces"])
    if stacked and len(shape) < 2:
        raise ValueError("a tensor without experts is stacked")
    _check_pieces(pieces, shape, dim, stacked)
    return ManifestTensor(
        natural(value["part"], most=num_parts - 1),
        one_of(DTYPE_BITS, value["dtype"]),
        shape,
        digest(value["digest"]),
        Rule(value["rule"]),
        dim,
        pieces,
        natural(value["fill"], most=1),
        stacked,
    )


def _piece(value: Mapping[str, Any], axes: int) -> Piece:
    start, shape, at = (_shape(value[key]) for key in ("start", "shape", "at"))
    if not len(start) == len(shape) == len(at) == axes:
        raise ValueError("a piece has other axes than its tensor")
    return Piece(text(value["source"]), start, shape, at, text(value["label"]))


def _check_pieces(pieces: Sequence[Piece], shape: Shape, dim: int, stacked: bool) -> None:
    """Raise ``ValueError`` unless ``pieces`` lie in order along ``dim``, without a hole, each as large as the tensor of
    ``shape`` on all other axes. What they leave is below them, and so whole rows (see ``sharding.moving.layout``)."""
    reach = 0
    for piece in pieces:
        for axis, length in enumerate(shape):
            first, held = piece.at[axis], piece.shape[axis]
            if (first != reach or not held) if axis == dim else (first, held) != (0, length):
                raise ValueError("a piece overlaps another one, or leaves a hole")
        reach += piece.shape[dim] if shape else 0
    if not pieces:
        return
    if not shape:
        if len(pieces) > 1:
            raise ValueError("a number is made of several")
        return
    by_columns = dim > stacked
    if dim not in (stacked, stacked + 1) or reach > shape[dim] or (by_columns and reach != shape[dim]):
        raise ValueError("the pieces do not fill their tensor")


def _shape(value: Any) -> Shape:
    if not isinstance(value, list):
        raise TypeError("a shape is not a list")
    shape = tuple(natural(length) for length in value)
    if len(shape) > MOST_AXES or prod(shape) > MOST_BYTES:
        raise ValueError("a shape is too large")
    return shape


def plain_name(value: Any) -> str:
    """``value`` if it names a file that lies in the folder itself."""
    name = text(value)
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def text(value: Any, longest: int | None = LONGEST_TEXT) -> str:
    """``value`` if it is a string of at most ``longest`` characters, none of them half of one."""
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} is not a string")
    if longest is not None and len(value) > longest:
        raise ValueError(f"a string has {len(value)} characters")
    value.encode()
    return value


def one_of(known: Container[str], value: Any) -> str:
    """``value`` if it is one of the strings in ``known``."""
    if text(value) not in known:
        raise ValueError(f"{value!r} is unknown")
    return str(value)


def natural(value: Any, least: int = 0, most: int | None = None) -> int:
    """``value`` if it is an integer, not a bool, from ``least`` to ``most`` (or what a file can have, in bytes)."""
    if type(value) is not int:
        raise TypeError(f"a {type(value).__name__} is not an integer")
    if not least <= value <= (MOST_BYTES if most is None else most):
        raise ValueError("a number is out of range")
    return value


def flag(value: Any) -> bool:
    """``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"a {type(value).__name__} is neither true nor false")
    return value


def digest(value: Any) -> str:
    """``value`` if it is a digest of 32 bytes in hexadecimal."""
    if not re.fullmatch("[0-9a-f]{64}", text(value)):
        raise ValueError("a digest is none")
    return str(value)
