"""Who holds which entries of an axis, and how much is held more than once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.manifest.records import ManifestTensor
from tpctl.partition.plan import Piece


@dataclass(frozen=True)
class Band:
    """Entries ``start`` to ``stop`` of a source's cut axis, and the ranks that hold them."""

    start: int
    stop: int
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start


def bands(held: Mapping[tuple[int, int], Sequence[int]], first: int, last: int) -> tuple[Band, ...]:
    """The ranges that ranks hold, which may overlap, as bands from ``first`` to ``last``, in order and without gap: one
    of no rank wherever nobody holds anything."""
    edges = sorted({first, last, *(edge for one in held for edge in one if first < edge < last)})
    return tuple(
        Band(start, stop, tuple(sorted({rank for (a, b), ranks in held.items() if a <= start < b for rank in ranks})))
        for start, stop in pairwise(edges)
    )


def copied_bytes(shards: Iterable[Mapping[str, ManifestTensor]]) -> int:
    """Bytes that ranks hold beyond the first copy of an element. A scale that two parts of one source have in common is
    one of each."""
    held: dict[tuple[str, str, str], list[tuple[ManifestTensor, Piece]]] = {}
    for tensors in shards:
        for name, tensor in tensors.items():
            for piece in tensor.pieces:
                held.setdefault((name, piece.source, piece.label), []).append((tensor, piece))
    known: dict[object, int] = {}  # layers are cut alike
    total = 0
    for found in held.values():
        tensor = found[0][0]
        form = (tensor.dtype, tensor.dim, tensor.stacked, tuple((piece.start, piece.shape) for _, piece in found))
        if form not in known:
            once = _once([piece for _, piece in found], tensor.dim, tensor.stacked)
            entries = sum(piece.numel for _, piece in found) - once
            known[form] = tensor_nbytes(tensor.dtype, (entries,))
        total += known[form]
    return total


def _once(pieces: Sequence[Piece], dim: int, stacked: bool) -> int:
    """How many elements of a source ``pieces`` are of, each counted once. They are alike on all axes but ``dim`` and
    that of experts."""
    shape = pieces[0].shape
    each = prod(length for axis, length in enumerate(shape) if axis != dim and not (stacked and axis == 0))
    experts = [(piece.start[0], piece.start[0] + piece.shape[0]) if stacked else (0, 1) for piece in pieces]
    along = [(piece.start[dim], piece.start[dim] + piece.shape[dim]) if shape else (0, 1) for piece in pieces]
    total = 0
    for first, stop in pairwise(sorted({edge for one in experts for edge in one})):
        ranges = {one: [0] for one, of in zip(along, experts, strict=True) if of[0] <= first < of[1]}
        if ranges:
            reach = (min(ranges)[0], max(end for _, end in ranges))
            total += (stop - first) * sum(len(band) for band in bands(ranges, *reach) if band.ranks)
    return total * each
