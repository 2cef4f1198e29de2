"""A Hugging Face checkpoint folder: its safetensors files, the tensors in them, and the small files beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tpctl.checkpoint.safetensors import Header, TensorInfo, read_header
from tpctl.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".ot",
        ".npz",
    }
)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells whether a file has changed.

    Whoever writes to a file may set back its ``mtime``, but not its ``ctime``; another file has another inode.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The stamp of the file that ``path`` leads to. Raises ``CheckpointError`` if there is none."""
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def check(self, path: Path) -> None:
        """Raise ``CheckpointError`` unless ``path`` still has this stamp."""
        try:
            now = FileStamp.of(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path} went away while it was read ({error}); run again") from None
        if now != self:
            raise CheckpointError(
                f"{path} changed while it was read ({self.size} bytes before, {now.size} now); run again"
            )


@dataclass(frozen=True)
class CheckpointFile:
    """One safetensors file; ``stamp`` tells whether it has changed since it was opened."""

    name: str
    path: Path
    header: Header
    stamp: FileStamp

    @classmethod
    def open(cls, path: Path, name: str) -> CheckpointFile:
        stamp = FileStamp.of(path)  # before the header is read: a change in between shows later
        return cls(name, path, read_header(path), stamp)

    @property
    def size(self) -> int:
        return self.stamp.size

    @property
    def mtime_ns(self) -> int:
        return self.stamp.mtime_ns

    @property
    def sha256(self) -> str | None:
        """The file's SHA-256 where its place in the Hub's cache tells it (``blobs/<sha256>``), without reading it."""
        target = self.path.resolve()
        known = target.parent.name == "blobs" and len(target.name) == 64
        return target.name if known else None


@dataclass(frozen=True)
class CheckpointFolder:
    """An opened checkpoint: every header read and checked, no data touched.

    ``index`` is the index file's text, line ends as they are; ``beside`` has the stamps of it and of the small files.
    """

    path: Path
    files: tuple[CheckpointFile, ...]
    index: str | None
    beside: Mapping[Path, FileStamp]

    @classmethod
    def open(cls, path: Path) -> CheckpointFolder:
        """Open the checkpoint in ``path``: ``model.safetensors``, or the files that its index lists.

        Raises:
            CheckpointError: there are no safetensors files, one is missing or malformed, or two hold one
                tensor.
        """
        index = path / INDEX
        text = None
        beside = {file: FileStamp.of(file) for file in _small_files(path)}
        if index.is_file():
            beside[index] = FileStamp.of(index)
            text = _read_text(index)
            names = _indexed(index, text)
        elif (path / SINGLE).is_file():
            names = {SINGLE: None}
        else:
            others = sorted(file.name for file in path.glob("*.safetensors"))
            if len(others) != 1:
                raise CheckpointError(_nothing(path, others))
            names = {others[0]: None}
        files = []
        for name, tensors in names.items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path} has no {name}, which its {INDEX} lists; the download is incomplete")
            file = CheckpointFile.open(path / name, name)
            for tensor in sorted(tensors or ()):
                if tensor not in file.header.tensors:
                    raise CheckpointError(f"{INDEX} says that {name} holds {tensor}, but it does not")
            files.append(file)
        folder = cls(path, tuple(files), text, beside)
        _ = folder.tensors
        return folder

    @cached_property
    def tensors(self) -> Mapping[str, tuple[CheckpointFile, TensorInfo]]:
        """Every tensor by name, with the file that holds it."""
        found: dict[str, tuple[CheckpointFile, TensorInfo]] = {}
        for file in self.files:
            for name, info in file.header.tensors.items():
                if name in found:
                    raise CheckpointError(f"tensor {name} is in {found[name][0].name} and in {file.name}; remove one")
                found[name] = (file, info)
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, (_, info) in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Raise ``CheckpointError`` if a file on disk is no longer the one that was opened."""
        for file in self.files:
            file.stamp.check(file.path)
        for path, stamp in self.beside.items():
            stamp.check(path)

    def small_files(self) -> list[Path]:
        """The files that a copy of the model needs beside its weights: config, tokenizer, template, licence."""
        return [path for path in self.beside if path.name != INDEX]


def _small_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in WEIGHT_SUFFIXES
        and not file.name.endswith(".index.json")
    )


def _read_text(index: Path) -> str:
    """The text of ``index``; without the translation of line ends, since ``merge`` gives it back byte for byte."""
    try:
        return index.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{index} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); download it again"
        ) from None


def _indexed(index: Path, text: str) -> dict[str, set[str] | None]:
    """The files that an index lists, each with its tensors."""
    try:
        weight_map = json.loads(text)["weight_map"]
        names: dict[str, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if Path(name).name != name:
                raise CheckpointError(f"{index} lists {name!r}, which is not a file name")
            held = names.setdefault(name, set())
            assert held is not None
            held.add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from None
    if not names:
        raise CheckpointError(f"{index} lists no files")
    return dict(sorted(names.items()))


def _nothing(path: Path, others: list[str]) -> str:
    if not path.is_dir():
        return f"{path} is not a folder"
    if others:
        return f"{path} holds {len(others)} safetensors files but no {INDEX} to say which belong together"
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        return f"{path} holds only PyTorch pickles; convert them to safetensors first"
    return f"{path} holds no safetensors files; it is not a Hugging Face checkpoint"
