"""The files of a GGUF model: one, or those of a split one (``NAME-00002-of-00003.gguf``), named by any of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tpctl.checkpoint.gguf.header import GgufError, GgufHeader, GgufTensor, Value, read_gguf_header
from tpctl.errors import shorten

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_MAX_PARTS = 1000
_EXTRAS = ("mmproj", "imatrix")


def model_name(path: Path) -> str:
    """The file's name without its suffix, and without what numbers a part."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def model_files(names: Iterable[str]) -> list[str]:
    """Of the file names of a folder or repository, those to name a model by, sorted.

    Of a split model that is its first part; files that only extend a model (``mmproj…``, ``imatrix…``) are none.
    """
    found = []
    for name in names:
        match = _PART.fullmatch(PurePosixPath(name).name)
        stem = PurePosixPath(name).name.lower()
        if stem.endswith(".gguf") and (not match or int(match[2]) == 1) and not stem.startswith(_EXTRAS):
            found.append(name)
    return sorted(found)


def listed(names: Sequence[str]) -> str:
    """``names`` as a message may repeat them: the first eight."""
    shown = ", ".join(shorten(name, 80) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def fetch_arguments(name: str) -> str:
    """What ``hf download REPOSITORY`` needs to fetch the model that the file ``name`` of the repository belongs to."""
    match = _PART.fullmatch(name)
    return f"--include '{match[1]}-*-of-{match[3]}.gguf'" if match else name


def part_files(path: Path) -> tuple[Path, ...]:
    """Those files of the model of ``path`` that are there, by their names alone; ``path`` is among them."""
    match = _PART.fullmatch(path.name)
    if not match or not 1 < int(match[3]) <= _MAX_PARTS:
        return (path,)
    names = [_part_name(path, match[1], number, int(match[3])) for number in range(1, int(match[3]) + 1)]
    return tuple(name for name in names if name == path or name.is_file())


def read_parts(path: Path) -> tuple[Mapping[str, Value], Mapping[str, GgufTensor]]:
    """The metadata and all tensors, by name, of the model that ``path`` is a file of.

    Raises:
        GgufError: a file is damaged, missing, or not of the same model.
        SourceError: one cannot be read.
    """
    header = read_gguf_header(path)
    count, number = _split(header)
    if count == 1:
        return header.metadata, {tensor.name: tensor for tensor in header.tensors}
    match = _PART.fullmatch(path.name)
    if not match or (int(match[2]), int(match[3])) != (number + 1, count):
        end = f"-{number + 1:05}-of-{count:05}.gguf"
        raise GgufError(
            f"it is part {number + 1} of {count} of a split model, and its name does not end in {end}, so that the "
            "others cannot be found; give all parts their names again"
        )
    paths = [_part_name(path, match[1], place, count) for place in range(1, count + 1)]
    if absent := [part.name for part in paths if not part.is_file()]:
        shown = ", ".join(absent[:3]) + (" …" if len(absent) > 3 else "")
        raise GgufError(f"it is one of {count} parts, and {len(absent)} of them are not beside it ({shown}); fetch all")
    headers = [header if part == path else _read_other(part) for part in paths]
    return _joined(headers, count)


def _joined(headers: list[GgufHeader], count: int) -> tuple[Mapping[str, Value], Mapping[str, GgufTensor]]:
    metadata = headers[0].metadata
    tensors: dict[str, GgufTensor] = {}
    for place, header in enumerate(headers):
        name = header.path.name
        if _split(header) != (count, place):
            raise GgufError(f"{name} says that it is another part than its name; fetch all parts again")
        for key, value in header.metadata.items():
            if not key.startswith(("split.", "general.")) and metadata.get(key) != value:
                raise GgufError(f"{name} is of another model than {headers[0].path.name}: their {key} differs")
        for tensor in header.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise GgufError(f"tensor {tensor.name} is in {other} and in {name}; fetch all parts again")
            tensors[tensor.name] = tensor
    total = metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise GgufError(f"its parts hold {len(tensors)} tensors instead of {total}; fetch all parts again")
    return metadata, tensors


def _read_other(path: Path) -> GgufHeader:
    try:
        return read_gguf_header(path)
    except GgufError as error:
        raise GgufError(f"its part {path.name} cannot be used: {error}") from None


def _split(header: GgufHeader) -> tuple[int, int]:
    """(number of parts, this one's place from 0)."""
    count, number = (header.metadata.get(key, default) for key, default in (("split.count", 1), ("split.no", 0)))
    if type(count) is not int or type(number) is not int or count > _MAX_PARTS or not 0 <= number < max(count, 1):
        raise GgufError(f"split.no {number!r} and split.count {count!r} do not go together; download it again")
    return max(count, 1), number


def _part_name(path: Path, name: str, number: int, count: int) -> Path:
    own = path.name
    return path.with_name(f"{name}-{number:05}-of-{count:05}{own[own.rindex('.') :]}")
