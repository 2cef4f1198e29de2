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
import triton.language as tl

from tpctl.kernels.launch import launch_options, next_power_of_2
from tpctl.kernels.norm import add_rms_norm_reference

# About half a minute of polling; then the error flag is set and the kernel ends with wrong data instead of hanging.
_MAX_POLLS = 1 << 25
# Bytes of a message above which the flags protocol is faster (docs/kernel-notes.md).
_WORDS_LIMIT = 512 * 1024


@triton.jit
def _unpack(word, WIDE: tl.constexpr):
    """The values in 32-bit words: (float32, unused zero) when WIDE, else the low and high bfloat16 as float32."""
    if WIDE:
        low = word.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    else:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _pack(low, high, WIDE: tl.constexpr):
    if WIDE:
        word = low.to(tl.int32, bitcast=True)
    else:
        low16 = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high16 = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        word = low16 | high16
    return word


@triton.jit
def _round(value, WIDE: tl.constexpr):
    if WIDE:
        rounded = value
    else:
        rounded = value.to(tl.bfloat16).to(tl.float32)
    return rounded


@triton.jit
def _await_words(pointer, mask, epoch, error_ptr, MAX_POLLS: tl.constexpr):
    """Read 8-byte words until all carry `epoch` in their upper half; returns the lower halves."""
    blank = epoch.to(tl.int64) << 32
    word = tl.load(pointer, mask=mask, other=blank, volatile=True)
    late = tl.sum(((word >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
    polls = 0
    while (late > 0) & (polls < MAX_POLLS):
        word = tl.load(pointer, mask=mask, other=blank, volatile=True)
        late = tl.sum(((word >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
        polls += 1
    if late > 0:
        tl.store(error_ptr, 1)
    return word.to(tl.int32)


@triton.jit(do_not_specialize=["word_slots", "max_rows"])
def _all_reduce_kernel(
    x_ptr,  # rows of 32-bit words, like all that follow
    residual_ptr,
    weight_ptr,
    out_ptr,
    peers_ptr,  # int64 [W]: every rank's buffer, as mapped here
    epochs_ptr,
    error_ptr,
    words,
    hidden,
    x_stride,
    residual_stride,
    out_stride,
    row_words,  # words of a row slot
    word_slots,
    max_rows,
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    WIDE: tl.constexpr,
    FUSED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    FLAGS: tl.constexpr,
    MAX_POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < words
    if FUSED:
        weight = tl.load(weight_ptr + col, mask=mask, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs_ptr + row) + 1
    mine = tl.load(x_ptr + row.to(tl.int64) * x_stride + col, mask=mask, other=0)
    data_start = 2 * WORLD * row_words * word_slots.to(tl.int64)  # in 8-byte words, like flags_start
    flags_start = data_start + WORLD * row_words * max_rows.to(tl.int64)
    if FLAGS:
        plane = row_words * max_rows.to(tl.int64)  # one source's rows
    else:
        plane = row_words * word_slots.to(tl.int64)
    row_start = (epoch & 1).to(tl.int64) * WORLD * plane + row.to(tl.int64) * row_words

    for peer in tl.static_range(WORLD):
        if peer != RANK:
            base = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64))
            target = row_start + RANK * plane
            if FLAGS:
                tl.store((base + data_start).to(tl.pointer_type(tl.int32)) + target + col, mine, mask=mask)
            else:
                word = (mine.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
                tl.store(base + target + col, word, mask=mask)
    if FLAGS:
        tl.debug_barrier()
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                base = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64))
                flag = (base + flags_start).to(tl.pointer_type(tl.int32)) + RANK * max_rows + row
                tl.atomic_xchg(flag, epoch, sem="release", scope="sys")

    if FUSED:
        old = tl.load(residual_ptr + row.to(tl.int64) * residual_stride + col, mask=mask, other=0)
    own = tl.load(peers_ptr + RANK).to(tl.pointer_type(tl.int64))
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            word = mine
        else:
            source = row_start + peer * plane
            if FLAGS:
                flag = (own + flags_start).to(tl.pointer_type(tl.int32)) + peer * max_rows + row
                polls = 0
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                # A peer may be one call ahead already.
                while (seen - epoch < 0) & (polls < MAX_POLLS):
                    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                    polls += 1
                if seen - epoch < 0:
                    tl.store(error_ptr, 1)
                tl.debug_barrier()
                data = (own + data_start).to(tl.pointer_type(tl.int32)) + source
                word = tl.load(data + col, mask=mask, other=0, volatile=True)
            else:
                word = _await_words(own + source + col, mask, epoch, error_ptr, MAX_POLLS)
        add_low, add_high = _unpack(word, WIDE)
        low += add_low
        high += add_high

    if FUSED:
        old_low, old_high = _unpack(old, WIDE)
        # Rounded like an all-reduce and an addition of their own.
        low = _round(_round(low, WIDE) + old_low, WIDE)
        high = _round(_round(high, WIDE) + old_high, WIDE)
        tl.store(residual_ptr + row.to(tl.int64) * residual_stride + col, _pack(low, high, WIDE), mask=mask)
        squares = tl.sum(tl.where(mask, low * low + high * high, 0.0), 0)
        scale = tl.rsqrt(squares / hidden + eps)
        weight_low, weight_high = _unpack(weight, WIDE)
        if UNIT_OFFSET:
            low = low * scale * (1.0 + weight_low)
            high = high * scale * (1.0 + weight_high)
        else:
            low = _round(low * scale, WIDE) * weight_low
            high = _round(high * scale, WIDE) * weight_high
    tl.store(out_ptr + row.to(tl.int64) * out_stride + col, _pack(low, high, WIDE), mask=mask)
    tl.store(epochs_ptr + row, epoch)


@triton.jit(do_not_specialize=["rows", "word_slots", "max_rows"])
def _winner_kernel(
    scores_ptr,
    ids_ptr,
    out_ptr,
    peers_ptr,
    epochs_ptr,
    error_ptr,
    rows,
    row_words,
    word_slots,
    max_rows,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    MAX_POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The words protocol with one (score, id) a row; it uses the last word slots, BLOCK rows of two words in each."""
    slot = word_slots - 1 - tl.program_id(0)
    counter = epochs_ptr + max_rows + tl.program_id(0)
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + index
    mask = row < rows
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(counter) + 1
    score = tl.load(scores_ptr + row, mask=mask, other=float("-inf"))
    token = tl.load(ids_ptr + row, mask=mask, other=0).to(tl.int32)
    plane = row_words * word_slots.to(tl.int64)
    start = (epoch & 1).to(tl.int64) * WORLD * plane + slot.to(tl.int64) * row_words
    stamp = epoch.to(tl.int64) << 32
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            target = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64)) + start + RANK * plane
            bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            tl.store(target + index, bits | stamp, mask=mask)
            tl.store(target + BLOCK + index, token.to(tl.int64) | stamp, mask=mask)
    own = tl.load(peers_ptr + RANK).to(tl.pointer_type(tl.int64))
    best = score
    winner = token
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            source = own + start + peer * plane
            bits = _await_words(source + index, mask, epoch, error_ptr, MAX_POLLS)
            other_token = _await_words(source + BLOCK + index, mask, epoch, error_ptr, MAX_POLLS)
            other = bits.to(tl.float32, bitcast=True)
            better = (other > best) | ((other == best) & (other_token < winner))
            best = tl.where(better, other, best)
            winner = tl.where(better, other_token, winner)
    tl.store(out_ptr + row, winner.to(tl.int64), mask=mask)
    tl.store(counter, epoch)


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
        self._buffer = symmetric_memory.empty(size, dtype=torch.int64, device=device)
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
        _winner_kernel[(triton.cdiv(rows, self._WINNER_ROWS),)](
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
        _all_reduce_kernel[(rows,)](
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
