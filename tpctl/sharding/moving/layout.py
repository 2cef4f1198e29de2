"""Where tensors lie in files: the same logical tensors as a checkpoint stores them and as shards do.

A *logical* tensor is one of the source checkpoint, seen as a matrix: its first axis by all others. Where a tensor of
the source stacks experts along its first axis, each of them is a logical tensor, ``NAME[EXPERT]``. Every layout cuts it
into rectangles, and a stored tensor is made of *strips* one below the other, each of one rectangle or of several beside
each other:

    checkpoint                            one strip: the whole tensor
    column-parallel shards                strips of whole rows, of one source each
    row-parallel shards                   strips of some columns; the columns of a rank are all its tensor has
    column-parallel, stored transposed    one strip, of some columns of each of q, k and v (AWQ, GPTQ)

so moving between any two layouts is reading bands of rows and writing bands of rows (see ``transfer``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from tpctl.checkpoint.safetensors import FileTensor
from tpctl.errors import CheckpointError
from tpctl.partition.cuts import Range
from tpctl.partition.dtypes import DTYPE_BITS
from tpctl.partition.plan import Piece, Shape
from tpctl.partition.split import EACH


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the logical tensor ``source``; in elements, as the matrix has them."""

    source: str
    rows: Range
    cols: Range


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of a stored tensor, from its row ``at`` on: ``regions`` of as many rows, beside each other."""

    at: int
    regions: tuple[Region, ...]

    @property
    def rows(self) -> Range:
        """The rows of its sources, which are the same for all."""
        return self.regions[0].rows


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, and the strips that its leading bytes are; ``fill`` (0 or 1) is what the rest holds.

    ``width`` is the length of its rows in elements. ``rank`` is ``None`` in a source checkpoint. ``digest`` is the
    expected BLAKE3 of its bytes, where it is known.
    """

    name: str
    rank: int | None
    dtype: str
    shape: Shape
    path: Path
    offset: int
    nbytes: int
    width: int
    strips: tuple[Strip, ...]
    fill: int = 0
    digest: str | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name if self.rank is None else f"{self.name} of rank {self.rank}"

    @property
    def regions(self) -> Iterator[Region]:
        return (region for strip in self.strips for region in strip.regions)

    @property
    def line(self) -> int:
        """Bytes of a row."""
        return self.width * item_size(self.dtype, self.name)

    @property
    def covered(self) -> int:
        """How many of its bytes the strips are."""
        return sum(len(strip.rows) for strip in self.strips) * self.line


def item_size(dtype: str, name: str) -> int:
    """Bytes per element.

    Raises:
        CheckpointError: elements of ``dtype`` are smaller than a byte, so a cut could fall inside one.
    """
    bits = DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(f"tensor {name} has dtype {dtype} of {bits} bits, which tpctl cannot cut")
    return bits // 8


def whole(
    info: FileTensor, path: Path, rank: int | None = None, digest: str | None = None, *, stacked: bool = False
) -> Stored:
    """The tensor of that header entry, stored whole in ``path``; ``stacked``: its first axis is of experts."""
    shape = info.shape[stacked:]
    rows, width = prod(shape[:1]), prod(shape[1:])
    names = [f"{info.name}[{expert}]" for expert in range(info.shape[0])] if stacked else [info.name]
    strips = tuple(
        Strip(place * rows, (Region(name, Range(0, rows), Range(0, width)),)) for place, name in enumerate(names)
    )
    return Stored(info.name, rank, info.dtype, info.shape, path, info.start, info.nbytes, width, strips, 0, digest)


def copy_of(stored: Stored, name: str) -> Stored:
    """``stored``, whose logical tensor goes by the ``name`` of the one that it is a copy of."""
    strips = tuple(
        replace(strip, regions=tuple(replace(region, source=name) for region in strip.regions))
        for strip in stored.strips
    )
    return replace(stored, strips=strips)


def in_shard(
    info: FileTensor,
    pieces: Iterable[Piece],
    path: Path,
    rank: int,
    *,
    stacked: bool = False,
    fill: int = 0,
    digest: str | None = None,
) -> Stored:
    """The tensor of a part file's header entry, filled by ``pieces``; ``stacked``: its first axis is of experts."""
    shape = info.shape[stacked:]
    width = prod(shape[1:])
    held: dict[int, list[tuple[int, Region]]] = {}
    for piece in pieces:
        for at, left, region in _regions(piece, shape, stacked):
            held.setdefault(at, []).append((left, region))
    strips = []
    for at, beside in sorted(held.items()):
        regions = tuple(region for _, region in sorted(beside, key=lambda one: one[0]))
        assert sum(len(region.cols) for region in regions) == width, f"{info.name}: pieces do not fill its rows"
        assert len({region.rows for region in regions}) == 1, f"{info.name}: pieces beside each other differ in rows"
        strips.append(Strip(at, regions))
    return Stored(
        info.name,
        rank,
        info.dtype,
        info.shape,
        path,
        info.start,
        info.nbytes,
        width,
        tuple(strips),
        fill,
        digest,
    )


def _regions(piece: Piece, shape: Shape, stacked: bool) -> Iterator[tuple[int, int, Region]]:
    """The rectangles of a piece of a stored tensor (of an expert of it) of ``shape``, each with its first row and
    column there."""
    start, size, at = piece.start[stacked:], piece.shape[stacked:], piece.at[stacked:]
    rows, down = (Range(start[0], start[0] + size[0]), at[0]) if size else (Range(0, 1), 0)
    inner = prod(shape[2:])
    cols, left = (
        (Range(start[1], start[1] + size[1]).scaled(inner), at[1] * inner) if len(size) > 1 else (Range(0, 1), 0)
    )
    if not stacked:
        yield down, left, Region(piece.source, rows, cols)
        return
    for place in range(piece.shape[0]):
        expert = piece.start[0] + place
        each = EACH in piece.source
        source = piece.source.replace(EACH, str(expert)) if each else f"{piece.source}[{expert}]"
        yield (piece.at[0] + place) * prod(shape[:1]) + down, left, Region(source, rows, cols)
