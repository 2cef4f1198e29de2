"""What a shard folder holds and how it was cut, as data to print or draw."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.manifest.records import ManifestTensor
from tpctl.partition.plan import PlannedTensor
from tpctl.sharding.showing.meaning import Meaning


@dataclass(frozen=True)
class PieceReport:
    """A rectangle of a source tensor: half-open index ranges by axis.

    A ``source`` with ``{}`` in its name is one tensor an expert, with its number, the index of the first axis, there.
    """

    source: str
    label: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorReport:
    """One rank's stored tensor.

    Attributes:
        dim: the axis along which it is cut.
        padding: how many of its elements come from no source; they are ``fill``.
        stacked: the first axis is of experts.
        weight: the stored name that all tensors of one weight share, less what each of them is; empty for what is no
            linear's.
        format: how that weight is stored.
        values: it holds values; otherwise it says something about those of ``weight`` (a scale).
        holds: what one entry stands for, in words; empty: one value.
        axes: what there is an entry for, along each axis, where that is known.
    """

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
    stacked: bool
    weight: str
    format: str
    values: bool
    holds: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class ExtraReport:
    """A tensor of the source that no rank needs, and that ``merge`` gives back."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


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
    """What was found in order.

    Attributes:
        ranks: those whose files were read.
        hashed_bytes: bytes that match their digests; 0 where only ``source`` was asked for.
        compared_bytes: bytes that equal ``source``; 0 where there is none at hand.
        left_out: what was not looked at, in words, each with the reason.
    """

    ranks: tuple[int, ...]
    hashed_bytes: int
    compared_bytes: int
    source: str | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class InspectReport:
    """A shard folder, as its manifest describes it.

    Attributes:
        ranks: those asked for; by default all that the manifest lists.
        absent: the listed ranks whose files are not in the folder (as after ``download --local-ranks``).
        strays: weight files and indexes in the folder that the manifest does not list.
        imbalance: the largest rank's bytes over the mean; steps wait for that rank.
        expert_parallel, even: as of ``Manifest``.
        extra: what no rank holds.
    """

    folder: str
    source: str
    revision: str | None
    model_type: str
    tp_size: int
    dtype: str | None
    compat: str | None
    expert_parallel: int
    even: bool
    source_shapes: dict[str, tuple[int, ...]]
    ranks: tuple[RankReport, ...]
    extra: tuple[ExtraReport, ...]
    absent: tuple[int, ...]
    strays: tuple[str, ...]
    imbalance: float
    replicated_bytes: int
    verified: Verified | None


def tensor_report(
    name: str, tensor: ManifestTensor | PlannedTensor, file: str, dtype: str, meaning: Meaning, fill: int = 0
) -> TensorReport:
    """What is said of a stored ``tensor`` of a part ``file``."""
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
        file=file,
        rule=tensor.rule.value,
        dim=tensor.dim,
        dtype=dtype,
        shape=tensor.shape,
        nbytes=tensor_nbytes(dtype, tensor.shape),
        padding=prod(tensor.shape) - sum(piece.numel for piece in tensor.pieces),
        fill=fill,
        pieces=pieces,
        stacked=tensor.stacked,
        weight=meaning.weight,
        format=meaning.format,
        values=meaning.values,
        holds=meaning.holds,
        axes=meaning.axes,
    )
