"""The files that go along with the weights as they are: copied and hashed in blocks, however large they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISFIFO

from tpctl.errors import CheckpointError
from tpctl.json_file import broken
from tpctl.manifest.records import CopiedFile

_BLOCK = 1 << 20


def copy_file(source: Path, target: Path) -> CopiedFile:
    """Copy ``source`` to ``target``, which is on disk when this returns; what was written.

    Raises:
        CheckpointError: ``source`` cannot be read.
        OSError: ``target`` cannot be written.
    """
    from blake3 import blake3

    if (said := broken(source)) is not None:  # a pipe would be waited for, a device copied for ever
        raise CheckpointError(f"{source} {said}")
    size, digest = 0, blake3()
    with target.open("wb") as file:
        for block in _blocks(source):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return CopiedFile(size, digest.hexdigest())


def hash_file(path: Path, expected: int) -> CopiedFile:
    """The size and BLAKE3 digest of ``path``; without a digest where it has another size than ``expected``.

    Raises:
        CheckpointError: it cannot be read.
    """
    from blake3 import blake3

    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if stat.st_size != expected or S_ISFIFO(stat.st_mode):
        return CopiedFile(stat.st_size, "")
    size, digest = 0, blake3()
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return CopiedFile(size, digest.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
