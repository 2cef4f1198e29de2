"""The tensor-parallel group: this rank, its device, and the collectives that the layers need.

It is built once, in the worker, and passed down to whatever needs it; nothing reads a global. A group of one rank
needs no process group: its collectives return their input.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tpctl import shared_memory
from tpctl.shared_memory import SharedMemory

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class TPGroup:
    """``size`` ranks that hold one model together.

    Attributes:
        rank, size: this process's place, ``0 <= rank < size``.
        device: where this rank's tensors live. kind: that of a device that they are computed for: ``device``'s.
        one_host: all ranks are on this host.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self.kind = self.device.type
        self.one_host = True
        self._shared: SharedMemory | None = None

    @classmethod
    def from_environment(cls, device_type: str) -> TPGroup:
        """Join the group that torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) describe.

        On ``"cuda"`` device tensors travel by NCCL. CPU tensors travel by gloo, or through shared memory where that
        works and all ranks run on one host, as they do where one agent has started them all;
        ``TPCTL_CPU_COLLECTIVES=gloo`` in the environment rules it out.
        """
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device_type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        group = cls(rank, size, device)
        group.one_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == size
        if size > 1 and device_type == "cpu" and group.one_host and os.environ.get("TPCTL_CPU_COLLECTIVES") != "gloo":
            timeout = COLLECTIVE_TIMEOUT.total_seconds()
            group._shared = shared_memory.connect(rank, size, timeout, group.broadcast_text, group.minimum)
            if group._shared is not None:
                group.minimum(0)  # no rank waits for a word by gloo any more
                dist.destroy_process_group()  # its thread would look around a hundred times a second
        return group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks, in place."""
        if self._shared is not None:
            return self._shared.all_reduce(x)
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The element-wise maximum of ``x`` over the ranks, in place."""
        if self._shared is not None:
            return self._shared.all_reduce_max(x)
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """``[size, *x.shape]``: every rank's ``x``, which must have the same shape everywhere."""
        if self._shared is not None:
            return self._shared.all_gather(x)
        if self.size == 1:
            return x.unsqueeze(0)
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if x.device.type == "cuda":
            dist.all_gather_into_tensor(gathered, x.contiguous())
        else:
            dist.all_gather(list(gathered.unbind(0)), x.contiguous())
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x`` on every rank; the others give one of its shape and type, which may be overwritten."""
        if self._shared is not None:
            return self._shared.all_gather(x)[0]
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def minimum(self, value: int) -> int:
        """The smallest ``value`` over the ranks (host side)."""
        if self._shared is not None:
            return self._shared.minimum(value)
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def maximum(self, value: int) -> int:
        """The largest ``value`` over the ranks (host side)."""
        return -self.minimum(-value)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's ``text``, on every rank (host side)."""
        if self.size == 1:
            return text
        if self._shared is not None:
            return self._shared.broadcast_text(text)
        box = [text]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @property
    def let_spin(self) -> Callable[[bool], None] | None:
        """Says whether this rank may spin while it waits for others; ``None`` where that is not ours to say."""
        return None if self._shared is None else self._shared.let_spin

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
