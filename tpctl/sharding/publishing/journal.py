"""The notes of an unfinished run: which parts are complete, with the digests of their tensors.

Beside the part files of a pending folder lie small files, ``part-P.json``, each written after all files of
part P are on disk. The next run takes over those parts whose notes are of the very same job and whose bytes
still hash the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from tpctl.errors import TpctlError
from tpctl.sharding.moving.files import ByteCounter, Files
from tpctl.sharding.moving.layout import Stored, whole
from tpctl.sharding.moving.parts import PartFile
from tpctl.sharding.moving.transfer import hash_all

Digests = dict[tuple[int | None, str], str]


class Journal:
    """The notes in ``folder`` about the job that ``identity`` and the ``files`` to be written tell from others."""

    def __init__(self, folder: Path, identity: str, files: Sequence[PartFile]) -> None:
        self.folder = folder
        job = [identity, [(file.file, file.header.text) for file in files]]
        self.job = sha256(repr(job).encode()).hexdigest()

    def note(self, index: int, digests: Mapping[tuple[int | None, str], str]) -> None:
        """Note part ``index`` as complete."""
        rows = [[rank, name, digest] for (rank, name), digest in digests.items()]
        write_synced(self._path(index), json.dumps({"job": self.job, "digests": rows}).encode())

    def recall(self, index: int, files: Sequence[PartFile], tally: ByteCounter) -> Digests | None:
        """The digests of part ``index`` if an earlier run completed it and its ``files`` are still intact."""
        try:
            notes = json.loads(self._path(index).read_bytes())
            if notes["job"] != self.job:
                return None
            digests = {(rank, name): digest for rank, name, digest in notes["digests"]}
            stored = [one for file in files for one in self._expected(file, digests)]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        before = tally.done
        try:
            with Files() as handles:
                hash_all(stored, handles, tally)
        except TpctlError:
            tally.reset(before)
            return None
        return digests

    def foreign(self) -> int:
        """Bytes of the part files in the folder, if they are those of another job."""
        jobs = set()
        for path in self.folder.glob("part-*.json"):
            try:
                jobs.add(json.loads(path.read_bytes())["job"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        if not jobs - {self.job}:
            return 0
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _expected(self, file: PartFile, digests: Digests) -> list[Stored]:
        path = self.folder / file.file
        with path.open("rb") as opened:
            if opened.read(file.header.size) != file.header.raw or path.stat().st_size != file.header.file_size:
                raise ValueError(f"{path} is another file")
        tensors = file.header.tensors.values()
        return [whole(info, path, file.rank, digests[file.rank, info.name]) for info in tensors]

    def _path(self, index: int) -> Path:
        return self.folder / note_name(index)


def note_name(index: int) -> str:
    """The name of part ``index``'s notes."""
    return f"part-{index}.json"


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file that is on disk, whole, when this returns; a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
