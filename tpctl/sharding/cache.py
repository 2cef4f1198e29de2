"""Shards as a cache: made when a command first needs them, found again by what they were made from."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held
from tpctl.checkpoint.cache import cache_root, file_name, locked
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.progress import Progress
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.errors import ShardFolderError, TpctlError
from tpctl.manifest.manifest import FORMAT_VERSION, MANIFEST, Manifest
from tpctl.sharding.cutting.merge import require_all_ranks
from tpctl.sharding.cutting.reshard import reshard_command
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.moving.opened import check_copied
from tpctl.sharding.proving.verified import remember_verified


def ensure_sharded(
    source: ResolvedSource,
    tp_size: int,
    dtype: str | None = None,
    progress: Progress | None = None,
    *,
    expert_parallel: int | None = None,
    text_only: bool = False,
) -> Path:
    """A shard folder of ``source`` for ``tp_size`` ranks: ``source`` itself if it is one, else one in the cache.

    A cached folder is made again if its files are not all there, or a copied one was altered; tensors are not hashed
    (see ``ensure_verified``). Two processes that ask at once make it once.

    Args:
        dtype, text_only: as in ``shard_checkpoint``; a shard folder that is given is used as it is.
        expert_parallel: groups of ranks that whole experts are dealt to; ``None``: as in such a folder, else one.

    Raises:
        ShardFolderError: ``source`` is a shard folder for another tensor-parallel size or number of groups, incomplete,
            or a copied file of it was altered.
        CheckpointError, UnsupportedModelError, PartitionError, OutputError: it cannot be sharded.
    """
    if (source.folder / MANIFEST).is_file():
        manifest = Manifest.load(source.folder)
        if tp_size != manifest.tp_size or expert_parallel not in (None, manifest.expert_parallel):
            raise _cut_otherwise(source.folder, manifest, tp_size, expert_parallel)
        require_all_ranks(source.folder, manifest)
        manifest.check_files(source.folder, range(tp_size))
        check_copied(source.folder, manifest)
        return source.folder
    groups, name = expert_parallel or 1, file_name(Path(source.id).name)
    folder = cache_root() / "shards" / f"{name}-tp{tp_size}-{_key(source, tp_size, dtype, groups, text_only)}"
    with locked(folder.with_name(f".{folder.name}.lock")):
        try:
            manifest = Manifest.load(folder)
            manifest.check_files(folder)
            check_copied(folder, manifest)
        except ShardFolderError:
            shard_checkpoint(
                source.folder,
                folder,
                tp_size,
                source_id=source.id,
                revision=source.revision,
                dtype=dtype,
                cutting=Cutting(groups),
                text_only=text_only,
                force=True,
                progress=progress,
            )
            remember_verified(folder)
    return folder


def _cut_otherwise(folder: Path, manifest: Manifest, tp_size: int, groups: int | None) -> ShardFolderError:
    """What to say where ``folder`` is cut for another number of ranks, or of groups of them, than is asked for: how to
    make one that is, or why there can be none."""
    held, asked, use = f"tp {manifest.tp_size}", f"tp {tp_size}", f"use --tp {manifest.tp_size}, or "
    if tp_size == manifest.tp_size:
        held, asked, use = f"--ep {manifest.expert_parallel}", f"--ep {groups}", ""
    try:
        command = reshard_command(folder, manifest, tp_size, groups)
    except TpctlError as error:
        return ShardFolderError(f"{folder} is cut for {held}, and not to be had for {asked}: {error}")
    return ShardFolderError(f"{folder} is cut for {held}, but {asked} is asked for; {use}make a new one: `{command}`")


def _key(source: ResolvedSource, tp_size: int, dtype: str | None, groups: int, text_only: bool) -> str:
    """Changes whenever shards made earlier would differ from those made now."""
    checkpoint = CheckpointFolder.open(source.folder)
    stats = [(path.name, path.stat()) for path in checkpoint.small_files()]
    files = [(file.name, file.size, file.mtime_ns) for file in checkpoint.files]
    files += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    # A revision pins the content; a local folder is told from another of the same name by its place.
    place = source.revision or str(source.folder.resolve())
    further = [*([groups] if groups > 1 else []), *(["text only"] if text_only else [])]
    held = as_held(ModelConfig.load(source.folder), checkpoint.tensors)
    further += [] if held.blueprint.predictor is None else ["predictor"]  # which was once left out
    text = repr([FORMAT_VERSION, source.id, place, files, tp_size, dtype, *further])
    return sha256(text.encode()).hexdigest()[:12]
