"""A Hugging Face checkpoint folder: its safetensors files, the tensors in them, and the small files beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tpctl.checkpoint.outputs import require_utf8
from tpctl.checkpoint.safetensors import FileTensor, Header, read_header
from tpctl.errors import CheckpointError, counted, shorten, shown
from tpctl.json_file import is_file, parse_object, read_bytes, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
MERGE_FIRST = "merge it into its base model first (peft: merge_and_unload, save_pretrained) and pass the result"
_FILES = frozenset({".json", ".jinja", ".model", ".txt", ".md"})
"""What no folder is called that belongs beside a model's files."""
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

    ``model.safetensors`` is the whole model where it is there, as for transformers: an index beside it is one that an
    earlier save left, unless it lists that file alone.

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
            SourceError: a file's name is not UTF-8.
        """
        refuse_adapter(path)
        index = path / INDEX
        text = None
        beside = {file: FileStamp.of(file) for file in small_files_of(path)}
        if is_file(index) and not stale_index(path):
            beside[index] = FileStamp.of(index)
            text, names = read_index(index)
        elif is_file(path / SINGLE):
            names = {SINGLE: frozenset()}
        else:
            others = sorted(file.name for file in path.glob("*.safetensors"))
            if len(others) != 1:
                raise CheckpointError(_nothing(path, others))
            require_utf8(path / others[0])
            names = {others[0]: frozenset()}
        files = []
        for name, tensors in names.items():
            if not is_file(path / name):
                raise CheckpointError(f"{path} has no {name}, which its {INDEX} lists; the download is incomplete")
            file = CheckpointFile.open(path / name, name)
            if absent := tensors.difference(file.header.tensors):
                raise CheckpointError(f"{INDEX} says that {name} holds {min(absent)}, but it does not")
            files.append(file)
        folder = cls(path, tuple(files), text, beside)
        _ = folder.tensors
        return folder

    @cached_property
    def tensors(self) -> Mapping[str, tuple[CheckpointFile, FileTensor]]:
        """Every tensor by name, with the file that holds it."""
        found: dict[str, tuple[CheckpointFile, FileTensor]] = {}
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


def small_files_of(folder: Path) -> list[Path]:
    """The small files in ``folder``.

    Raises:
        CheckpointError: one is no regular file, or its name is not UTF-8: left out, it would be missed too late.
    """
    if not folder.is_dir():
        return []
    found = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json"):
            continue
        if file.is_dir() and file.suffix not in _FILES:
            continue
        if is_file(file):  # else it went away just now
            require_utf8(file)
            found.append(file)
    return found


def read_index(index: Path, where: str | None = None) -> tuple[str, Mapping[str, frozenset[str]]]:
    """The text of ``index``, line ends as they are, since ``merge`` gives it back byte for byte; and what it lists.

    Args:
        where: what messages call it, if not by its path.

    Raises:
        CheckpointError: it is no index of safetensors files.
    """
    where = where or str(index)
    try:
        text = read_bytes(index, where=where).decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{where} went away while it was read; run again") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); download it again"
        ) from None
    return text, indexed_files(text, where)


@lru_cache(maxsize=1)
def indexed_files(text: str, where: str) -> Mapping[str, frozenset[str]]:
    """The files that an index lists, each with its tensors; a command looks at one when it finds a folder, and again
    when it opens it.

    Raises:
        CheckpointError: ``text``, which ``where`` names, is no index of safetensors files.
    """
    weight_map = parse_object(text.encode(), where).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where} is no index of safetensors files: it has no object weight_map")
    names: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where} lists {shown(name)}, which is not a file name")
        names.setdefault(name, set()).add(tensor)
    for name in names:
        if not name or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{where} lists {shown(name)}, which is not a file name")
    if not names:
        raise CheckpointError(f"{where} lists no files")
    return {name: frozenset(names[name]) for name in sorted(names)}


def stale_index(folder: Path) -> bool:
    """Whether ``folder`` has ``model.safetensors``, and beside it an index that does not list that file alone.

    Raises:
        CheckpointError: something else than a file has one of the names.
    """
    index = folder / INDEX
    if not is_file(folder / SINGLE) or not is_file(index):
        return False
    try:
        return set(read_index(index)[1]) != {SINGLE}
    except CheckpointError:
        return True


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter (LoRA), alone or beside a model, which transformers would apply it to.

    Raises:
        CheckpointError: it does; the message names the base model and what to do.
    """
    if not (folder / ADAPTER).is_file() or not any(folder.glob("adapter_model*")):
        return
    try:
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    to = f" to {shorten(base, 80)}" if isinstance(base, str) and base else ""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds a model and an adapter ({ADAPTER}) that changes it; {MERGE_FIRST}, or remove {ADAPTER} "
            "to use the model without it"
        )
    raise CheckpointError(f"{folder} is an adapter ({ADAPTER}), which holds only changes{to}; {MERGE_FIRST}")


def _nothing(path: Path, others: list[str]) -> str:
    if not path.is_dir():
        return f"{path} is not a folder"
    if others:
        files = counted(len(others), "safetensors file")
        return f"{path} holds {files} but no {INDEX} to say which belong together"
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        return f"{path} holds only PyTorch pickles; convert them to safetensors first"
    return f"{path} holds no safetensors files; it is not a Hugging Face checkpoint"
