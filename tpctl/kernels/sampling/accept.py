"""Which drafts of a step hold, found where the next ones are made: on the device, before the host has seen a token.

The host sends int32 numbers of each sequence, of which it knows all but how many of its drafts will hold. What a
predictor is then to compute for draft 1, 2, ... are rows as ``prepare_decode`` takes them: of draft n the position n
behind that of the last token that came, which fits its noise and is where its pass leaves keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BEFORE = 4
"""Numbers of a sequence before its drafts."""


@triton.jit(do_not_specialize=["sequences"])
def _accept_kernel(packed_ptr, sampled_ptr, rows_ptr, next_ptr, sequences, DRAFTS: tl.constexpr, COUNT: tl.constexpr):
    sequence = tl.program_id(0)
    slot = tl.load(packed_ptr + sequence)
    position = tl.load(packed_ptr + sequences + sequence)
    first = tl.load(packed_ptr + 2 * sequences + sequence)
    limit = tl.load(packed_ptr + 3 * sequences + sequence)
    held = first * 0
    holds = slot >= 0
    for place in tl.static_range(DRAFTS):
        draft = tl.load(packed_ptr + (4 + place) * sequences + sequence)
        holds = holds & (draft >= 0)
        came = tl.load(sampled_ptr + first + place, mask=holds, other=-1)
        holds = holds & (came == draft)
        held += holds.to(tl.int32)
    tl.store(rows_ptr + sequence, (first + held).to(tl.int64))
    for place in tl.static_range(COUNT):
        at = position + held + place + 1
        row = next_ptr + place * 3 * sequences + sequence
        tl.store(row, tl.where(at < limit, slot, -1))
        tl.store(row + sequences, at)
        tl.store(row + 2 * sequences, 0)


def accept(packed: torch.Tensor, sampled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of the last token of each sequence that came, and where its next ``count`` drafts go.

    Args:
        packed: int32 [4 + D, S]: of each sequence its slot (-1: padding), the position and the row of the first token
            that is sampled from, where what is kept of it ends, and its D drafts (-1 behind the last). What lies beyond
            that end is padding, which keeps nothing and whose draft is the likeliest token.
        sampled: int64, the tokens that the rows have sampled.

    Returns:
        int64 [S], of rows; and int32 [count, 3, S], as ``DecodeInputs.packed``, with no tokens.
    """
    sequences = packed.shape[1]
    rows = torch.empty(sequences, dtype=torch.int64, device=packed.device)
    following = torch.empty(count, 3, sequences, dtype=torch.int32, device=packed.device)
    _accept_kernel[(sequences,)](
        packed, sampled, rows, following, sequences, DRAFTS=packed.shape[0] - BEFORE, COUNT=count, num_warps=1
    )
    return rows, following


def accept_reference(packed: torch.Tensor, sampled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, sequence by sequence on the host."""
    rows, following = [], torch.zeros(count, 3, packed.shape[1], dtype=torch.int32, device=packed.device)
    for number, (slot, position, first, limit, *drafts) in enumerate(packed.t().tolist()):
        held = 0
        while slot >= 0 and held < len(drafts) and drafts[held] >= 0 and int(sampled[first + held]) == drafts[held]:
            held += 1
        rows.append(first + held)
        for place in range(count):
            at = position + held + place + 1
            following[place, :2, number] = torch.tensor([slot if at < limit else -1, at])
    return torch.tensor(rows, device=packed.device), following
