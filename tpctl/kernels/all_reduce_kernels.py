"""The device code of `all_reduce`, which says what the two protocols are."""

from __future__ import annotations

import triton
import triton.language as tl


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
def all_reduce_kernel(
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
def winner_kernel(
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
