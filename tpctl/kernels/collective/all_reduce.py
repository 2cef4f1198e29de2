"""All-reduce of small messages over symmetric memory, alone or fused with the residual addition and RMSNorm after it.

Every rank pushes its row into each peer's buffer and sums what arrives, in rank order, so all ranks get the same bits.
One program handles one row. There is no barrier, flag or fence: a slot is filled with one word that is never sent
(`all_reduce_kernels.EMPTY`; a number that would read so travels as zero, its equal), and a reader waits until no word
of its row is that. Having read the row it empties the slot again. So a message takes one trip and its own bytes.

The kernel that computes a row can send it itself, part by part (`all_reduce_kernels.send_values`): the words then
travel while it ends and the all-reduce starts. It does so after it has waited for all kernels before it, so the order
is the same.

A row's program keeps its own call counter on the device (graph replays advance it too), and buffers alternate. A peer
can only be one call ahead: to start call e + 2 it must have received this rank's row of call e + 1, sent after the row
of call e was read and its slot emptied. So ranks must make the same calls in the same order on one stream each.

A peer that sends nothing for minutes is given up: from then on no wait waits, and `winner` answers -1 on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton

from tpctl.kernels.collective.all_reduce_kernels import EMPTY, all_reduce_kernel, winner_kernel
from tpctl.kernels.common.launch import launch_options, next_power_of_2
from tpctl.kernels.common.norm import add_rms_norm_reference
from tpctl.kernels.common.runs import as_runs

# About two minutes of polling; then the error flag is set and the kernel ends with wrong data instead of hanging.
_MAX_POLLS = 1 << 27
_WORDS_PER_WARP = 256
_WINNER_ROWS = 256  # rows that a program of `winner` handles, two words each


class PeerLayout(NamedTuple):
    """Where things lie in a rank's buffer, in words of 4 bytes: [parity 2][source rank W] planes."""

    max_rows: int
    row_words: int  # of a row's slot
    first_word: int  # of a plane's slots for `winner`
    plane_words: int

    @staticmethod
    def of(max_rows: int, hidden: int, dtype: torch.dtype) -> PeerLayout:
        """For launches of up to max_rows rows of up to hidden values of bfloat16 or float32."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"peer all-reduce takes bfloat16 or float32, not {dtype}")
        words = hidden if dtype is torch.float32 else (hidden + 1) // 2
        row_words = triton.cdiv(words, 32) * 32  # lines of 128 bytes
        first_word = max_rows * row_words
        winner_words = triton.cdiv(max_rows, _WINNER_ROWS) * 2 * _WINNER_ROWS
        return PeerLayout(max_rows, row_words, first_word, first_word + winner_words)

    @property
    def counters(self) -> int:
        """Slots that count their calls: a row each, and those of `winner` behind them."""
        return self.max_rows + triton.cdiv(self.max_rows, _WINNER_ROWS)

    def words(self, world: int) -> int:
        """Words of a rank's buffer, which must be filled with `EMPTY` before the first call."""
        return 2 * world * self.plane_words


class PeerBuffer:
    """One rank's end of the buffers that ranks push into, and the collectives over them.

    The calls need the same order on every rank. `connect` makes the ends; here they are given: rank: this one's place.
    pointers: int64 [W] on the device, every rank's buffer as addressed from here, this rank's own among them, each at a
    multiple of 128 bytes. dtype: bfloat16 or float32. epochs: int32, how often each row has been summed; a kernel that
    sends rows itself reads it, and sends, after `gdc_wait`, when the calls before are complete.

    Many more programs can wait than fit the device at once: the lowest rows are placed first, on every rank alike.
    """

    def __init__(self, rank: int, pointers: torch.Tensor, layout: PeerLayout, dtype: torch.dtype) -> None:
        self.rank, self.world = rank, pointers.shape[0]
        self.dtype = dtype
        self.layout = layout
        self.pointers = pointers
        self.epochs = torch.zeros(layout.counters, dtype=torch.int32, device=pointers.device)
        self._error = torch.zeros(1, dtype=torch.int32, device=pointers.device)
        self._held: object = None

    @classmethod
    def connect(
        cls, group: dist.ProcessGroup, max_rows: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> PeerBuffer:
        """This rank's end over symmetric memory. Collective; the ranks must be GPUs of one host with peer access.

        max_rows: most rows of a launch; more go in several. hidden: most columns.
        """
        import torch.distributed._symmetric_memory as symmetric_memory
        from torch._C._distributed_c10d import _SymmetricMemory

        layout = PeerLayout.of(max_rows, hidden, dtype)
        size = layout.words(dist.get_world_size(group))
        # Not `symmetric_memory.empty`, which imports sympy to compute a stride (seconds without bytecode) and takes
        # the memory from a pool that one buffer has no use for.
        buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.int32, device).fill_(EMPTY)
        handle = symmetric_memory.rendezvous(buffer, group)
        pointers = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        end = cls(dist.get_rank(group), pointers, layout, dtype)
        end._held = (buffer, handle)
        # Nobody may write to a peer that is still filling its buffer.
        torch.cuda.synchronize(device)
        dist.barrier(group)
        return end

    @property
    def nbytes(self) -> int:
        """Device memory of this rank's buffer, which torch's allocator does not count."""
        return 4 * self.layout.words(self.world)

    def timed_out(self) -> bool:
        """Whether a wait for a peer ever ran out (synchronises with the device)."""
        return bool(self._error.item())

    def fits(self, x_TH: torch.Tensor) -> bool:
        """Whether x_TH [T, H] or [S, T, H] can go through this buffer."""
        rows, hidden = x_TH.shape[-2:]
        words = hidden * x_TH.element_size() / 4
        return x_TH.dtype is self.dtype and rows > 0 and words.is_integer() and words <= self.layout.row_words

    def check(self, x_TH: torch.Tensor, *, sent: bool = False) -> None:
        """Raise ValueError unless x_TH fits; sent: unless a kernel can send it before the all-reduce."""
        rows, hidden = x_TH.shape[-2:]
        if sent and hidden % 2:
            raise ValueError(f"{hidden} features cannot be sent in pairs")
        if not self.fits(x_TH):
            raise ValueError(
                f"[{rows}, {hidden}] {x_TH.dtype} does not fit a peer buffer of {self.dtype}, "
                f"{self.layout.row_words} words a row"
            )
        if sent and rows > self.layout.max_rows:
            raise ValueError(
                f"[{rows}, {hidden}]: {rows} rows are more than the {self.layout.max_rows} that can be sent"
            )

    def all_reduce(self, x_TH: torch.Tensor, *, out: torch.Tensor | None = None, pdl: bool = False) -> torch.Tensor:
        """The sum of every rank's x_TH [T, H], in rank order in float32, rounded once. `out` may be x_TH.

        Here as below x_TH may also be the runs [S, T, H] of `split_linear`, whose sum is rounded to their dtype before
        it is sent.
        """
        return self._launch(x_TH, None, None, 0.0, False, out, False, pdl)

    def all_reduce_add_rms_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        *,
        unit_offset: bool = False,
        out: torch.Tensor | None = None,
        sent: bool = False,
        pdl: bool = False,
    ) -> torch.Tensor:
        """residual_TH += sum of every rank's x_TH, in place, then RMSNorm of it with weight_H; as
        `norm.add_rms_norm`.

        residual_TH must be the same on every rank. sent: the kernel that made x_TH has sent it.
        """
        return self._launch(x_TH, residual_TH, weight_H, eps, unit_offset, out, sent, pdl)

    def winner(
        self, scores_T: torch.Tensor, ids_T: torch.Tensor, *, out: torch.Tensor | None = None, pdl: bool = False
    ) -> torch.Tensor:
        """Per row the id with the best score of any rank, the lowest id among equals; -1 once a wait has run out.

        scores_T: float32 [T], NaN as -inf; ids_T: int64 [T] below 2**31. Returns int64 [T].
        """
        rows, layout = scores_T.shape[0], self.layout
        out_T = torch.empty_like(ids_T) if out is None else out
        if rows > layout.max_rows:
            for start in range(0, rows, layout.max_rows):
                piece = slice(start, start + layout.max_rows)
                self.winner(scores_T[piece], ids_T[piece], out=out_T[piece], pdl=pdl)
            return out_T
        winner_kernel[(triton.cdiv(rows, _WINNER_ROWS),)](
            scores_T,
            ids_T,
            out_T,
            self.pointers,
            self.epochs,
            self._error,
            rows,
            layout.max_rows,
            layout.first_word,
            layout.plane_words,
            RANK=self.rank,
            WORLD=self.world,
            MAX_POLLS=_MAX_POLLS,
            BLOCK=_WINNER_ROWS,
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
        sent: bool,
        pdl: bool,
    ) -> torch.Tensor:
        self.check(x_TH, sent=sent)
        x_STH = as_runs(x_TH)
        splits, rows, hidden = x_STH.shape
        out_TH = torch.empty_like(x_STH[0]) if out is None else out
        most = self.layout.max_rows
        if sent and splits > 1:
            raise ValueError(f"{splits} runs cannot have been sent, only their sum")
        if rows > most:
            for start in range(0, rows, most):
                piece = slice(start, start + most)
                residual = None if residual_TH is None else residual_TH[piece]
                self._launch(x_STH[:, piece], residual, weight_H, eps, unit_offset, out_TH[piece], False, pdl)
            return out_TH
        words = hidden * x_TH.element_size() // 4
        fused = residual_TH is not None and weight_H is not None
        x_words = x_STH.view(torch.int32)
        residual = residual_TH.view(torch.int32) if residual_TH is not None else x_words[0]
        out_words = out_TH.view(torch.int32)
        block = next_power_of_2(words)
        all_reduce_kernel[(rows,)](
            x_words,
            residual,
            weight_H.view(torch.int32) if weight_H is not None else x_words,
            out_words,
            self.pointers,
            self.epochs,
            self._error,
            words,
            hidden,
            x_words.stride(1),
            x_words.stride(0),
            residual.stride(0),
            out_words.stride(0),
            self.layout.row_words,
            self.layout.plane_words,
            eps,
            RANK=self.rank,
            WORLD=self.world,
            SPLITS=splits,
            WIDE=self.dtype is torch.float32,
            FUSED=fused,
            SENT=sent,
            UNIT_OFFSET=unit_offset,
            MAX_POLLS=_MAX_POLLS,
            BLOCK=block,
            PDL=pdl,
            num_warps=max(1, min(16, block // _WORDS_PER_WARP)),
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
