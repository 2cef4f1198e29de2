"""Compares a shard folder with the checkpoint that it was cut from, element by element.

Nothing of the manifest is believed: the plan is made anew from the source's own ``config.json``, the manifest has to
say the same, and the bytes in the shards have to be what this plan takes from the source. A manifest that was forged
together with its shards (heads swapped, digests right) is thus found too.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import checked_source_plan, second_copies
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.hub import METADATA
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.safetensors import FileTensor
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.manifest.records import ManifestTensor
from tpctl.partition.dtypes import dtype_after_cast
from tpctl.partition.plan import Piece, PlannedTensor
from tpctl.sharding.moving.expected import Expected
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.lanes import Move
from tpctl.sharding.moving.layout import Stored, copy_of, in_shard
from tpctl.sharding.moving.opened import open_extra, tensor_infos
from tpctl.sharding.moving.own_plan import cutting_of, refuse_older_names
from tpctl.sharding.moving.sources import SourceTensors
from tpctl.sharding.moving.transfer import move_all

BLOCK_BYTES = 1 << 20


def verify_source(
    folder: Path,
    manifest: Manifest,
    ranks: Sequence[int],
    source: Path,
    *,
    extra: bool = True,
    only: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Compare every element of ``ranks``' shards with the checkpoint in ``source``; the number of bytes.

    With ``only``, the name of a stored tensor, that one's are compared and nothing else is.

    Padding, tensors that no rank needs (where ``extra`` says that their file is here) and copied files are compared
    as well, and no tensor may be missing or be one too many.

    Raises:
        CheckpointError, UnsupportedModelError: ``source`` is unsound, or belongs to another model.
        ShardFolderError: something differs; the message names tensor, rank and place, or the file.
    """
    if (source / MANIFEST).is_file():
        raise CheckpointError(f"{source} holds shards; give --source the checkpoint that {folder} was cut from")
    config = ModelConfig.load(source)  # of another family, it may have no experts to deal
    if manifest.model_type != config.model_type:
        raise ShardFolderError(f"{folder} is of a {manifest.model_type} model, but {source} of a {config.model_type}")
    config = ModelConfig.load(source, cutting_of(manifest))
    checkpoint = CheckpointFolder.open(source)
    plan = checked_source_plan(config, checkpoint.shapes, manifest.tp_size)
    tensors = SourceTensors(checkpoint, plan)
    held = {name: info for name, (_, info) in checkpoint.tensors.items()}
    exact = {split.name for split in plan.splits if split.dtypes is not None}
    if config.scheme is None and ModelConfig.load(folder).scheme is not None:
        raise ShardFolderError(
            f"{folder} is of a quantised model, but {source} is not quantised; give --source the quantised checkpoint "
            "that it was cut from"
        )
    refuse_older_names(folder / MANIFEST, manifest, config)
    expected = Expected.of(config, plan, manifest.compat)
    for rank in manifest.shards:
        _check_entries(manifest, rank, expected, held, exact)
    moves = _moves(folder, manifest, ranks, expected, {split.name: tensors.of(split) for split in plan.splits}, only)
    if only is None:
        rest = held.keys() - plan.source_shapes.keys()
        moves += _other_moves(folder, manifest, second_copies(config, held), rest, tensors, extra)
    total = sum(move.nbytes for move in moves)
    with Files() as files:
        move_all(moves, files, ByteCounter(total, "", progress), compare=True)
    return total + (_compare_copied(folder, manifest, checkpoint) if only is None else 0)


def _check_entries(
    manifest: Manifest, rank: int, expected: Expected, tensors: Mapping[str, FileTensor], exact: Container[str]
) -> None:
    """Raise unless the manifest describes exactly the tensors of ``rank`` that the plan makes of the source."""
    held, wanted = manifest.tensors(rank), expected.shards[rank]
    if missing := [name for name in wanted if name not in held]:
        raise ShardFolderError(f"rank {rank} lacks {missing[0]}, which the source's config.json asks for")
    if more := [name for name in held if name not in wanted]:
        raise ShardFolderError(f"rank {rank} holds {more[0]}, which the source's config.json does not ask for")
    for name, stored in wanted.items():
        entry = held[name]
        for field in expected.differing(rank, name, entry):
            verb, planned = "are" if field == "pieces" else "is", expected.fills.get(name, 0)
            raise ShardFolderError(
                f"{name} of rank {rank} is not cut as the source's config.json asks for: its {field} {verb} "
                f"{_brief(entry, field, entry.fill)} by the manifest, {_brief(stored, field, planned)} by the plan"
            )
        target = None if name in exact else manifest.dtype
        sources = (tensors[source] for piece in stored.pieces for source in piece.tensors)
        dtypes = {dtype_after_cast(source.dtype, target) for source in sources} or {entry.dtype}
        if dtypes != {entry.dtype}:
            raise ShardFolderError(
                f"{name} of rank {rank} is {entry.dtype} by the manifest, but {', '.join(sorted(dtypes))} by the source"
            )


def _brief(record: ManifestTensor | PlannedTensor, field: str, fill: int) -> str:
    if field == "fill":
        return str(fill)
    if field == "stack":
        return str(record.stacked)
    if field != "pieces":
        return str(getattr(record, field))
    return " + ".join(_range(piece, record.dim, record.stacked) for piece in record.pieces) or "none"


def _range(piece: Piece, dim: int, stacked: bool) -> str:
    """``mlp.experts.{}.gate_proj.weight[0:64, 0:384]``: experts, then entries of the cut axis."""
    axes = dict.fromkeys([0, dim] if stacked else [dim])
    return f"{piece.source}[{', '.join(f'{piece.start[a]}:{piece.start[a] + piece.shape[a]}' for a in axes)}]"


def _moves(
    folder: Path,
    manifest: Manifest,
    ranks: Sequence[int],
    expected: Expected,
    inputs: Mapping[str, tuple[Stored, ...]],
    only: str | None,
) -> list[Move]:
    """One comparison for each stored tensor (or ``only`` that one): what the plan reads of the source, against what
    the ranks have."""
    found: dict[str, list[Stored]] = {}
    for rank in ranks:
        for name, (info, path) in tensor_infos(folder, manifest, rank).items():
            planned, fill = expected.shards[rank][name], expected.fills.get(name, 0)
            held = in_shard(info, planned.pieces, path, rank, stacked=planned.stacked, fill=fill)
            if only in (None, name):
                found.setdefault(name, []).append(held)
    return [Move(inputs.get(name, ()), tuple(stored)) for name, stored in found.items()]


def _other_moves(
    folder: Path,
    manifest: Manifest,
    copies: dict[str, str],
    rest: Collection[str],
    tensors: SourceTensors,
    here: bool,
) -> list[Move]:
    """Comparisons of the tensors that no rank holds: those in the extra file, and a tied head's second copy."""
    aliases = dict(manifest.source.aliases)
    if aliases != copies:
        raise ShardFolderError(f"the manifest's aliases {aliases} are not the source's second copies of tensors")
    listed = set() if manifest.extra is None else set(manifest.extra.tensors)
    if wrong := sorted(listed ^ (set(rest) - set(aliases))):
        which = "lacks" if wrong[0] in rest else "has, beyond the source's,"
        raise ShardFolderError(f"{folder} {which} the tensor {wrong[0]}, which no rank needs")
    moves = []
    for one in open_extra(folder, manifest) if here else ():
        if one.dtype != tensors[one.name].dtype or one.shape != tensors[one.name].shape:
            raise ShardFolderError(f"{one.name} is {one.dtype} {one.shape}, which the source's is not")
        moves.append(Move((tensors[one.name],), (one,)))
    for name, original in aliases.items():
        copy = tensors[name]
        if copy.shape != tensors[original].shape:
            raise CheckpointError(
                f"{name} and {original} differ in shape in the source, so one is no copy of the other"
            )
        moves.append(Move((tensors[original],), (copy_of(copy, original),)))
    return moves


def _compare_copied(folder: Path, manifest: Manifest, checkpoint: CheckpointFolder) -> int:
    """Compare the copied files with the source's, byte for byte; their bytes.

    A file that lies beside the source now need not have been there when it was cut, unless something reads it.
    """
    known = {path.name for path in checkpoint.small_files()}
    if lost := sorted((known & METADATA) - set(manifest.files)):
        raise ShardFolderError(f"{folder} lacks {lost[0]}, which {checkpoint.path} has")
    total = 0
    for name in manifest.files:
        if name not in known:
            raise ShardFolderError(f"{folder / name} is not in {checkpoint.path}")
        if not _equal(folder / name, checkpoint.path / name):
            raise ShardFolderError(f"{folder / name} differs from {checkpoint.path / name}")
        total += (folder / name).stat().st_size
    return total


def _equal(one: Path, other: Path) -> bool:
    try:
        with one.open("rb") as first, other.open("rb") as second:
            return all(a == b for a, b in zip(_blocks(first), _blocks(second), strict=True))
    except ValueError:  # one is longer
        return False
    except OSError as error:
        raise ShardFolderError(f"{error.filename} cannot be read: {error.strerror}") from None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block
