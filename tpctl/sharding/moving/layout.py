"""Where tensors lie in files: the same logical tensors as a checkpoint stores them and as shards do.

A *logical* tensor is one of the source checkpoint, seen as a matrix: its first axis by all others. Every layout cuts it
into rectangles, and a stored tensor is made of *strips* one below the other, each of one rectangle or of several beside
each other:

    checkpoint                            one strip: the whole tensor
    column-parallel shards                strips of whole rows, of one source each
    row-parallel shards                   strips of some columns; the columns of a rank are all its tensor has
    column-parallel, stored transposed    one strip, of some columns of each of q, k and v (AWQ, GPTQ)

so moving between any two layouts is reading bands of rows and writing bands of rows (see ``transfer``).

The weights of a mixture's experts are stacked, and alike: a stored tensor has the same strips for each of them, one
expert behind the other. In a checkpoint they are one tensor, too, or a *pile* of them, one for each expert; either is
one logical tensor here, an expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from tpctl.checkpoint.safetensors import FileTensor
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.partition.cuts import Range
from tpctl.partition.dtypes import DTYPE_BITS
from tpctl.partition.plan import Piece, Shape
from tpctl.partition.split import EACH

ONE = Range(0, 1)
"""The only frame of a tensor without experts."""


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

    Attributes:
        rank: whose; ``None`` in a source checkpoint.
        offset: its first byte in the file at ``path``.
        width: the length of its rows in elements.
        strips: of one frame.
        digest: the expected BLAKE3 of its bytes, where it is known.
        frames: the experts it holds, one frame behind the other.
        places: file and first byte of each frame, where it is a pile.
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
    frames: Range = ONE
    places: tuple[tuple[Path, int], ...] = ()

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name if self.rank is None else f"{self.name} of rank {self.rank}"

    @property
    def sources(self) -> Iterator[str]:
        """The logical tensors that it is made of."""
        return (region.source for strip in self.strips for region in strip.regions)

    @property
    def line(self) -> int:
        """Bytes of a row."""
        return self.width * item_size(self.dtype, self.name)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Rows of the strips of one frame, and bytes of each."""
        return sum(len(strip.rows) for strip in self.strips), self.line

    @property
    def frame_bytes(self) -> int:
        """Bytes of the strips of one frame."""
        return prod(self.frame_size)

    @property
    def covered(self) -> int:
        """How many of its bytes the strips of all frames are."""
        return self.frame_bytes * len(self.frames)

    @property
    def paths(self) -> Iterable[Path]:
        """The files that it lies in."""
        return dict.fromkeys(path for path, _ in self.places) if self.places else (self.path,)

    def place(self, frame: int) -> tuple[Path, int]:
        """The file of a frame, by its expert's number, and its first byte there."""
        at = frame - self.frames.start
        return self.places[at] if self.places else (self.path, self.offset + at * self.frame_bytes)


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
    frames = Range(0, info.shape[0]) if stacked else ONE
    width, strips = _uncut(info.name, info.shape[stacked:])
    return Stored(
        info.name,
        rank,
        info.dtype,
        info.shape,
        path,
        info.start,
        info.nbytes,
        width,
        strips,
        digest=digest,
        frames=frames,
    )


def pile(source: str, tensors: Sequence[tuple[FileTensor, Path]]) -> Stored:
    """The tensors of a checkpoint that ``source``, a name with ``{}`` for an expert's number, stands for, in order.

    They are of one dtype and shape.
    """
    info, path = tensors[0]
    width, strips = _uncut(source, info.shape)
    return Stored(
        source,
        None,
        info.dtype,
        (len(tensors), *info.shape),
        path,
        info.start,
        len(tensors) * info.nbytes,
        width,
        strips,
        frames=Range(0, len(tensors)),
        places=tuple((file, one.start) for one, file in tensors),
    )


def copy_of(stored: Stored, name: str) -> Stored:
    """``stored``, whose logical tensor goes by the ``name`` of the one that it is a copy of."""
    strips = (
        replace(strip, regions=tuple(replace(region, source=name) for region in strip.regions))
        for strip in stored.strips
    )
    return replace(stored, strips=tuple(strips))


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
    """The tensor of a part file's header entry, filled by ``pieces``; ``stacked``: its first axis is of experts.

    Raises:
        ShardFolderError: they do not fill its rows, or are of different experts.
    """
    shape, frames = info.shape[stacked:], ONE
    held: dict[int, list[tuple[int, Region]]] = {}
    for piece in pieces:
        if stacked:
            frames = Range(piece.start[0], piece.start[0] + piece.shape[0])
        at, left, region = _region(piece, shape, stacked)
        held.setdefault(at, []).append((left, region))
    strips = tuple(
        Strip(at, tuple(region for _, region in sorted(beside, key=lambda one: one[0])))
        for at, beside in sorted(held.items())
    )
    width = prod(shape[1:])
    stored = Stored(
        info.name,
        rank,
        info.dtype,
        info.shape,
        path,
        info.start,
        info.nbytes,
        width,
        strips,
        fill,
        digest,
        frames,
    )
    uneven = any(
        sum(len(region.cols) for region in strip.regions) != width
        or any(region.rows != strip.rows for region in strip.regions)
        for strip in strips
    )
    if uneven or (stacked and strips and stored.covered != info.nbytes):
        raise ShardFolderError(f"the pieces of {stored.label} do not fill it; shard the model again")
    return stored


def expert_name(source: str, frame: int, frames: Range) -> str:
    """What messages call the logical tensor ``source`` of one expert."""
    if EACH in source:
        return source.replace(EACH, str(frame))
    return source if frames == ONE else f"{source}[{frame}]"


def _uncut(name: str, shape: Shape) -> tuple[int, tuple[Strip, ...]]:
    rows, width = prod(shape[:1]), prod(shape[1:])
    return width, (Strip(0, (Region(name, Range(0, rows), Range(0, width)),)),)


def _region(piece: Piece, shape: Shape, stacked: bool) -> tuple[int, int, Region]:
    """The rectangle of a piece of a stored tensor (of an expert of it) of ``shape``; its first row and column there."""
    start, size, at = piece.start[stacked:], piece.shape[stacked:], piece.at[stacked:]
    rows, down = (Range(start[0], start[0] + size[0]), at[0]) if size else (ONE, 0)
    cols, left = ONE, 0
    if len(size) > 1:
        inner = prod(shape[2:])
        cols, left = Range(start[1], start[1] + size[1]).scaled(inner), at[1] * inner
    return down, left, Region(piece.source, rows, cols)
