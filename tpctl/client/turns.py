"""In what order an answer says things: texts, thoughts and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tpctl.client.tools.calls import Calls, ToolCall


@dataclass
class Turn:
    """What was told in one go.

    Attributes:
        kind: "message", "reasoning" or "function_call".
        first: of the pieces of all texts, or of all thoughts, or which call it is.
        said: how many of a stream's ``said`` there were when it ended; ``None``: it has not.
    """

    kind: str
    first: int
    said: int | None = None


class Part(NamedTuple):
    """A turn with its ``text``, or the ``call`` that it is; ``said`` as a turn's."""

    kind: str
    text: str
    said: int | None
    call: ToolCall | None = None


def parts(turns: Sequence[Turn], calls: Calls, texts: Sequence[str], thoughts: Sequence[str]) -> list[Part]:
    """Turns with what was said in them. Where a call was taken back the text goes on."""
    kept: list[Turn] = []
    for turn in turns:
        if turn.kind == "function_call" and calls.at(turn.first) is None:
            continue
        if kept and turn.kind == kept[-1].kind != "function_call":
            kept[-1] = replace(kept[-1], said=turn.said)
        else:
            kept.append(turn)
    found: list[Part] = []
    ends: dict[str, int | None] = {}  # of each kind's pieces, where those of the turn behind begin
    for turn in reversed(kept):
        if turn.kind == "function_call":
            found.append(Part(turn.kind, "", turn.said, calls.at(turn.first)))
            continue
        pieces = texts if turn.kind == "message" else thoughts
        found.append(Part(turn.kind, "".join(pieces[turn.first : ends.get(turn.kind)]), turn.said))
        ends[turn.kind] = turn.first
    return found[::-1]
