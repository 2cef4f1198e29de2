"""Writes a shard folder: part by part, resumable, with a digest of everything, published in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpctl.checkpoint.safetensors import NewTensor, build_header
from tpctl.partition.manifest import MANIFEST, Manifest
from tpctl.partition.plan import StoredTensor
from tpctl.partition.records import CopiedFile, Shard, ShardTensor
from tpctl.partition.split import Rule
from tpctl.sharding.files import Files, Progress, Tally
from tpctl.sharding.journal import Digests, Journal, write_synced
from tpctl.sharding.layout import in_shard, whole
from tpctl.sharding.parts import PartFile, assign_parts, part_files
from tpctl.sharding.publish import PendingFolder
from tpctl.sharding.recipe import Recipe
from tpctl.sharding.transfer import Move, run

EXTRA_FILE = "tpctl-extra.safetensors"
"""Tensors of the source that no rank needs; a name that serving engines do not look for."""


@dataclass(frozen=True)
class ShardReport:
    """What was written. Sizes in bytes; ``imbalance`` is the largest rank's bytes over the mean;
    ``resumed_bytes`` were complete already, from a run that was killed."""

    folder: str
    source: str
    model_type: str
    tp_size: int
    dtype: str | None
    compat: str | None
    tensors_per_rank: int
    bytes_per_rank: dict[int, int]
    files: int
    imbalance: float
    resumed_bytes: int


def write_shards(
    recipe: Recipe, out: Path, *, force: bool, check: Callable[[], None], progress: Progress | None
) -> ShardReport:
    """Write the shard folder ``out`` by ``recipe``.

    Args:
        check: called before publishing; raises if what was read has changed meanwhile.

    Raises:
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
        CheckpointError, ShardFolderError: what is read is damaged.
    """
    parts = assign_parts(recipe.shards, recipe.dtypes, recipe.max_part_size)
    files = [f for rank in recipe.ranks for f in part_files(rank, recipe.shards[rank], recipe.dtypes, parts)]
    if recipe.extra:
        header = build_header(NewTensor(stored.name, stored.dtype, stored.shape) for stored in recipe.extra)
        files.append(PartFile(None, max(parts.values()) + 1, EXTRA_FILE, header))
    with PendingFolder.open(out, force=force) as pending:
        writer = _Writer(recipe, pending, files, parts, progress)
        digests = writer.write_parts()
        copied = writer.copy_small_files()
        check()
        manifest = writer.manifest(digests, copied)
        write_synced(pending.path / MANIFEST, manifest.text().encode())
        pending.clean({MANIFEST, *copied, *(file.file for file in files)})
        pending.publish()
    sizes = {rank: shard.nbytes for rank, shard in manifest.shards.items()}
    return ShardReport(
        folder=str(out),
        source=recipe.source.id,
        model_type=recipe.model_type,
        tp_size=len(recipe.shards),
        dtype=recipe.dtype,
        compat=recipe.compat,
        tensors_per_rank=len(parts),
        bytes_per_rank=sizes,
        files=len(files),
        imbalance=max(sizes.values()) * len(sizes) / sum(sizes.values()),
        resumed_bytes=writer.resumed,
    )


class _Writer:
    def __init__(
        self,
        recipe: Recipe,
        pending: PendingFolder,
        files: Sequence[PartFile],
        parts: Mapping[str, int],
        progress: Progress | None,
    ) -> None:
        self.recipe, self.pending, self.parts = recipe, pending, parts
        self.files: dict[int, list[PartFile]] = {}
        for file in files:
            self.files.setdefault(file.index, []).append(file)
        self.journal = Journal(pending.path, repr([recipe.identity, recipe.shards, recipe.fills]), files)
        self.resumed = 0
        self.tally = Tally(sum(file.header.file_size - file.header.size for file in files), "", progress)

    def write_parts(self) -> Digests:
        """Write every part file of every rank; the files of one part are finished together.

        Parts that a killed run completed are taken over.
        """
        done: dict[int, Digests] = {}
        for index, files in self.files.items():
            if (digests := self.journal.recall(index, files, self.tally)) is not None:
                done[index] = digests
        self.resumed = sum(file.header.file_size for index in done for file in self.files[index])
        kept = {file.file for index in done for file in self.files[index]}
        self.pending.clean(kept | {f"part-{index}.json" for index in done})
        left = [index for index in sorted(self.files) if index not in done]
        needed = sum(file.header.file_size for index in left for file in self.files[index])
        self.pending.check_space(needed + sum(path.stat().st_size for path in self.recipe.small_files))
        for index in left:
            done[index] = self._write_part(index, self.files[index])
            self.journal.note(index, done[index])
        return {key: digest for digests in done.values() for key, digest in digests.items()}

    def _write_part(self, index: int, files: Sequence[PartFile]) -> Digests:
        moves: list[Move] = []
        with Files() as handles:
            for file in files:
                handles.open(file.create(self.pending.path), os.O_RDWR)
            if files[0].rank is None:
                path, tensors = self.pending.path / EXTRA_FILE, files[0].header.tensors
                moves += [Move((extra,), (whole(tensors[extra.name], path),)) for extra in self.recipe.extra]
            else:
                for name in (name for name, part in self.parts.items() if part == index):
                    moves += self._moves(name, files)
            digests = run(moves, handles, self.tally)
            handles.sync(self.pending.path / file.file for file in files)
        return digests

    def _moves(self, name: str, files: Sequence[PartFile]) -> list[Move]:
        reads = self.recipe.inputs[name]
        writes = []
        for file in files:
            assert file.rank is not None
            pieces = self.recipe.shards[file.rank][name].pieces
            path, info = self.pending.path / file.file, file.header.tensors[name]
            writes.append(in_shard(info, pieces, path, file.rank, fill=self.recipe.fills.get(name, 0)))
        rule = self.recipe.shards[0][name].rule
        checked = any(stored.digest is not None for stored in reads)
        if checked or rule in (Rule.ROW, Rule.REPLICATED):
            # The ranks read the same bytes, or what is read is hashed whole: one pass for all of them.
            return [Move(reads, tuple(writes))]
        return [Move(reads, (write,)) for write in writes]

    def copy_small_files(self) -> dict[str, CopiedFile]:
        from blake3 import blake3

        copied = {}
        for path in self.recipe.small_files:
            data = path.read_bytes()
            write_synced(self.pending.path / path.name, data)
            copied[path.name] = CopiedFile(len(data), blake3(data).hexdigest())
        return copied

    def manifest(self, digests: Digests, copied: Mapping[str, CopiedFile]) -> Manifest:
        recipe, files = self.recipe, [file for files in self.files.values() for file in files]
        shards = {}
        for rank in recipe.ranks:
            tensors = {name: self._entry(rank, t, digests) for name, t in recipe.shards[rank].items()}
            shards[rank] = Shard(tuple(file.entry for file in files if file.rank == rank), tensors)
        extra = None
        if recipe.extra:
            entries = {
                s.name: ShardTensor(0, s.dtype, s.shape, digests[None, s.name], Rule.REPLICATED, 0, ())
                for s in recipe.extra
            }
            extra = Shard((files[-1].entry,), entries)
        return Manifest(
            source=recipe.source,
            tp_size=len(recipe.shards),
            model_type=recipe.model_type,
            dtype=recipe.dtype,
            max_part_size=recipe.max_part_size,
            compat=recipe.compat,
            shards=shards,
            extra=extra,
            files=copied,
        )

    def _entry(self, rank: int, stored: StoredTensor, digests: Digests) -> ShardTensor:
        return ShardTensor(
            part=self.parts[stored.name],
            dtype=self.recipe.dtypes[stored.name],
            shape=stored.shape,
            digest=digests[rank, stored.name],
            rule=stored.rule,
            dim=stored.dim,
            pieces=stored.pieces,
            fill=self.recipe.fills.get(stored.name, 0),
        )
