"""The entries of a shard folder's manifest, and how they look in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpctl.partition.plan import Piece, Shape
from tpctl.partition.split import Rule


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
class ShardTensor:
    """A stored tensor: where it is, its BLAKE3 digest, and the pieces of source tensors that fill it.

    What no piece covers is ``fill``: zero for a padded vocabulary, one for a scale that a serving engine expects.
    """

    part: int
    dtype: str
    shape: Shape
    digest: str
    rule: Rule
    dim: int
    pieces: tuple[Piece, ...]
    fill: int = 0


@dataclass(frozen=True)
class Shard:
    """One rank's part files and the tensors in them, by name."""

    parts: tuple[Part, ...]
    tensors: Mapping[str, ShardTensor]

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
            }
            for name, tensor in shard.tensors.items()
        },
    }


def shard_from_dict(value: Mapping[str, Any]) -> Shard:
    if any(Path(part["file"]).name != part["file"] for part in value["parts"]):
        raise ValueError("a part file lies outside the folder")
    return Shard(
        tuple(Part(p["file"], p["size"], p["header_size"], p["header_sha256"]) for p in value["parts"]),
        {
            name: ShardTensor(
                t["part"],
                t["dtype"],
                tuple(t["shape"]),
                t["digest"],
                Rule(t["rule"]),
                t["dim"],
                tuple(
                    Piece(p["source"], tuple(p["start"]), tuple(p["shape"]), tuple(p["at"]), p["label"])
                    for p in t["pieces"]
                ),
                t["fill"],
            )
            for name, t in value["tensors"].items()
        },
    )
