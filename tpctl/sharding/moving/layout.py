"""Where tensors lie in files: the same logical tensors as a checkpoint stores them and as shards do.

A *logical* tensor is one of the source checkpoint. Seen as a matrix (its first axis by all others), every layout cuts
it into rectangles whose rows lie one after the other in a file, without a gap:

    checkpoint                one region: the whole tensor
    column-parallel shards    regions of whole rows, one a rank
    row-parallel shards       regions of some columns, one a rank; the columns of a rank are all its tensor
    has

so moving between any two layouts is reading bands of rows and writing bands of rows (see ``transfer``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tpctl.checkpoint.safetensors import FileTensor
from tpctl.errors import CheckpointError
from tpctl.partition.dtypes import DTYPE_BITS
from tpctl.partition.plan import Piece, Shape
from tpctl.partition.split import Range


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the logical tensor ``source``, whose rows lie in a file from byte ``offset`` on, gapless."""

    source: str
    rows: Range
    cols: Range
    offset: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, and the regions that its leading bytes are; ``fill`` (0 or 1) is what the rest holds.

    ``rank`` is ``None`` in a source checkpoint. ``digest`` is the expected BLAKE3 of its bytes, where it is known.
    """

    name: str
    rank: int | None
    dtype: str
    shape: Shape
    path: Path
    offset: int
    nbytes: int
    regions: tuple[Region, ...]
    fill: int = 0
    digest: str | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name if self.rank is None else f"{self.name} of rank {self.rank}"


def width(shape: Shape) -> int:
    """The length in elements of one row of a tensor seen as a matrix."""
    return prod(shape[1:])


def item_size(dtype: str, name: str) -> int:
    """Bytes per element.

    Raises:
        CheckpointError: elements of ``dtype`` are smaller than a byte, so a cut could fall inside one.
    """
    bits = DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(f"tensor {name} has dtype {dtype} of {bits} bits, which tpctl cannot cut")
    return bits // 8


def whole(info: FileTensor, path: Path, rank: int | None = None, digest: str | None = None) -> Stored:
    """The tensor of that header entry, stored whole in ``path``."""
    rows = info.shape[0] if info.shape else 1
    region = Region(info.name, Range(0, rows), Range(0, width(info.shape)), info.start)
    return Stored(info.name, rank, info.dtype, info.shape, path, info.start, info.nbytes, (region,), digest=digest)


def in_shard(
    info: FileTensor,
    pieces: Iterable[Piece],
    path: Path,
    rank: int,
    *,
    fill: int = 0,
    digest: str | None = None,
) -> Stored:
    """The tensor of a part file's header entry, filled by ``pieces``."""
    size = item_size(info.dtype, info.name)
    line = width(info.shape)
    regions = []
    for piece in pieces:
        assert width(piece.shape) == line, f"{info.name}: pieces do not lie one below the other"
        inner = prod(piece.shape[2:])
        rows = Range(piece.start[0], piece.start[0] + piece.shape[0]) if piece.shape else Range(0, 1)
        first = piece.start[1] * inner if len(piece.start) > 1 else 0
        at = piece.at[0] if piece.at else 0
        regions.append(Region(piece.source, rows, Range(first, first + line), info.start + at * line * size))
    return Stored(
        info.name,
        rank,
        info.dtype,
        info.shape,
        path,
        info.start,
        info.nbytes,
        tuple(regions),
        fill=fill,
        digest=digest,
    )
