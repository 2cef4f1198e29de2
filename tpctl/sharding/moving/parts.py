"""Which file each stored tensor goes to, and the headers of those files."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from tpctl.checkpoint.safetensors import Header, TensorSpec, build_header, tensor_nbytes
from tpctl.manifest.records import Part
from tpctl.partition.plan import PlannedTensor

EXTRA_FILE = "tpctl-extra.safetensors"
"""Tensors of the source that no rank needs; a name that serving engines do not look for."""


@dataclass(frozen=True)
class PartFile:
    """A part file to be written: ``names`` are its tensors, ``rank`` whose they are (``None``: the extra file)."""

    rank: int | None
    index: int
    file: str
    header: Header

    def create(self, folder: Path) -> Path:
        """Write the header and reserve the data's place, which reads as zeros."""
        path = folder / self.file
        path.unlink(missing_ok=True)  # not truncated: it may be a second name of a published file
        with path.open("xb") as file:
            file.write(self.header.raw)
            reserve(file, self.header.file_size)
        return path

    @property
    def entry(self) -> Part:
        """The file as the manifest lists it."""
        raw = self.header.raw
        return Part(self.file, self.header.file_size, len(raw), sha256(raw).hexdigest())


def reserve(file: BinaryIO, size: int) -> None:
    """Give the open ``file`` ``size`` bytes: blocks of the disk where its file system can, else a hole.

    Blocks that are allocated at once spare the kernel to look for each of them when it is written.

    Raises:
        OSError: the disk is full.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise
    file.truncate(size)


def assign_parts(
    shards: Sequence[Mapping[str, PlannedTensor]], dtypes: Mapping[str, str], max_part_size: int
) -> dict[str, int]:
    """The part that each stored tensor belongs to, the same on every rank.

    A part is closed when one rank's tensors would exceed ``max_part_size`` bytes; a larger tensor has a part
    alone. Because all ranks close their parts together, all files of one part can be finished together.
    """
    parts: dict[str, int] = {}
    filled, part = [0] * len(shards), 0
    for name in shards[0]:
        sizes = [tensor_nbytes(dtypes[name], shard[name].shape) for shard in shards]
        if any(filled) and any(have + more > max_part_size for have, more in zip(filled, sizes, strict=True)):
            part, filled = part + 1, [0] * len(shards)
        parts[name] = part
        filled = [have + more for have, more in zip(filled, sizes, strict=True)]
    return parts


def part_name(rank: int, index: int) -> str:
    """The name of ``rank``'s ``index``-th file, as serving engines look for it."""
    return f"model-rank-{rank}-part-{index}.safetensors"


def part_files(
    rank: int, shard: Mapping[str, PlannedTensor], dtypes: Mapping[str, str], parts: Mapping[str, int]
) -> list[PartFile]:
    """``rank``'s files."""
    return [
        PartFile(
            rank,
            index,
            part_name(rank, index),
            build_header(TensorSpec(n, dtypes[n], shard[n].shape) for n in shard if parts[n] == index),
        )
        for index in range(max(parts.values()) + 1)
    ]
