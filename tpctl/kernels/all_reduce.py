"""All-reduce of small messages over symmetric memory, alone or fused with the residual addition and RMSNorm after it.

Every rank pushes its row into each peer's buffer and sums what arrives, in rank order, so all ranks get the same bits.
One program handles one row. There is no barrier; two protocols say when data is complete:

- words: each 8-byte word carries 4 bytes of data and the call's number, so a reader just waits for the number. One
  one-way trip, twice the bytes: for few rows.
- flags: plain data, then a fence and one flag a row: for many rows.

A row's program keeps its own call counter on the device (graph replays advance it too), and buffers alternate. A peer
can only be one call ahead: to start call e + 2 it must have received this rank's row of call e + 1, sent after e was
read. So ranks must make the same calls in the same order on one stream each.

    buffer of words:  [parity 2][source rank W][word slots][row words] of 8 bytes
    buffer of flags:  [parity 2][source rank W][rows][row words] of 4 bytes, and [W][rows] flags

The two lie apart, so that no data is ever taken for a call's number.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton

from tpctl.kernels.all_reduce_kernels import all_reduce_kernel, winner_kernel
from tpctl.kernels.launch import launch_options, next_power_of_2
from tpctl.kernels.norm import add_rms_norm_reference

# About half a minute of polling; then the error flag is set and the kernel ends with wrong data instead of hanging.
_MAX_POLLS = 1 << 25
# Bytes of a message above which the flags protocol is faster (docs/kernel-notes.md).
_WORDS_LIMIT = 512 * 1024


class PeerBuffer:
    """One rank's end of the symmetric buffer, and the collectives over it.

    max_rows: most rows of a call. hidden: most columns. dtype: bfloat16 or float32. The group's ranks must be
    GPUs of one host with peer access; creation is collective. The calls below need the same order on every
    rank.
    """

    _WINNER_ROWS = 256  # rows one program of `winner` handles, two words each

    def __init__(
        self, group: dist.ProcessGroup, max_rows: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory
        from torch._C._distributed_c10d import _SymmetricMemory

        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"peer all-reduce takes bfloat16 or float32, not {dtype}")
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.dtype = dtype
        self.wide = dtype is torch.float32
        self.max_rows = max_rows
        self.row_words = max(hidden if self.wide else (hidden + 1) // 2, 2 * self._WINNER_ROWS)
        winners = triton.cdiv(max_rows, self._WINNER_ROWS)
        self.word_rows = min(max_rows, max(1, _WORDS_LIMIT // (4 * self.row_words)))
        self.word_slots = self.word_rows + winners
        size = self.world * self.row_words * (2 * self.word_slots + max_rows) + triton.cdiv(self.world * max_rows, 2)
        # Not `symmetric_memory.empty`, which imports sympy to compute a stride (seconds without bytecode) and takes
        # the memory from a pool that one buffer has no use for.
        self._buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.int64, device)
        self._buffer.zero_()
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        self._peers = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._epochs = torch.zeros(max_rows + winners, dtype=torch.int32, device=device)
        self._error = torch.zeros(1, dtype=torch.int32, device=device)
        # Nobody may write to a peer that is still clearing.
        torch.cuda.synchronize(device)
        dist.barrier(group)

    def timed_out(self) -> bool:
        """Whether a wait for a peer ever ran out (synchronises with the device)."""
        return bool(self._error.item())

    def fits(self, x_TH: torch.Tensor) -> bool:
        """Whether x_TH can go through this buffer."""
        rows, hidden = x_TH.shape
        per_word = 1 if self.wide else 2
        return (
            x_TH.dtype is self.dtype
            and 0 < rows <= self.max_rows
            and hidden % per_word == 0
            and hidden // per_word <= self.row_words
        )

    def all_reduce(
        self, x_TH: torch.Tensor, *, out: torch.Tensor | None = None, flags: bool | None = None, pdl: bool = False
    ) -> torch.Tensor:
        """The sum of every rank's x_TH [T, H], in rank order in float32, rounded once. `out` may be x_TH."""
        return self._launch(x_TH, None, None, 0.0, False, out, flags, pdl)

    def all_reduce_add_rms_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        *,
        unit_offset: bool = False,
        out: torch.Tensor | None = None,
        flags: bool | None = None,
        pdl: bool = False,
    ) -> torch.Tensor:
        """residual_TH += sum of every rank's x_TH, in place, then RMSNorm of it with weight_H; as
        `norm.add_rms_norm`.

        residual_TH must be the same on every rank. flags chooses the protocol (default: by message size).
        """
        return self._launch(x_TH, residual_TH, weight_H, eps, unit_offset, out, flags, pdl)

    def winner(
        self, scores_T: torch.Tensor, ids_T: torch.Tensor, *, out: torch.Tensor | None = None, pdl: bool = False
    ) -> torch.Tensor:
        """Per row the id with the best score of any rank, the lowest id among equals.

        scores_T: float32 [T]; ids_T: int64 [T] below 2**31; T <= max_rows. Returns int64 [T].
        """
        rows = scores_T.shape[0]
        out_T = torch.empty_like(ids_T) if out is None else out
        winner_kernel[(triton.cdiv(rows, self._WINNER_ROWS),)](
            scores_T,
            ids_T,
            out_T,
            self._peers,
            self._epochs,
            self._error,
            rows,
            self.row_words,
            self.word_slots,
            self.max_rows,
            RANK=self.rank,
            WORLD=self.world,
            MAX_POLLS=_MAX_POLLS,
            BLOCK=self._WINNER_ROWS,
            PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
        return out_T

    def _launch(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        weight_H: torch.Tensor | None,
        eps: float,
        unit_offset: bool,
        out: torch.Tensor | None,
        flags: bool | None,
        pdl: bool,
    ) -> torch.Tensor:
        if not self.fits(x_TH):
            raise ValueError(
                f"[{x_TH.shape[0]}, {x_TH.shape[1]}] {x_TH.dtype} does not fit a peer buffer of {self.max_rows} rows, "
                f"{self.row_words} words each, {self.dtype}"
            )
        rows, hidden = x_TH.shape
        out_TH = torch.empty_like(x_TH) if out is None else out
        words = hidden if self.wide else hidden // 2
        if flags is None:
            flags = rows > self.word_rows or rows * words * 4 > _WORDS_LIMIT
        elif not flags and rows > self.word_rows:
            raise ValueError(f"the words protocol takes {self.word_rows} rows here, got {rows}")
        fused = residual_TH is not None and weight_H is not None
        x_words = x_TH.view(torch.int32)
        residual = residual_TH.view(torch.int32) if residual_TH is not None else x_words
        out_words = out_TH.view(torch.int32)
        block = next_power_of_2(words)
        all_reduce_kernel[(rows,)](
            x_words,
            residual,
            weight_H.view(torch.int32) if weight_H is not None else x_words,
            out_words,
            self._peers,
            self._epochs,
            self._error,
            words,
            hidden,
            x_words.stride(0),
            residual.stride(0),
            out_words.stride(0),
            self.row_words,
            self.word_slots,
            self.max_rows,
            eps,
            RANK=self.rank,
            WORLD=self.world,
            WIDE=self.wide,
            FUSED=fused,
            UNIT_OFFSET=unit_offset,
            FLAGS=flags,
            MAX_POLLS=_MAX_POLLS,
            BLOCK=block,
            PDL=pdl,
            num_warps=max(1, min(16, block // 128)),
            **launch_options(pdl),
        )
        return out_TH


def all_reduce_add_rms_norm_reference(
    parts_WTH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """`PeerBuffer.all_reduce_add_rms_norm` of all ranks' parts, stacked, in plain torch; writes residual_TH too."""
    total_TH = parts_WTH.float().sum(0).to(parts_WTH.dtype)
    return add_rms_norm_reference(total_TH, residual_TH, weight_H, eps, unit_offset=unit_offset)
