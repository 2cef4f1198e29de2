"""What a shard folder holds and how it was cut, as data to print or draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.hub_cache import cached
from tpctl.checkpoint.safetensors import parse_header, tensor_nbytes
from tpctl.checkpoint.sources import HUB_ID, local_path
from tpctl.errors import CheckpointError, SourceError
from tpctl.partition.manifest import Manifest
from tpctl.partition.records import Shard, ShardTensor
from tpctl.sharding.files import Progress
from tpctl.sharding.recipe import check_ranks
from tpctl.sharding.verify import open_shards, verify_digests, verify_source


@dataclass(frozen=True)
class PieceReport:
    """A rectangle of a source tensor: half-open index ranges by axis."""

    source: str
    label: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorReport:
    """One rank's stored tensor. ``padding`` counts the elements that come from no source; they are ``fill``."""

    name: str
    file: str
    rule: str
    dim: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    padding: int
    fill: int
    pieces: tuple[PieceReport, ...]


@dataclass(frozen=True)
class RankReport:
    """One rank's shard."""

    rank: int
    files: tuple[str, ...]
    nbytes: int
    parameters: int
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True)
class Verified:
    """What ``--verify`` found in order: bytes hashed, and bytes compared with ``source`` (0 where not at hand)."""

    hashed_bytes: int
    compared_bytes: int
    source: str | None


@dataclass(frozen=True)
class InspectReport:
    """A shard folder. ``imbalance`` is the largest rank's bytes over the mean; steps wait for that rank."""

    folder: str
    source: str
    revision: str | None
    model_type: str
    tp_size: int
    dtype: str | None
    compat: str | None
    source_shapes: dict[str, tuple[int, ...]]
    ranks: tuple[RankReport, ...]
    imbalance: float
    replicated_bytes: int
    verified: Verified | None


def inspect_shards(
    folder: Path,
    *,
    ranks: Sequence[int] | None = None,
    verify: bool = False,
    source: Path | None = None,
    progress: Progress | None = None,
) -> InspectReport:
    """Describe the shard folder; sizes and headers are always checked.

    Args:
        ranks: the ranks to describe and verify; all that the folder holds by default.
        verify: hash every byte and compare with the manifest.
        source: a checkpoint folder to compare every element with.

    Raises:
        ShardFolderError: the folder is incomplete, altered, or differs from ``source``.
        PartitionError: a rank does not exist.
    """
    manifest = Manifest.load(folder)
    chosen = tuple(manifest.shards) if ranks is None else check_ranks(ranks, manifest.tp_size)
    open_shards(folder, manifest, chosen)
    verified = None
    if verify or source is not None:
        hashed = verify_digests(folder, manifest, chosen, progress) if verify else 0
        compared = verify_source(folder, manifest, chosen, source, progress) if source is not None else 0
        verified = Verified(hashed, compared, None if source is None else str(source))
    sizes = [shard.nbytes for shard in manifest.shards.values()]
    return InspectReport(
        folder=str(folder),
        source=manifest.source.id,
        revision=manifest.source.revision,
        model_type=manifest.model_type,
        tp_size=manifest.tp_size,
        dtype=manifest.dtype,
        compat=manifest.compat,
        source_shapes=_source_shapes(manifest),
        ranks=tuple(_rank(manifest, rank) for rank in chosen),
        imbalance=max(sizes) * len(sizes) / sum(sizes),
        replicated_bytes=_replicated(manifest),
        verified=verified,
    )


def _source_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    files = manifest.source.files
    headers = (parse_header(file.header.encode(), file.size, file.name) for file in files)
    return {name: tensor.shape for header in headers for name, tensor in header.tensors.items()}


def source_at_hand(manifest: Manifest) -> Path | None:
    """The folder that the shards were cut from, if it is on this machine and still has the same headers."""
    found = _local_source(manifest.source.id, manifest.source.revision)
    if found is None:
        return None
    try:
        files = CheckpointFolder.open(found).files
    except CheckpointError:
        return None
    known = [(file.name, file.size, file.header) for file in manifest.source.files]
    return found if [(file.name, file.size, file.header.text) for file in files] == known else None


def _local_source(name: str, revision: str | None) -> Path | None:
    try:
        path = local_path(name)
    except SourceError:
        return None
    if path.is_dir():
        return path
    if HUB_ID.fullmatch(name):
        copy = cached(name, revision)
        return None if copy is None else copy[0]
    return None


def _rank(manifest: Manifest, rank: int) -> RankReport:
    shard = manifest.shard(rank)
    tensors = tuple(_tensor(name, tensor, shard) for name, tensor in shard.tensors.items())
    return RankReport(
        rank=rank,
        files=tuple(part.file for part in shard.parts),
        nbytes=shard.nbytes,
        parameters=sum(prod(tensor.shape) for tensor in shard.tensors.values()),
        tensors=tensors,
    )


def _tensor(name: str, tensor: ShardTensor, shard: Shard) -> TensorReport:
    pieces = tuple(
        PieceReport(
            piece.source,
            piece.label,
            tuple((first, first + size) for first, size in zip(piece.start, piece.shape, strict=True)),
        )
        for piece in tensor.pieces
    )
    return TensorReport(
        name=name,
        file=shard.parts[tensor.part].file,
        rule=tensor.rule.value,
        dim=tensor.dim,
        dtype=tensor.dtype,
        shape=tensor.shape,
        nbytes=tensor_nbytes(tensor.dtype, tensor.shape),
        padding=prod(tensor.shape) - sum(piece.numel for piece in tensor.pieces),
        fill=tensor.fill,
        pieces=pieces,
    )


def _replicated(manifest: Manifest) -> int:
    """Bytes that ranks hold beyond the first copy of an element."""
    seen: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    extra = 0
    for shard in manifest.shards.values():
        for tensor in shard.tensors.values():
            for piece in tensor.pieces:
                key = (piece.source, piece.start, piece.shape)
                if key in seen:
                    extra += tensor_nbytes(tensor.dtype, piece.shape)
                seen.add(key)
    return extra
