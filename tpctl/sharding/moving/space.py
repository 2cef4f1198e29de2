"""Memory that a thread uses again and again. Fresh memory is not free: the kernel hands it out page by page, zeroed."""

from __future__ import annotations

from math import prod
from threading import local

import numpy as np

from tpctl.sharding.moving.files import Bytes

_ALIGNED = 64
_THREAD = local()


class Space:
    """Arrays of bytes, one behind the other, all of them given back at once."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self.used = 0

    @classmethod
    def of_thread(cls) -> Space:
        """That of the running thread."""
        space: Space | None = getattr(_THREAD, "space", None)
        if space is None:
            space = _THREAD.space = cls()
        return space

    def take(self, *shape: int) -> Bytes:
        """An array of undefined bytes, valid until what was used before it is freed."""
        first, nbytes = self.used, prod(shape)
        self.used = first + -(-nbytes // _ALIGNED) * _ALIGNED
        if self.used > self._memory.size:  # arrays that were taken keep the old memory
            self._memory = np.empty(2 * self.used, np.uint8)
        return self._memory[first : first + nbytes].reshape(shape)

    def free(self, used: int) -> None:
        """Give back all but the first ``used`` bytes."""
        self.used = used
