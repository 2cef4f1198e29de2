"""What a rank may take of its GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpctl.accounting import RESERVE
from tpctl.errors import EngineError


@dataclass(frozen=True)
class GpuShare:
    """The part of a GPU that one rank may fill, in bytes, as it was before the rank took any.

    free: what nobody holds. utilization: the part of ``total`` that may be held, by others and this rank together.
    reserved: what torch holds in this process.
    """

    total: int
    free: int
    utilization: float
    reserved: int = 0

    @staticmethod
    def of(device: torch.device, utilization: float) -> GpuShare:
        free, total = torch.cuda.mem_get_info(device)
        return GpuShare(total, free, utilization, torch.cuda.memory_reserved(device))

    @property
    def nbytes(self) -> int:
        """What is this rank's: nothing or less where others hold all that may be held."""
        return min(self.free, int(self.total * self.utilization) - (self.total - self.free))

    def taken(self, device: torch.device) -> int:
        """Bytes that this rank has taken since: tensors, what torch keeps for more of them, and what it knows nothing
        of (NCCL's buffers, peer memory, loaded kernels). What others have taken since counts too."""
        free, _ = torch.cuda.mem_get_info(device)
        return max(self.free - free, torch.cuda.memory_reserved(device) - self.reserved)

    def check_weights(self, rank: int, nbytes: int) -> None:
        """Refuse weights of ``nbytes`` that cannot be held.

        Raises:
            EngineError: with the numbers.
        """
        if nbytes + RESERVE > self.nbytes:
            raise EngineError(
                f"rank {rank} holds {nbytes / 2**30:.1f} GiB of weights, but its GPU has "
                f"{self.free / 2**30:.1f} of {self.total / 2**30:.1f} GiB free, {max(self.nbytes, 0) / 2**30:.1f} of "
                f"them within --gpu-memory-utilization {self.utilization}; use a larger --tp, free the GPU or raise it"
            )
