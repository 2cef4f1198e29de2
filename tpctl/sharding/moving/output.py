"""A stored tensor as it is written: hashed on the way, small pieces together."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpctl.sharding.moving.files import Bytes, Files
from tpctl.sharding.moving.layout import Stored

WAIT_BYTES = 1 << 16
"""What is written at once waits for its neighbours if it is smaller."""


class Output:
    """A stored tensor that is written, from its first byte to its last where it is hashed; what is small waits until
    there is more of it, since a mixture's scales are thousands of tensors of a few hundred bytes."""

    def __init__(self, stored: Stored, files: Files, digest: Any) -> None:
        self.stored, self.files, self.digest = stored, files, digest
        self.held: list[bytes] = []
        self.first = self.stop = 0

    def write(self, data: Bytes, at: int, *, hole: bool = False) -> None:
        """Write ``data`` at byte ``at`` of the tensor; ``hole``: the file has these zeros already."""
        assert self.digest is None or at == self.stop, f"{self.stored.label}: byte {at} follows {self.stop}"
        if at != self.stop or hole or self.stop - self.first + data.nbytes > WAIT_BYTES:
            self.flush()
            self.first = at
        self.stop = at + data.nbytes
        if hole:
            self._hash(data.data)
            self.first = self.stop
        elif data.nbytes > WAIT_BYTES:
            self._put(data)
        else:
            self.held.append(data.tobytes())

    def flush(self) -> None:
        if self.held:
            self._put(np.frombuffer(b"".join(self.held), np.uint8))
            self.held.clear()

    def _put(self, data: Bytes) -> None:
        self._hash(data.data)
        self.files.write(self.stored.path, data, self.stored.offset + self.first)
        self.first += data.nbytes

    def _hash(self, data: memoryview) -> None:
        if self.digest is not None:
            self.digest.update(data)
