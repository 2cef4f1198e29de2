"""Whether the checkpoint that shards were cut from is still on this machine."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from tpctl.checkpoint.cache import cache_root, file_name
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.checkpoint.hub_cache import cached
from tpctl.checkpoint.sources import HUB_ID, SOURCE_RECORD, converted_gguf, local_path, made_of, pypi_entry
from tpctl.errors import CheckpointError, SourceError
from tpctl.manifest.manifest import Manifest


def sources_at_hand(manifest: Manifest) -> list[Path]:
    """The folders on this machine that the shards may have been cut from: of its name, and with the same headers.

    Of a model that tpctl quantised there may be several: another of the same name, or the same before it was changed.
    """
    known = [(file.name, file.size, file.header) for file in manifest.source.files]
    matching = []
    for found in _local_copies(manifest.source.id, manifest.source.revision):
        try:
            files = CheckpointFolder.open(found).files
        except CheckpointError:
            continue
        if [(file.name, file.size, file.header.text) for file in files] == known:
            matching.append(found)
    return matching


def _local_copies(name: str, revision: str | None) -> list[Path]:
    """Where the source may be: of one that tpctl quantised, what it has in its cache under that name."""
    if (made := made_of(name)) is not None:
        folder = f"{file_name(Path(made[0]).name)}-{made[1]}"
        return sorted(entry / folder for entry in (cache_root() / "models").glob(f"{glob.escape(folder)}-*"))
    found = _local_copy(name, revision)
    return [] if found is None else [found]


def _local_copy(name: str, revision: str | None) -> Path | None:
    if name.startswith("pypi:"):
        return _from_wheel(name.removeprefix("pypi:"), revision)
    try:
        path = local_path(name)
    except SourceError:
        return None
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf" and path.is_file():
        folder = converted_gguf(path)
        return folder if folder.is_dir() else None
    if HUB_ID.fullmatch(name):
        copy = cached(name, revision)
        return None if copy is None else copy[0]
    return None


def _from_wheel(name: str, version: str | None) -> Path | None:
    """The converted checkpoint of the wheel ``name`` at ``version``, which may have been asked for by its version."""
    for requirement in (name, f"{name}=={version}"):
        entry = pypi_entry(requirement)
        try:
            record = json.loads((entry / SOURCE_RECORD).read_text(encoding="utf-8"))
            if record["revision"] == version and (entry / record["folder"]).is_dir():
                return entry / str(record["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
