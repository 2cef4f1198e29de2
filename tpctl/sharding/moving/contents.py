"""What of a shard folder is here, and what lies in it that its manifest does not list."""

from __future__ import annotations

from pathlib import Path

from tpctl.checkpoint.folder import WEIGHT_SUFFIXES, small_files_of
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest


def absent_ranks(folder: Path, manifest: Manifest) -> tuple[int, ...]:
    """The listed ranks of which no part file is in ``folder``, as after ``tpctl download --local-ranks``.

    A rank with some of its files is not one of them: that one is incomplete, which is an error wherever it is read.
    """
    return tuple(
        rank
        for rank, shard in manifest.shards.items()
        if not any((folder / part.file).exists() for part in shard.parts)
    )


def stray_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Weight files and indexes in ``folder`` that the manifest does not list, by name.

    An engine that takes every ``model-rank-R-part-*.safetensors``, or follows an index, would load them.
    """
    shards = [*manifest.shards.values(), *([] if manifest.extra is None else [manifest.extra])]
    listed = {part.file for shard in shards for part in shard.parts} | set(manifest.files) | {MANIFEST}
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ShardFolderError(f"{folder} cannot be read: {error.strerror}") from None
    return tuple(
        path.name
        for path in found
        if path.name not in listed and (path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json"))
    )


def left_behind(folder: Path) -> tuple[str, ...]:
    """Files beside the shards in ``folder`` that were put there later: ``shard`` would have copied them, but its
    manifest does not list them, and so nothing that reads it does."""
    listed = {*Manifest.load(folder).files, MANIFEST}
    return tuple(path.name for path in small_files_of(folder) if path.name not in listed)
