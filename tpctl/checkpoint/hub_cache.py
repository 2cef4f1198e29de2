"""The Hugging Face cache on this machine: what it holds of a model, read without any network.

Its layout is documented (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): ``blobs`` by digest,
``snapshots`` by commit with links to blobs, ``refs`` from branch and tag names to commits.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from tpctl.checkpoint.folder import INDEX, SINGLE, indexed_files
from tpctl.checkpoint.hub_settings import check_importable
from tpctl.errors import CheckpointError, SourceError
from tpctl.json_file import read_bytes
from tpctl.manifest.manifest import MANIFEST, Manifest


def repository(repo: str) -> Path:
    """Where the Hugging Face cache keeps ``repo``: ``blobs``, ``refs``, ``snapshots``.

    Errors as ``check_importable``.
    """
    check_importable()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached(repo: str, revision: str | None, ranks: Sequence[int] | None = None) -> tuple[Path, str] | None:
    """The folder and commit of a complete copy of ``repo`` in the Hugging Face cache, without any network.

    Where nothing says what ``main`` was, as in a cache that was put together by hand, the only snapshot is it.
    """
    root = repository(repo)
    ref = root / "refs" / (revision or "main")
    try:
        if ref.is_file():
            commit = ref.read_text(encoding="utf-8").strip()
        else:
            commit = revision or _only_snapshot(root)
    except (OSError, UnicodeDecodeError):
        return None
    folder = root / "snapshots" / commit
    return (folder, commit) if commit and complete(folder, ranks) else None


def _only_snapshot(root: Path) -> str:
    """The commit of the one snapshot below ``root``; nothing if there is none, or more than one."""
    folder = root / "snapshots"
    found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return found[0] if len(found) == 1 else ""


def complete(folder: Path, ranks: Sequence[int] | None = None) -> bool:
    """Whether ``folder`` has a config and every weight file that its manifest or index calls for.

    Of a shard folder, those of ``ranks``, or of every rank that its manifest lists.
    """
    if not (folder / "config.json").is_file():
        return False
    if (folder / MANIFEST).is_file():
        shards = Manifest.load(folder)
        wanted = shards.shards if ranks is None else ranks
        return all((folder / name).is_file() for rank in wanted for name in shards.rank_files(rank))
    if (folder / SINGLE).is_file():
        return True
    index = folder / INDEX
    if index.is_file():
        return all((folder / name).is_file() for name in index_files(index))
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def index_files(index: Path) -> frozenset[str]:
    """The weight files that a safetensors index names.

    Raises:
        SourceError: it is not such an index.
    """
    try:
        return frozenset(indexed_files(read_bytes(index).decode("utf-8"), str(index)))
    except CheckpointError as error:
        raise SourceError(str(error)) from None
    except (FileNotFoundError, UnicodeDecodeError):
        raise SourceError(f"{index} is not a safetensors index; delete it and download again") from None


def remember(repo: str, revision: str, commit: str) -> None:
    """Note in the Hugging Face cache which commit a branch or tag led to, where ``cached`` looks for it.

    What is noted already is not written again, and a cache that may only be read does without.
    """
    if revision == commit:
        return
    ref = repository(repo) / "refs" / revision
    try:
        if ref.is_file() and ref.read_text(encoding="utf-8").strip() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
