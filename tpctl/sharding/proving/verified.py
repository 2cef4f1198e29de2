"""Shards are hashed before they are first run, and remembered as good while their files stay what they are.

The memory is a file in the cache for each shard folder: the manifest's SHA-256 and, by part file, size, time of change
and inode. It is a note, not a proof: without it, or if it cannot be written, the bytes are hashed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from tpctl.checkpoint.cache import cache_root, file_name
from tpctl.checkpoint.progress import Progress
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.opened import AGAIN, open_shards
from tpctl.sharding.moving.transfer import hash_all


def ensure_verified(folder: Path, ranks: Sequence[int], progress: Progress | None = None) -> None:
    """Hash every tensor of ``ranks`` in ``folder``, unless that was done and the files are still the same.

    Raises:
        ShardFolderError: a tensor is damaged; the message names it and its rank. Or a file is missing.
    """
    digest, known = _manifest_digest(folder), _recall(folder)
    good: Mapping[str, Any] = known["parts"] if known.get("manifest") == digest else {}
    if set(ranks) <= set(known.get("ranks", ())) and good and _stamps(folder, good) == good:
        return
    manifest = Manifest.load(folder)
    # Taken before the bytes are read, so that a change meanwhile shows at the next start.
    stamps = _stamps(folder, (name for rank in ranks for name in manifest.rank_files(rank)))
    stored = [one for held in open_shards(folder, manifest, ranks).values() for one in held]
    try:
        with Files() as files:
            hash_all(stored, files, ByteCounter(sum(one.nbytes for one in stored), "", progress))
    except ShardFolderError as error:
        if folder.is_relative_to(cache_root()):  # nobody asked for it by name, so say where it is
            step = f"remove {folder}, it is made again when it is needed"
            raise ShardFolderError(str(error).removesuffix(AGAIN) + step) from None
        raise
    _note(folder, digest, ranks, stamps)


def remember_verified(folder: Path) -> None:
    """Note that ``folder``, which this process just wrote, is good."""
    manifest = Manifest.load(folder)
    names = (name for rank in manifest.shards for name in manifest.rank_files(rank))
    _note(folder, _manifest_digest(folder), list(manifest.shards), _stamps(folder, names))


def _place(folder: Path) -> Path:
    key = sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    return cache_root() / "verified" / f"{file_name(folder.name)[:100]}-{key}.json"


def _manifest_digest(folder: Path) -> str:
    try:
        return sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise ShardFolderError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int] | None]:
    """Size, time of change and inode by file; ``None`` for one that is not there."""
    found: dict[str, list[int] | None] = {}
    for name in names:
        try:
            stat = (folder / name).stat()
            found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        except OSError:
            found[name] = None
    return found


def _recall(folder: Path) -> dict[str, Any]:
    """What was noted about ``folder``; nothing if that cannot be read or makes no sense."""
    try:
        known = json.loads(_place(folder).read_text(encoding="utf-8"))
        if isinstance(known["manifest"], str) and isinstance(known["parts"], dict):
            return {**known, "ranks": [int(rank) for rank in known["ranks"]]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return {}


def _note(folder: Path, digest: str, ranks: Sequence[int], stamps: Mapping[str, list[int] | None]) -> None:
    place = _place(folder)
    text = json.dumps({"manifest": digest, "ranks": list(ranks), "parts": stamps})
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
