"""The device code of `all_reduce`, which says what the protocol is."""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = -(1 << 31)
"""The word of a slot that nothing has arrived in: bfloat16 (0, -0), float32 -0."""

_EMPTY = tl.constexpr(EMPTY)


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
def _buffer(peers_ptr, rank: tl.constexpr):
    """A rank's buffer. It starts a page, which the compiler must be told to move 16 bytes at once."""
    return tl.multiple_of(tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32)), 128)


@triton.jit
def _sendable(word):
    """The word, or zero, which is the same number, where it would read as an empty slot."""
    return tl.where(word == _EMPTY, 0, word)


@triton.jit
def send_values(
    value,  # [M, N] float32: columns block * N and on of rows m
    m,
    block,
    rows,
    columns,
    epochs,  # [M], the numbers of the calls that will sum these rows
    targets,  # [PEERS], the addresses of all ranks' buffers
    row_words,
    plane_words,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Send a part of x to every peer as soon as it is there. The `all_reduce_kernel` that follows has SENT set."""
    if WIDE:
        words = value.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(value, [value.shape[0], value.shape[1] // 2, 2]))
        words = _pack(low, high, WIDE)
        columns = columns // 2
    col = block * words.shape[1] + tl.arange(0, words.shape[1])
    peer = tl.arange(0, targets.shape[0])
    mask = ((m < rows)[:, None] & (col < columns)[None, :])[:, :, None] & ((peer < WORLD) & (peer != RANK))
    slot = ((epochs & 1) * WORLD + RANK) * plane_words.to(tl.int64) + m.to(tl.int64) * row_words
    pointers = targets.to(tl.pointer_type(tl.int32)) + (slot[:, None] + col[None, :])[:, :, None]
    tl.store(pointers, tl.broadcast_to(_sendable(words)[:, :, None], pointers.shape), mask=mask)


@triton.jit
def _receive(pointer, mask, failed, error_ptr, MAX_POLLS: tl.constexpr):
    """Read words until none is empty, then empty their slots for the call after the next.

    failed: whether a wait has run out before, so that this one need not. Returns the words, and whether one has by now.
    """
    limit = tl.where(failed, 0, MAX_POLLS)
    word = tl.load(pointer, mask=mask, other=0, volatile=True)
    late = tl.sum((word == _EMPTY).to(tl.int32), 0)
    polls = 0
    while (late > 0) & (polls < limit):
        word = tl.load(pointer, mask=mask, other=0, volatile=True)
        late = tl.sum((word == _EMPTY).to(tl.int32), 0)
        polls += 1
    if late > 0:
        tl.store(error_ptr, 1)
    tl.store(pointer, tl.full(word.shape, _EMPTY, tl.int32), mask=mask)
    return word, failed | (late > 0)


@triton.jit
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
    split_stride,
    residual_stride,
    out_stride,
    row_words,  # of a row's slot
    plane_words,  # of one source's slots
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    FUSED: tl.constexpr,
    SENT: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    MAX_POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row a program: send it, wait for the peers' rows, sum, and where FUSED add to the residual and normalise.

    SENT: the row's words have gone out already (`send_values`)."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < words
    if FUSED:
        weight = tl.load(weight_ptr + col, mask=mask, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs_ptr + row) + 1
    failed = tl.load(error_ptr) != 0
    x_row = x_ptr + row.to(tl.int64) * x_stride + col
    mine = tl.load(x_row, mask=mask, other=0)
    if SPLITS > 1:
        low, high = _unpack(mine, WIDE)
        for split in tl.static_range(1, SPLITS):
            add_low, add_high = _unpack(tl.load(x_row + split * split_stride, mask=mask, other=0), WIDE)
            low += add_low
            high += add_high
        mine = _pack(low, high, WIDE)
    mine = _sendable(mine)

    plane = plane_words.to(tl.int64)
    slot = (epoch & 1) * WORLD * plane + row.to(tl.int64) * row_words + col
    if not SENT:
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                tl.store(_buffer(peers_ptr, peer) + slot + RANK * plane, mine, mask=mask)

    if FUSED:
        old = tl.load(residual_ptr + row.to(tl.int64) * residual_stride + col, mask=mask, other=0)
    own = _buffer(peers_ptr, RANK)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            word = mine
        else:
            word, failed = _receive(own + slot + peer * plane, mask, failed, error_ptr, MAX_POLLS)
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


@triton.jit(do_not_specialize=["rows", "first_epoch"])
def winner_kernel(
    scores_ptr,
    ids_ptr,
    out_ptr,
    peers_ptr,
    epochs_ptr,
    error_ptr,
    rows,
    first_epoch,  # place of this kernel's counters behind those of the rows
    first_word,  # and of its slots behind theirs
    plane_words,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    MAX_POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (score, id) a row; BLOCK rows of two words fill a slot of its own. (inf, -1) once a wait has run out."""
    counter = epochs_ptr + first_epoch + tl.program_id(0)
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + index
    mask = row < rows
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(counter) + 1
    failed = tl.load(error_ptr) != 0
    score = tl.load(scores_ptr + row, mask=mask, other=float("-inf"))
    token = tl.load(ids_ptr + row, mask=mask, other=0).to(tl.int32)
    # What compares alike everywhere: no NaN, and, since ranks compare what they send, no -0.
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(failed, float("inf"), score)
    token = tl.where(failed, -1, token)
    bits = _sendable(score.to(tl.int32, bitcast=True))
    plane = plane_words.to(tl.int64)
    slot = (epoch & 1) * WORLD * plane + first_word + tl.program_id(0) * 2 * BLOCK + index
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            target = _buffer(peers_ptr, peer) + slot + RANK * plane
            tl.store(target, bits, mask=mask)
            tl.store(target + BLOCK, token, mask=mask)
    own = _buffer(peers_ptr, RANK)
    best = bits.to(tl.float32, bitcast=True)
    winner = token
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            source = own + slot + peer * plane
            other_bits, failed = _receive(source, mask, failed, error_ptr, MAX_POLLS)
            other_token, failed = _receive(source + BLOCK, mask, failed, error_ptr, MAX_POLLS)
            other = other_bits.to(tl.float32, bitcast=True)
            better = (other > best) | ((other == best) & (other_token < winner))
            best = tl.where(better, other, best)
            winner = tl.where(better, other_token, winner)
    tl.store(out_ptr + row, tl.where(failed, -1, winner).to(tl.int64), mask=mask)
    tl.store(counter, epoch)
