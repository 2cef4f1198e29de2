"""Calls of tools as they are told: whole, and in pieces."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any, NamedTuple

_LETTERS = string.ascii_letters + string.digits


class CallPiece(NamedTuple):
    """What an answer says of one call.

    Attributes:
        at: which of the answer's calls, from 0.
        id, name: with the first piece; later ``None``.
        arguments: the next characters of the JSON object that the arguments are.
        taken_back: it turned out to be none; its text follows as text.
        cut: the answer ended in the midst of it, for it may have no more tokens; it stays as far as it was told.
    """

    at: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    taken_back: bool = False
    cut: bool = False


@dataclass
class ToolCall:
    """A call; ``arguments`` is the text of a JSON object, or, of a call that is not ``whole``, its beginning."""

    id: str
    name: str
    arguments: str
    whole: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's interface has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def new_id(short: bool = False) -> str:
    """A name for a call; ``short``: of nine letters and digits, as Mistral's templates insist on."""
    if short:
        return "".join(secrets.choice(_LETTERS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """Calls put together of the pieces that they are told in."""

    def __init__(self) -> None:
        self._found: dict[int, ToolCall] = {}

    def push(self, piece: CallPiece) -> None:
        if piece.taken_back:
            del self._found[piece.at]
        elif piece.cut:
            self._found[piece.at].whole = False
        elif piece.id is not None and piece.name is not None:
            self._found[piece.at] = ToolCall(piece.id, piece.name, piece.arguments)
        else:
            self._found[piece.at].arguments += piece.arguments

    def at(self, place: int) -> ToolCall | None:
        """One of them; ``None``: it was taken back, or there is none."""
        return self._found.get(place)

    def all(self) -> list[ToolCall]:
        return list(self._found.values())
