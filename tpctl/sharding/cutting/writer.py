"""Writes a shard folder: part by part, resumable, with a digest of everything, published in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.errors import OutputError, OverflowedError, ShardFolderError, TpctlError
from tpctl.manifest.file import check_size
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.manifest.records import CopiedFile, ManifestTensor, Shard
from tpctl.partition.plan import PlannedTensor
from tpctl.partition.split import Rule
from tpctl.sharding.cutting.join import check_same_cut, check_same_weights, lacking, piece_name, union
from tpctl.sharding.cutting.recipe import Recipe
from tpctl.sharding.moving.copied import copy_file
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.lanes import Move
from tpctl.sharding.moving.layout import in_shard, whole
from tpctl.sharding.moving.parts import EXTRA_FILE, PartFile, assign_parts, part_files
from tpctl.sharding.moving.transfer import are_small, move_all
from tpctl.sharding.publishing.journal import Digests, Journal, note_name, write_synced
from tpctl.sharding.publishing.pending import PendingFolder

MANY = 20_000
"""Tensors of all ranks whose manifest may be too large to be read again."""


@dataclass(frozen=True)
class ShardReport:
    """The folder that was written. Sizes in bytes; ``imbalance`` is the largest rank's bytes over the mean.

    Attributes:
        expert_parallel: groups of ranks that whole experts were dealt to.
        even: borders may divide what has one scale.
        missing_ranks: those that the folder does not hold, since nobody asked for them yet.
        resumed_bytes: were complete already, from a run that was killed or failed.
        dropped_bytes: such a run's, but of another source, revision or set of options.
    """

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
    missing_ranks: tuple[int, ...]
    resumed_bytes: int
    dropped_bytes: int
    expert_parallel: int = 1
    even: bool = False


def write_shards(
    recipe: Recipe, out: Path, *, force: bool, add: bool, check: Callable[[], None], progress: Progress | None
) -> ShardReport:
    """Write the shard folder ``out`` by ``recipe``.

    Args:
        add: without ``force``, add the recipe's ranks to those that ``out`` holds, if it is a shard folder.
        check: called before publishing; raises if what was read has changed meanwhile.

    Raises:
        OutputError: ``out`` exists and may be neither replaced nor added to, or cannot be written.
        CheckpointError, ShardFolderError: what is read is damaged.
        OverflowedError: a value is beyond the range of what it is cast to.
    """
    add = add and not force
    parts = assign_parts(recipe.shards, recipe.dtypes, recipe.max_part_size)
    with PendingFolder.open(out, force=force, piece=piece_name(recipe.ranks) if add else None) as pending:
        ranks = lacking(pending.target, recipe.ranks, len(recipe.shards)) if add else recipe.ranks
        writer = _Writer(replace(recipe, ranks=ranks), pending, parts, progress)
        try:
            manifest = writer.write(add, check)
        except OverflowedError:  # what is finished would be of no use
            pending.finished.clear()
            raise
        except Exception:
            writer.keep_finished(check)
            raise
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
        files=len(_part_names(manifest)),
        imbalance=max(sizes.values()) * len(sizes) / sum(sizes.values()),
        missing_ranks=tuple(rank for rank in range(len(recipe.shards)) if rank not in sizes),
        resumed_bytes=writer.resumed,
        dropped_bytes=writer.dropped,
        expert_parallel=recipe.cutting.expert_parallel,
        even=recipe.cutting.even,
    )


class _Writer:
    def __init__(
        self,
        recipe: Recipe,
        pending: PendingFolder,
        parts: Mapping[str, int],
        progress: Progress | None,
    ) -> None:
        self.recipe, self.pending, self.parts, self.progress = recipe, pending, parts, progress
        files = [f for rank in recipe.ranks for f in part_files(rank, recipe.shards[rank], recipe.dtypes, parts)]
        if recipe.extra:
            header = build_header(TensorSpec(stored.name, stored.dtype, stored.shape) for stored in recipe.extra)
            files.append(PartFile(None, max(parts.values()) + 1, EXTRA_FILE, header))
        self.files: dict[int, list[PartFile]] = {}
        for file in files:
            self.files.setdefault(file.index, []).append(file)
        self.journal = Journal(pending.path, repr([recipe.identity, recipe.shards, recipe.fills]), files)
        self.done: dict[int, Digests] = {}
        self.resumed = self.dropped = 0
        self.tally = ByteCounter(sum(file.header.file_size - file.header.size for file in files), "", progress)

    def write(self, add: bool, check: Callable[[], None]) -> Manifest:
        """Write and publish the folder; its manifest. Arguments as in ``write_shards``."""
        target = self.pending.target
        self.prepare()
        copied = self.copy_small_files()
        if add and target.exists():  # refused before the work, if it can be; looked at again after it
            check_same_cut(target, Manifest.load(target), self.draft(copied))
        if len(self.parts) * len(self.recipe.ranks) > MANY:  # else it is refused when all is done
            check_size(self.draft(copied).text())
        digests = self.write_parts()
        check()
        with self.pending.alone():
            manifest = self.manifest(digests, copied)
            if add and target.exists():
                manifest = self.join(manifest, copied)
                check()
            write_synced(self.pending.path / MANIFEST, check_size(manifest.text()).encode())
            self.pending.clean({MANIFEST, *copied, *_part_names(manifest)})
            self.pending.publish()
        if len(manifest.shards) == manifest.tp_size:
            self.pending.remove_pieces()
        return manifest

    def keep_finished(self, check: Callable[[], None]) -> None:
        """After an error: leave to the next run what it can take over.

        Parts of a source that has changed may be of two versions. The notes of the others are written again, since
        they do not belong to the folder and may be gone already.
        """
        try:
            check()
        except TpctlError:
            self.pending.finished.clear()
        if not self.pending.published:
            with suppress(OSError):
                for index, digests in self.done.items():
                    self.journal.note(index, digests)

    def prepare(self) -> None:
        """Take over the parts that an earlier run of this job completed, remove what else it left, look at the disk."""
        self.dropped = self.journal.foreign()
        for index, files in self.files.items():
            if (digests := self.journal.recall(index, files, self.tally)) is not None:
                self._finish(index, digests)
        self.resumed = sum(file.header.file_size for index in self.done for file in self.files[index])
        self.pending.clean(self.pending.finished)
        needed = sum(file.header.file_size for index in self._left() for file in self.files[index])
        self.pending.check_space(needed + sum(path.stat().st_size for path in self.recipe.small_files))

    def write_parts(self) -> Digests:
        """Write every part file of every rank; the files of one part are finished together."""
        for index in self._left():
            digests = self._write_part(index, self.files[index])
            self.journal.note(index, digests)
            self._finish(index, digests)
        return {key: digest for digests in self.done.values() for key, digest in digests.items()}

    def _left(self) -> list[int]:
        return [index for index in sorted(self.files) if index not in self.done]

    def _finish(self, index: int, digests: Digests) -> None:
        self.done[index] = digests
        self.pending.finished |= {note_name(index), *(file.file for file in self.files[index])}

    def _write_part(self, index: int, files: Sequence[PartFile]) -> Digests:
        moves: list[Move] = []
        with Files() as handles:
            paths = [file.create(self.pending.path) for file in files]
            for path in paths:
                handles.open(path, os.O_RDWR)
            if files[0].rank is None:
                tensors = files[0].header.tensors
                moves += [Move((extra,), (whole(tensors[extra.name], paths[0]),)) for extra in self.recipe.extra]
            else:
                for name in (name for name, part in self.parts.items() if part == index):
                    moves += self._moves(name, files, paths)
            digests = move_all(moves, handles, self.tally, may_overflow=self.recipe.may_overflow)
            handles.sync(paths)
        return digests

    def _moves(self, name: str, files: Sequence[PartFile], paths: Sequence[Path]) -> list[Move]:
        reads = self.recipe.inputs[name]
        writes = []
        for file, path in zip(files, paths, strict=True):
            assert file.rank is not None
            stored = self.recipe.shards[file.rank][name]
            info, fill = file.header.tensors[name], self.recipe.fills.get(name, 0)
            writes.append(in_shard(info, stored.pieces, path, file.rank, stacked=stored.stacked, fill=fill))
        checked = any(stored.digest is not None for stored in reads)
        if checked or not self.recipe.shards[0][name].by_rows or are_small(reads):
            # The ranks read the same bytes, or what is read is hashed whole: one pass for all of them.
            return [Move(reads, tuple(writes))]
        return [Move(reads, (write,)) for write in writes]

    def copy_small_files(self) -> dict[str, CopiedFile]:
        copied = {}
        for path, wanted in self.recipe.small_files.items():
            found = copy_file(path, self.pending.path / path.name)
            if wanted not in (None, found):
                raise ShardFolderError(f"{path} was altered after it was copied; shard the model again")
            copied[path.name] = found
        return copied

    def draft(self, copied: Mapping[str, CopiedFile]) -> Manifest:
        """The manifest of a folder with every rank, without files and digests, to compare another with."""
        ranks = range(len(self.recipe.shards))
        blank: Digests = {(rank, name): "" for rank in ranks for name in self.parts}
        shards = {rank: Shard((), self._entries(rank, blank)) for rank in ranks}
        return replace(self._manifest({}, None, copied), shards=shards)

    def join(self, ours: Manifest, copied: Mapping[str, CopiedFile]) -> Manifest:
        """Add the ranks that the target holds, whose source is proved to be ours; the manifest of all ranks."""
        target, recipe = self.pending.target, self.recipe
        held = Manifest.load(target)
        try:
            lacking(target, recipe.ranks, len(recipe.shards))
        except OutputError:  # other runs have added all of ours meanwhile
            self.pending.finished.clear()
            raise
        check_same_cut(target, held, self.draft(copied))
        check_same_weights(target, held, recipe.source, recipe.inputs, recipe.extra, self.progress)
        return union(target, held, ours, self.pending.path)

    def manifest(self, digests: Digests, copied: Mapping[str, CopiedFile]) -> Manifest:
        recipe, files = self.recipe, [file for files in self.files.values() for file in files]
        shards = {}
        for rank in recipe.ranks:
            entries = self._entries(rank, digests)
            shards[rank] = Shard(tuple(file.entry for file in files if file.rank == rank), entries)
        extra = None
        if recipe.extra:
            entries = {
                s.name: ManifestTensor(0, s.dtype, s.shape, digests[None, s.name], Rule.REPLICATED, 0, ())
                for s in recipe.extra
            }
            extra = Shard((files[-1].entry,), entries)
        return self._manifest(shards, extra, copied)

    def _manifest(self, shards: Mapping[int, Shard], extra: Shard | None, copied: Mapping[str, CopiedFile]) -> Manifest:
        recipe = self.recipe
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
            expert_parallel=recipe.cutting.expert_parallel,
            even=recipe.cutting.even,
        )

    def _entries(self, rank: int, digests: Mapping[tuple[int | None, str], str]) -> dict[str, ManifestTensor]:
        return {name: self._entry(stored, digests[rank, name]) for name, stored in self.recipe.shards[rank].items()}

    def _entry(self, stored: PlannedTensor, digest: str) -> ManifestTensor:
        return ManifestTensor(
            part=self.parts[stored.name],
            dtype=self.recipe.dtypes[stored.name],
            shape=stored.shape,
            digest=digest,
            rule=stored.rule,
            dim=stored.dim,
            pieces=stored.pieces,
            fill=self.recipe.fills.get(stored.name, 0),
            stacked=stored.stacked,
        )


def _part_names(manifest: Manifest) -> list[str]:
    shards = [*manifest.shards.values(), *([manifest.extra] if manifest.extra else [])]
    return [part.file for shard in shards for part in shard.parts]
