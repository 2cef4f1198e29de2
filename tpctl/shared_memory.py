"""Collectives of CPU ranks on one host, over memory they all map: several times quicker than sockets.

    line 0   line 1   …  | even: rank 0's slot | rank 1's slot | … | odd: rank 0's slot | rank 1's slot | …
    count of count of
    rank 0   rank 1

Every collective is one exchange, numbered from 1. A rank copies its tensor into its slot, writes the exchange's number
on its line, waits until every line shows that number or a later one, and reads all slots. Exchanges alternate between
two sets of slots, so nobody has to wait before writing: whoever writes exchange n + 2 has seen every rank write n + 1,
and a rank writes n + 1 only after it has read n.

There is no lock and no fence. A rank's stores must become visible in the order it made them, and its loads must happen
in the order it asked for them; x86-64 promises both (Intel SDM volume 3, "Memory Ordering"; AMD64 volume 2, 7.2), so
``connect`` declines elsewhere.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tpctl.cores import affinity_cores
from tpctl.errors import EngineError

_SECRET = 16  # bytes, by which a rank knows that it mapped rank 0's memory, and not another host's
_LINE = 64  # bytes: each rank's count has a cache line of its own
_SLOT = 1 << 20  # bytes; longer tensors travel in pieces
_STRIDE = _SLOT + _LINE  # slots a power of two apart would compete for the same cache sets
_MAX_VIEWS = 512
_SPINS = 300  # looks before giving the core to others: about 20 us
_YIELDS = 300  # looks with the core offered to others in between, before sleeping
_LONGEST_NAP = 50e-6  # seconds
_SHORT = 8192  # elements, up to which one call of torch.sum is cheaper than several additions


class SharedMemory:
    """One rank's end of the shared memory. All ranks must make the same calls in the same order.

    Args:
        memory: mapped by every rank, zeroed at first, ``required_bytes(size)`` long.
        timeout: seconds to wait for the other ranks in one exchange.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._timeout = timeout
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        step = _LINE // 8
        self._counts = memoryview(memory).cast("q")
        self._mine = rank * step
        self._peers = [peer * step for peer in range(size) if peer != rank]
        self._count = 0
        self._views: dict[tuple[int, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        # A rank that waits on a core that another rank needs only delays what it waits for.
        self._most_spins = _SPINS if size <= affinity_cores() else 0
        self._spins, self._yields = self._most_spins, _YIELDS

    def let_spin(self, spin: bool) -> None:
        """Whether to look for the other ranks before sleeping. Where other processes want the cores, a rank that
        spins or yields has used up its time when the one it waits for is ready, and then waits for a core itself."""
        self._spins, self._yields = (self._most_spins, _YIELDS) if spin else (0, 0)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks, in place; every rank gets the same bits. bfloat16 is rounded once."""
        return self._reduce(x, _sum)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The element-wise maximum over the ranks, in place."""
        return self._reduce(x, _max)

    def all_gather(self, x: Tensor) -> Tensor:
        """``[size, *x.shape]``: every rank's ``x``."""
        gathered = torch.empty((self.size, x.numel()), dtype=x.dtype)
        flat = x.reshape(-1)
        for piece in self._pieces(flat):
            gathered[:, piece] = self._exchange(flat[piece])
        return gathered.view(self.size, *x.shape)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's ``text``, on every rank."""
        data = text.encode()
        length = int(self.all_gather(torch.tensor([len(data)]))[0])
        own = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.rank == 0 and data
            else torch.zeros(length, dtype=torch.uint8)
        )
        return bytes(self.all_gather(own)[0].numpy()).decode()

    def minimum(self, value: int) -> int:
        """The smallest ``value`` over the ranks."""
        return int(self._exchange(torch.tensor([value])).min())

    def _reduce(self, x: Tensor, reduce: Callable[[Tensor, Tensor], None]) -> Tensor:
        if not x.is_contiguous():
            return x.copy_(self._reduce(x.contiguous(), reduce))
        flat = x.view(-1)
        if x.nbytes <= _SLOT:
            reduce(self._exchange(flat), flat)
        else:
            for piece in self._pieces(flat):
                reduce(self._exchange(flat[piece]), flat[piece])
        return x

    def _pieces(self, flat: Tensor) -> list[slice]:
        length = _SLOT // flat.itemsize
        return [slice(start, start + length) for start in range(0, flat.numel(), length)]

    def _exchange(self, flat: Tensor) -> Tensor:
        """[size, length]: every rank's ``flat`` [length], to be read before the exchange after the next."""
        self._count = count = self._count + 1
        mine, everyone = self._slots(flat, count & 1)
        mine.copy_(flat)
        counts = self._counts
        counts[self._mine] = count
        for peer in self._peers:
            if counts[peer] < count:
                self._wait(peer, count)
        return everyone

    def _slots(self, flat: Tensor, parity: int) -> tuple[Tensor, Tensor]:
        """This rank's slot and all of them, as tensors like ``flat``."""
        key = (flat.shape[0], flat.dtype, parity)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            start = _first_slot(self.size) + parity * self.size * _STRIDE
            typed = self._memory[start : start + self.size * _STRIDE].view(flat.dtype).view(self.size, -1)
            everyone = typed[:, : flat.shape[0]]
            found = self._views[key] = (everyone[self.rank], everyone)
        return found

    def _wait(self, peer: int, count: int) -> None:
        """Until ``peer`` has written exchange ``count``: look, then look and yield, then look and sleep."""
        counts = self._counts
        for _ in range(self._spins):
            if counts[peer] >= count:
                return
        for _ in range(self._yields):
            if counts[peer] >= count:
                return
            os.sched_yield()
        nap = 1e-6
        deadline = time.monotonic() + self._timeout
        while counts[peer] < count:
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
            if time.monotonic() > deadline:
                raise EngineError(
                    f"rank {self.rank} waited {self._timeout:g} s for rank {peer * 8 // _LINE}, which did not answer; "
                    "see that rank's log"
                )


def is_supported() -> bool:
    """Whether ranks on this kind of machine can share memory so."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def connect(
    rank: int, size: int, timeout: float, broadcast: Callable[[str], str], minimum: Callable[[int], int]
) -> SharedMemory | None:
    """Map memory that rank 0 creates; ``None`` on every rank where one of them cannot. Collective.

    The memory has no name in any file system: it is gone with the last process that maps it, however that ends.

    Args:
        broadcast: gives every rank rank 0's text.
        minimum: gives every rank the smallest number.
    """
    able = is_supported()
    descriptor, secret, start = -1, b"", _first_slot(size)  # the secret stands where the first exchange will
    if able and rank == 0:
        descriptor = os.memfd_create("tpctl-ranks", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, required_bytes(size))
        secret = os.urandom(_SECRET)
        os.pwrite(descriptor, secret, start)
    path, _, told = broadcast(f"/proc/{os.getpid()}/fd/{descriptor} {secret.hex()}").rpartition(" ")
    memory = None
    if able:
        try:
            opened = descriptor if rank == 0 else os.open(path, os.O_RDWR | os.O_CLOEXEC)
            memory = mmap.mmap(opened, required_bytes(size))
            if rank != 0:
                os.close(opened)
            if memory[start : start + _SECRET].hex() != told:
                memory = None
        except (OSError, ValueError):  # another process namespace: the path leads nowhere, or elsewhere
            memory = None
    everywhere = minimum(int(memory is not None))  # rank 0's descriptor must stay open until all have used it
    if descriptor >= 0:
        os.close(descriptor)
    return SharedMemory(memory, rank, size, timeout) if memory is not None and everywhere else None


def required_bytes(size: int) -> int:
    """The length of the memory that ``size`` ranks share. Pages that are never written take no memory."""
    return _first_slot(size) + 2 * size * _STRIDE


def _first_slot(size: int) -> int:
    return -(-size * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _sum(everyone: Tensor, out: Tensor) -> None:
    if len(everyone) == 2:
        torch.add(everyone[0], everyone[1], out=out)
    elif out.itemsize < 4 and out.numel() > _SHORT:
        # One rounding, like torch.sum's, which takes three times as long over rows of a narrow type.
        total = everyone[0].float()
        for row in everyone[1:]:
            total.add_(row)
        out.copy_(total)
    else:
        torch.sum(everyone, 0, out=out)


def _max(everyone: Tensor, out: Tensor) -> None:
    torch.amax(everyone, 0, out=out)
