"""Puts shards together again: the Hugging Face checkpoint that they were cut from, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from tpctl.checkpoint.folder import INDEX
from tpctl.checkpoint.outputs import refuse_overlap
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.safetensors import Header, TensorSpec, build_header
from tpctl.errors import ShardFolderError
from tpctl.json_file import parse_object
from tpctl.manifest.manifest import Manifest, describe_ranks, rank_list
from tpctl.partition.dtypes import dtype_after_cast
from tpctl.partition.split import EACH, TensorSplit, tensor_names
from tpctl.sharding.cutting.options import cut_options
from tpctl.sharding.moving.copied import copy_file
from tpctl.sharding.moving.files import ByteCounter, Files, few_collections
from tpctl.sharding.moving.lanes import Move
from tpctl.sharding.moving.layout import Stored, copy_of, pile, whole
from tpctl.sharding.moving.opened import check_copied, open_extra, open_shards
from tpctl.sharding.moving.own_plan import OwnPlan, own_plan
from tpctl.sharding.moving.parts import reserve
from tpctl.sharding.moving.transfer import are_small, move_all
from tpctl.sharding.publishing.journal import write_synced
from tpctl.sharding.publishing.pending import PendingFolder, refuse_existing

Targets = dict[str, tuple[Stored, ...]]
"""Every place of each logical tensor of the source."""


@dataclass(frozen=True)
class MergeReport:
    """What was written; ``exact`` is false where the shards were cast, so that the source's bytes are gone."""

    folder: str
    source: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    exact: bool


@few_collections()
def merge_shards(folder: Path, out: Path, *, force: bool = False, progress: Progress | None = None) -> MergeReport:
    """Write the checkpoint that the shard folder ``folder`` was cut from to ``out``.

    Files, their layout, tensors, names and dtypes are the source's; every byte read is checked against its
    digest. Shards that were cast give the same checkpoint in the dtype they have.

    Raises:
        ShardFolderError: ``folder`` lacks a rank, is incomplete or damaged.
        OutputError: ``out`` exists and ``force`` is not given, is not apart from ``folder``, or cannot be written.
    """
    refuse_overlap(out, folder)
    refuse_existing(out, force)
    manifest = Manifest.load(folder)
    require_all_ranks(folder, manifest)
    shards = open_shards(folder, manifest, range(manifest.tp_size))
    extra = open_extra(folder, manifest)
    check_copied(folder, manifest)
    own = own_plan(folder, manifest)
    exact = {source for split in own.plan.splits if split.dtypes is not None for source in split.sources}
    exact |= own.tensors.keys() - own.plan.source_shapes.keys() - manifest.source.aliases.keys()
    headers = {name: _header(header, manifest.dtype, exact) for name, header in own.headers.items()}
    with PendingFolder.open(out, force=force) as pending:
        pending.clean()
        targets = _targets(own, headers, manifest.source.aliases, pending.path)
        moves = [move for split in own.plan.splits for move in _moves(split, shards[split.name], targets)]
        more = [held for name, held in shards.items() if name not in own.plan.shards[0]]
        moves += [Move(held, (), digest=False) for held in more]  # constants of another engine: checked, not kept
        moves += [Move((one,), targets[one.name], digest=False) for one in extra]
        total = sum(header.file_size for header in headers.values())
        pending.check_space(total + sum(file.size for file in manifest.files.values()))
        with Files() as files:
            for name, header in headers.items():
                path = pending.path / name
                with path.open("xb") as file:
                    file.write(header.raw)
                    reserve(file, header.file_size)
                files.open(path, os.O_RDWR)
            move_all(moves, files, ByteCounter(sum(move.nbytes for move in moves), "", progress))
            files.sync(pending.path / name for name in headers)
        for name, wanted in manifest.files.items():
            if copy_file(folder / name, pending.path / name) != wanted:
                raise ShardFolderError(f"{folder / name} was altered after it was copied; shard the model again")
        if manifest.source.index is not None:
            index = _index(manifest.source.index, headers, manifest.dtype)
            write_synced(pending.path / INDEX, index.encode())
        pending.publish()
    return MergeReport(
        folder=str(out),
        source=manifest.source.id,
        tensors=sum(len(header.tensors) for header in headers.values()),
        nbytes=total,
        files=tuple(headers),
        exact=manifest.dtype is None,
    )


def require_all_ranks(folder: Path, manifest: Manifest) -> None:
    """Raise ``ShardFolderError`` unless the folder holds every rank."""
    missing = [rank for rank in range(manifest.tp_size) if rank not in manifest.shards]
    if missing:
        raise ShardFolderError(
            f"{folder} holds {describe_ranks(manifest.shards)} of tp {manifest.tp_size}, but all are needed; "
            f"add {describe_ranks(missing)}: `tpctl shard MODEL --tp {manifest.tp_size}{cut_options(manifest)} "
            f"--ranks {rank_list(missing)} -o {quote(str(folder))}`"
        )


def _header(header: Header, dtype: str | None, exact: Container[str]) -> Header:
    """The source file's own header, or one for the cast tensors, all but ``exact`` ones."""
    if dtype is None:
        return header
    cast = (
        TensorSpec(name, info.dtype if name in exact else dtype_after_cast(info.dtype, dtype), info.shape)
        for name, info in header.tensors.items()
    )
    return build_header(cast, header.metadata)


def _targets(own: OwnPlan, headers: Mapping[str, Header], aliases: Mapping[str, str], folder: Path) -> Targets:
    """Where each source of the plan, and each tensor beside it, is to be written: once, or once more as an alias."""
    infos = {name: (info, folder / file) for file, header in headers.items() for name, info in header.tensors.items()}
    found: Targets = {}
    piled: set[str] = set()
    for split in own.plan.splits:
        for source in dict.fromkeys(part.source for part in split.parts):
            if split.stack is not None and EACH in source:
                names = list(tensor_names(source, split.stack.count))
                piled.update(names)
                found[source] = (pile(source, [infos[name] for name in names]),)
    for name, (info, path) in infos.items():
        if name not in piled:
            target, source = whole(info, path, stacked=name in own.plan.stacks), aliases.get(name, name)
            found[source] = (*found.get(source, ()), copy_of(target, source))
    return found


def _moves(split: TensorSplit, held: Sequence[Stored], targets: Targets) -> list[Move]:
    """The moves that read ``held``, the stored tensor of ``split`` of all ranks."""
    writes = tuple(
        target for source in dict.fromkeys(part.source for part in split.parts) for target in targets[source]
    )
    if split.by_rows and not are_small(writes):
        # The ranks' rows are apart (or equal, for copied KV heads), so each rank's part is written on its own.
        return [Move((one,), writes, digest=False) for one in held]
    return [Move(tuple(held), writes, digest=False)]


def _index(text: str, headers: Mapping[str, Header], dtype: str | None) -> str:
    """The source's index; with the total size of the cast tensors where they were cast."""
    if dtype is None:
        return text
    index = parse_object(text.encode(), "the source's index")
    tensors = (info for header in headers.values() for info in header.tensors.values())
    held = index.get("metadata")
    total = sum(info.nbytes for info in tensors)
    index["metadata"] = {**(held if isinstance(held, dict) else {}), "total_size": total}
    return json.dumps(index, indent=2) + "\n"
