"""Proves a shard folder against its manifest: sizes, headers, and the digest of every byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpctl.checkpoint.progress import Progress
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.opened import check_copied, open_extra, open_shards
from tpctl.sharding.moving.transfer import hash_all


def verify_digests(
    folder: Path, manifest: Manifest, ranks: Sequence[int], *, extra: bool = True, progress: Progress | None = None
) -> int:
    """Hash every byte of ``ranks``' files, of the extra file (unless not ``extra``) and of the copied files; the number
    of bytes.

    Raises:
        ShardFolderError: something is damaged; the message names the tensor and its rank, or the file.
    """
    shards = open_shards(folder, manifest, ranks)
    stored = [one for held in shards.values() for one in held]
    stored += open_extra(folder, manifest) if extra else ()
    copied = check_copied(folder, manifest)
    with Files() as files:
        hash_all(stored, files, ByteCounter(sum(one.nbytes for one in stored), "", progress))
    return copied + sum(one.nbytes for one in stored)
