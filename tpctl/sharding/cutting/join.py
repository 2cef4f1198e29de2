"""Adds ranks to a shard folder that holds others of the same cut: proof that they belong together, and the union."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from tpctl.checkpoint.folder import INDEX
from tpctl.checkpoint.progress import Progress
from tpctl.errors import OutputError, ShardFolderError
from tpctl.manifest.manifest import Manifest, describe_ranks, rank_list
from tpctl.manifest.records import Source
from tpctl.sharding.cutting.options import option
from tpctl.sharding.moving.contents import absent_ranks
from tpctl.sharding.moving.copied import copy_file
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.lanes import Move
from tpctl.sharding.moving.layout import Stored
from tpctl.sharding.moving.opened import open_extra, open_shards
from tpctl.sharding.moving.transfer import move_all

_NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_ELSE = "use --force to replace the folder, or choose another one (-o)"


def piece_name(ranks: Sequence[int]) -> str:
    """A file name's part for ``ranks``, such as ``ranks-0-1,4``."""
    name = rank_list(ranks)
    return f"ranks-{name if len(name) <= 60 else sha256(name.encode()).hexdigest()[:16]}"


def lacking(folder: Path, ranks: Sequence[int], tp_size: int) -> tuple[int, ...]:
    """Those of ``ranks`` (of ``tp_size``) that ``folder`` does not hold; all of them where there is no shard folder.

    Raises:
        OutputError: it holds every one, is cut for another size, or lacks files of ranks that it lists.
        ShardFolderError: its manifest is damaged.
    """
    if not folder.exists():
        return tuple(ranks)
    held = Manifest.load(folder)
    _same("tp size", folder, held.tp_size, tp_size)
    if absent := absent_ranks(folder, held):
        raise OutputError(
            f"{folder} lists {describe_ranks(absent)}, whose files are not in it; fetch them with "
            f"`tpctl download --local-ranks {rank_list(absent)}` where the shards are on the Hub, cut all ranks anew "
            "with --force, or choose another folder (-o)"
        )
    missing = tuple(rank for rank in ranks if rank not in held.shards)
    if not missing:
        raise OutputError(
            f"{folder} holds {describe_ranks(held.shards)} of tp {held.tp_size} already, and no other is asked for; "
            + _ELSE
        )
    return missing


def check_same_cut(folder: Path, held: Manifest, wanted: Manifest) -> None:
    """Raise ``OutputError`` unless ``held``, the manifest in ``folder``, cuts the same source in the same way.

    The sizes are the same already (see ``lacking``).

    Bytes of tensors are not looked at, and digests in ``wanted`` do not count, but for those of copied files.
    """
    for what, one, other in (
        ("model type", held.model_type, wanted.model_type),
        ("revision", held.source.revision, wanted.source.revision),
    ):
        _same(what, folder, one, other)
    for field in ("dtype", "max_part_size", "compat", "expert_parallel", "even"):
        if getattr(held, field) != getattr(wanted, field):
            one, other = option(held, field), option(wanted, field)
            raise OutputError(f"{folder} holds ranks cut with {one}, but {other} is asked for; ask for {one}, {_ELSE}")
    if (name := _other_file(held.source, wanted.source)) is not None:
        raise OutputError(f"{folder} holds ranks cut from a source with another {name}; {_ELSE}")
    for name in sorted({*held.files, *wanted.files}):
        if held.files.get(name) != wanted.files.get(name):
            raise OutputError(f"{folder} holds ranks cut from a source with another {name}; {_ELSE}")
    for rank, shard in held.shards.items():
        ours = wanted.tensors(rank)
        same = shard.tensors.keys() == ours.keys() and all(
            replace(one, digest="") == replace(ours[name], digest="") for name, one in shard.tensors.items()
        )
        if not same:
            raise OutputError(f"{folder} holds ranks cut by the rules of another tpctl; {_ELSE}")


def check_same_weights(
    folder: Path,
    held: Manifest,
    source: Source,
    inputs: Mapping[str, Sequence[Stored]],
    extra: Sequence[Stored],
    progress: Progress | None,
) -> None:
    """Raise ``OutputError`` unless the ranks in ``folder`` hold what ``inputs`` and ``extra`` would make of them.

    Where the Hub's digests say that the sources are the same, only sizes and headers are looked at; otherwise every
    element is compared, since no header tells two trainings of a model apart.
    """
    shards = open_shards(folder, held, sorted(held.shards))
    if all(
        one.sha256 and one.sha256 == other.sha256 for one, other in zip(held.source.files, source.files, strict=True)
    ):
        return
    moves = [Move(tuple(inputs[name]), stored) for name, stored in shards.items()]
    kept = {stored.name: stored for stored in open_extra(folder, held)}
    moves += [Move((stored,), (kept[stored.name],)) for stored in extra if stored.name in kept]
    try:
        with Files() as files:
            move_all(moves, files, ByteCounter(sum(move.nbytes for move in moves), "", progress), compare=True)
    except ShardFolderError as error:
        raise OutputError(f"{folder} holds ranks that this source does not give ({error}); {_ELSE}") from None


def union(folder: Path, held: Manifest, ours: Manifest, pending: Path) -> Manifest:
    """Bring the files of the ranks in ``folder`` into ``pending``, beside those of ``ours``; the manifest of all.

    They are linked, not moved, so that ``folder`` stays whole.
    """
    names = [part.file for shard in held.shards.values() for part in shard.parts]
    names += [part.file for part in held.extra.parts] if held.extra else []
    for name in names:
        target = pending / name
        target.unlink(missing_ok=True)
        try:
            os.link(folder / name, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            copy_file(folder / name, target)
    return replace(held, shards={**ours.shards, **held.shards})


def _same(what: str, folder: Path, one: object, other: object) -> None:
    if one != other:
        raise OutputError(f"{folder} holds ranks cut with {what} {one}, but {other} is asked for; {_ELSE}")


def _other_file(one: Source, other: Source) -> str | None:
    """What differs between two sources, as far as headers tell; a path may differ, as may what is known of digests."""
    if one.index != other.index:
        return INDEX
    if one.aliases != other.aliases:
        return "tied head"
    for first, second in zip(one.files, other.files, strict=False):
        digests = {first.sha256, second.sha256} - {None}
        if (first.name, first.size, first.header) != (second.name, second.size, second.header) or len(digests) > 1:
            return first.name
    return None if len(one.files) == len(other.files) else "number of files"
