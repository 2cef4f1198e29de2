"""Writes a shard folder: part by part, resumable, with a digest of everything, published in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpctl.checkpoint.safetensors import NewTensor, build_header
from tpctl.partition.manifest import MANIFEST, Manifest
from tpctl.partition.plan import PartitionPlan, StoredTensor
from tpctl.partition.records import CopiedFile, Shard, ShardTensor, Source
from tpctl.partition.split import Rule
from tpctl.sharding.files import Files, Progress, Tally
from tpctl.sharding.layout import Stored, in_shard, whole
from tpctl.sharding.parts import PartFile, assign_parts, part_files
from tpctl.sharding.publish import PendingFolder
from tpctl.sharding.transfer import Move, run

EXTRA_FILE = "tpctl-extra.safetensors"
"""Tensors of the source that no rank needs; a name that serving engines do not look for."""

Digests = dict[tuple[int | None, str], str]


@dataclass(frozen=True)
class ShardReport:
    """What was written. Sizes in bytes; ``imbalance`` is the largest rank's bytes over the mean."""

    folder: str
    source: str
    model_type: str
    tp_size: int
    dtype: str | None
    tensors_per_rank: int
    bytes_per_rank: dict[int, int]
    files: int
    imbalance: float
    resumed_bytes: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a shard folder's content, except the tensors' bytes.

    Attributes:
        dtypes: the safetensors dtype of each stored tensor.
        dtype: what floats were cast to on the way from the source, for the manifest.
        inputs: the tensors to read for each stored tensor.
        extra: tensors of the source that no rank needs, kept for ``merge``.
        identity: differs whenever what is read differs; a killed run is resumed only under the same one.
    """

    plan: PartitionPlan
    source: Source
    model_type: str
    dtype: str | None
    max_part_size: int
    compat: str | None
    ranks: tuple[int, ...]
    dtypes: Mapping[str, str]
    inputs: Mapping[str, tuple[Stored, ...]]
    extra: tuple[Stored, ...]
    small_files: tuple[Path, ...]
    identity: str


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
    parts = assign_parts(recipe.plan.shards, recipe.dtypes, recipe.max_part_size)
    files = [
        file
        for rank in recipe.ranks
        for file in part_files(rank, recipe.plan.shards[rank], recipe.dtypes, parts)
    ]
    if recipe.extra:
        last = max(parts.values()) + 1
        header = build_header(NewTensor(s.name, s.dtype, s.shape) for s in recipe.extra)
        files.append(PartFile(None, last, EXTRA_FILE, header))
    with PendingFolder.open(out, force=force) as pending:
        writer = _Writer(recipe, pending, files, parts, progress)
        digests = writer.write_parts()
        copied = writer.copy_small_files()
        check()
        manifest = writer.manifest(digests, copied)
        writer.clean({MANIFEST, *copied, *(file.file for file in files)})
        _write_synced(pending.path / MANIFEST, manifest.text().encode())
        pending.publish()
    sizes = {rank: shard.nbytes for rank, shard in manifest.shards.items()}
    return ShardReport(
        folder=str(out),
        source=recipe.source.id,
        model_type=recipe.model_type,
        tp_size=recipe.plan.tp_size,
        dtype=recipe.dtype,
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
        self.recipe, self.pending, self.files, self.parts = recipe, pending, files, parts
        self.resumed = 0
        data = sum(file.header.file_size - file.header.size for file in files)
        self.tally = Tally(data, "", progress)

    def write_parts(self) -> Digests:
        """Write every part file of every rank; the files of one part are finished together."""
        digests: Digests = {}
        for index in range(max(file.index for file in self.files) + 1):
            files = [file for file in self.files if file.index == index]
            digests.update(self._write_part(index, files))
        return digests

    def _write_part(self, index: int, files: Sequence[PartFile]) -> Digests:
        with Files() as handles:
            moves = []
            for file in files:
                handles.open(file.create(self.pending.path), os.O_RDWR)
            if files[0].rank is None:
                target = self.pending.path / EXTRA_FILE
                moves = [
                    Move((s,), (whole(files[0].header.tensors[s.name], target),)) for s in self.recipe.extra
                ]
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
            stored = self.recipe.plan.shards[file.rank][name]
            writes.append(
                in_shard(file.header.tensors[name], stored.pieces, self.pending.path / file.file, file.rank)
            )
        rule = self.recipe.plan.shards[0][name].rule
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
            _write_synced(self.pending.path / path.name, data)
            copied[path.name] = CopiedFile(len(data), blake3(data).hexdigest())
        return copied

    def manifest(self, digests: Digests, copied: Mapping[str, CopiedFile]) -> Manifest:
        recipe = self.recipe
        shards = {}
        for rank in recipe.ranks:
            files = [file for file in self.files if file.rank == rank]
            shards[rank] = Shard(
                tuple(file.entry for file in files),
                {name: self._entry(rank, t, digests) for name, t in recipe.plan.shards[rank].items()},
            )
        extra = None
        if recipe.extra:
            file = self.files[-1]
            tensors = {
                s.name: ShardTensor(0, s.dtype, s.shape, digests[None, s.name], Rule.REPLICATED, 0, ())
                for s in recipe.extra
            }
            extra = Shard((file.entry,), tensors)
        return Manifest(
            source=recipe.source,
            tp_size=recipe.plan.tp_size,
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
        )

    def clean(self, wanted: set[str]) -> None:
        """Remove what an earlier, killed run left in the pending folder."""
        for path in self.pending.path.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
