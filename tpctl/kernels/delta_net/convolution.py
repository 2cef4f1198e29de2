"""The convolution before a delta net, of one token: what earlier ones add to it, and its state moved on.

A channel's state are its last inputs, each in the row of its token's place modulo the taps. In a run (``step``) what
came before a row may be of the run's rows, and not in the state yet.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def past(
    taps_ptr,
    inputs_ptr,
    channel,
    inside,
    position,
    read,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """What earlier tokens add to the convolution of some channels, float32; and the tap of the one that comes."""
    tap = tl.load(taps_ptr + (TAPS - 1) * CHANNELS + channel, mask=inside, other=0.0)
    total = tap * 0.0
    for back in tl.static_range(1, TAPS):
        row = (position + (TAPS - back)) % TAPS * CHANNELS
        old = tl.load(inputs_ptr + read * (TAPS * CHANNELS) + row + channel, mask=inside & (read >= 0), other=0.0)
        total += old.to(tl.float32) * tl.load(taps_ptr + (TAPS - 1 - back) * CHANNELS + channel, mask=inside, other=0.0)
    return total, tap


@triton.jit
def keep_input(
    x,
    inputs_ptr,
    channel,
    inside,
    position,
    read,
    write,
    copy,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Move the convolution's state of some channels on by their input ``x``."""
    row = position % TAPS * CHANNELS
    tl.store(inputs_ptr + write * (TAPS * CHANNELS) + row + channel, x, mask=inside)
    if (write != read) | (copy >= 0):  # a slot without those before
        tl.store(inputs_ptr + copy * (TAPS * CHANNELS) + row + channel, x, mask=inside & (copy >= 0))
        for back in tl.static_range(1, TAPS - 1):
            row = (position + (TAPS - back)) % TAPS * CHANNELS
            old = tl.load(inputs_ptr + read * (TAPS * CHANNELS) + row + channel, mask=inside & (read >= 0), other=0.0)
            tl.store(inputs_ptr + write * (TAPS * CHANNELS) + row + channel, old, mask=inside & (write != read))
            tl.store(inputs_ptr + copy * (TAPS * CHANNELS) + row + channel, old, mask=inside & (copy >= 0))


@triton.jit
def _before(
    back: tl.constexpr,
    own_at,
    stride,
    inputs_ptr,
    channel,
    inside,
    position,
    read,
    place,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """What came in so many tokens before the row at this ``place`` of a run: of the run's rows, else in its state."""
    row = (position + (TAPS - back)) % TAPS * CHANNELS
    kept = (read >= 0) & (back > place)
    old = tl.load(inputs_ptr + read * (TAPS * CHANNELS) + row + channel, mask=inside & kept, other=0.0)
    own = tl.load(own_at - back * stride, mask=inside & (back <= place), other=0.0)
    return tl.where(back <= place, own, old)


@triton.jit
def past_in_run(
    taps_ptr,
    own_at,
    stride,
    inputs_ptr,
    channel,
    inside,
    position,
    read,
    place,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """As ``past``, of a row within a run."""
    tap = tl.load(taps_ptr + (TAPS - 1) * CHANNELS + channel, mask=inside, other=0.0)
    total = tap * 0.0
    for back in tl.static_range(1, TAPS):
        old = _before(back, own_at, stride, inputs_ptr, channel, inside, position, read, place, CHANNELS, TAPS)
        total += old.to(tl.float32) * tl.load(taps_ptr + (TAPS - 1 - back) * CHANNELS + channel, mask=inside, other=0.0)
    return total, tap


@triton.jit
def keep_in_run(
    x,
    own_at,
    stride,
    inputs_ptr,
    channel,
    inside,
    position,
    read,
    place,
    write,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """As ``keep_input``, of a row within a run: the convolution's state behind it, whole."""
    row = position % TAPS * CHANNELS
    tl.store(inputs_ptr + write * (TAPS * CHANNELS) + row + channel, x, mask=inside)
    for back in tl.static_range(1, TAPS - 1):
        row = (position + (TAPS - back)) % TAPS * CHANNELS
        old = _before(back, own_at, stride, inputs_ptr, channel, inside, position, read, place, CHANNELS, TAPS)
        tl.store(inputs_ptr + write * (TAPS * CHANNELS) + row + channel, old, mask=inside)
