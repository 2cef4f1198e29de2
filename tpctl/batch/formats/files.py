"""Which files an input is: one, a folder's, those that a pattern names, or a data set's on the Hub."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.errors import SourceError

HUB = "hf://"
_PATTERN = "*?["
_OF_MODELS = ("tpctl.json", "config.json")
"""Files that folders of shards, and of checkpoints, have."""


@dataclass(frozen=True)
class Found:
    """Files in the order in which they are read.

    Attributes:
        system: where they are, as fsspec has it.
        paths: by their names there; ``local``: those are names on this host's disks.
    """

    system: Any
    paths: tuple[str, ...]
    local: bool

    def state(self, path: str) -> list[Any]:
        """What tells a file from one that is put in its place later."""
        info = self.system.info(path)
        return [info.get(name) for name in ("size", "ino", "mtime", "ETag", "blob_id", "created")]


def is_several(prompts: str) -> bool:
    """Whether an input is named that is no file on a disk: a folder, a pattern, or something on the Hub."""
    if prompts.startswith(HUB) or Path(prompts).is_dir():
        return True
    return any(mark in prompts for mark in _PATTERN) and not Path(prompts).exists()


def begins_as_parquet(prompts: str) -> bool:
    """Whether a file is called so, or begins so."""
    path = Path(prompts)
    if path.suffix == ".parquet":
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False  # who opens it says why


def refuse_model(prompts: str) -> None:
    """Raise ``SourceError`` for a model in the place of prompts, or a file that cannot be read."""
    try:
        with Path(prompts).open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise SourceError(f"cannot read {prompts}: {error.strerror}") from None
    if head == b"GGUF":
        raise SourceError(f"{prompts} is a GGUF model, not a file of prompts; give it with --model")


def find(prompts: str) -> Found:
    """The Parquet files of an input, sorted by their names.

    Raises:
        SourceError: there are none, or they cannot be reached.
    """
    if prompts.startswith(HUB):
        return _on_the_hub(prompts)
    from fsspec.implementations.local import LocalFileSystem

    if Path(prompts).is_dir():
        root = Path(prompts)
        paths = sorted(str(path) for path in root.rglob("*.parquet") if path.is_file() and not _hidden(path, root))
        if not paths:
            if any((root / name).exists() for name in _OF_MODELS):
                raise SourceError(f"{prompts} is a model's folder, not a file of prompts; give it with --model")
            raise SourceError(f"{prompts} is a folder without Parquet files; give a file of prompts")
    elif is_several(prompts):
        paths = sorted(path for path in glob.glob(prompts, recursive=True) if Path(path).is_file())  # noqa: PTH207
        if not paths:
            raise SourceError(f"no file is called {prompts}")
    else:
        paths = [prompts]
    return Found(LocalFileSystem(), tuple(paths), local=True)


def _hidden(path: Path, root: Path) -> bool:
    """Whether a file is none of a folder's own, as what a batch keeps beside its parts."""
    return any(name.startswith(".") for name in path.relative_to(root).parts)


def _on_the_hub(prompts: str) -> Found:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(prompts)
        if any(mark in path for mark in _PATTERN):
            paths = system.glob(path)
        elif system.isdir(path):
            paths = system.glob(f"{path}/**/*.parquet") + system.glob(f"{path}/*.parquet")
        else:
            paths = [path] if system.exists(path) else []
    except Exception as error:  # of whatever kind the Hub's client has
        raise SourceError(f"cannot read {prompts}: {said(error)}") from None
    if not paths:
        raise SourceError(
            f"{prompts} names no Parquet files; see what the data set has, or add @refs/convert/parquet to its name, "
            "for the Hub's own conversion"
        )
    return Found(system, tuple(sorted(set(paths))), local=False)


def said(error: BaseException) -> str:
    """An error of a library in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
