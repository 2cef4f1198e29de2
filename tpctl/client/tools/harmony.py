"""gpt-oss: a call is a message to somebody, on the channel for commentary (harmony).

<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

Source: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tpctl.client.reasoning import Form, Harmony
from tpctl.client.tools.calls import CallPiece
from tpctl.client.tools.json_call import read_arguments
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Enough, Reader, Reading, Symbols
from tpctl.client.tools.reading import reading
from tpctl.errors import RequestError


@dataclass(frozen=True)
class HarmonyCalls:
    """What stands in such a message is read here; the messages are told apart in ``client.reasoning_stream``."""

    name = "harmony"
    marks: tuple[str, ...] = ()
    opens = ()
    bare = ""
    short_ids = False

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        """Read the body of a message to ``functions.NAME``; ``opened`` is the name."""
        reader.begin(opened)
        yield from read_arguments(reader)
        reader.end()

    def grammar(self, lark: Lark, *, single: bool) -> str:
        """One call, behind which an answer always ends: a token that ends it says so."""
        head, constrain, body = "<|channel|>", "<|constrain|>", lark.mark("<|message|>")
        bodies = (
            f"{lark.text(f'commentary to=functions.{name} ')} {lark.mark(constrain)} {lark.text('json')} {body} {rule}"
            for name, rule in lark.arguments()
        )
        return f"{lark.mark(head)} {lark.one_of(bodies)}"


class CallMessages:
    """The messages to tools of one answer, one after the other."""

    def __init__(self, names: Mapping[str, Any], *, single: bool = False) -> None:
        self._reader = Reader(Symbols((), {}), names, single=single)
        self._run: Reading[None] | None = None

    @property
    def over(self) -> bool:
        """Whether there is a call, and there may be one only."""
        return self._reader.single and self._reader.count > 0

    def begin(self, header: str) -> bool:
        """Whether the message with this header is a call; what is read from then on is it."""
        to = next((word[3:] for word in header.split() if word.startswith("to=")), "")
        kind, _, name = to.partition(".")
        if kind != "functions" or name not in self._reader.names or self.over:
            return False
        self._reader.text = ""
        self._reader.ended = False
        self._reader.begin_with(header + "\n")
        self._run = reading(self._reader, HarmonyCalls(), name)
        return True

    def push(self, text: str) -> list[str | CallPiece]:
        return self._advance(text)

    def cut(self) -> None:
        """The message ends here for the answer may have no more tokens; ``end`` is next."""
        self._reader.cut = True

    def end(self) -> list[str | CallPiece]:
        """The message has ended."""
        self._reader.ended = True
        found = self._advance("")
        self._run = None
        rest, self._reader.text = self._reader.text, ""
        return [*found, rest] if rest.strip() and not self.over else found

    def _advance(self, text: str) -> list[str | CallPiece]:
        self._reader.text += text
        if self._run is not None:
            with suppress(Enough):
                next(self._run, None)
        pieces, self._reader.pieces = self._reader.pieces, []
        return pieces


def messages(lark: Lark, call: str | None, form: Form | None, said: str | None, *, must: bool = False) -> str:
    """An answer and what is thought before it.

    Args:
        call: what a message may be that is one; ``None``: none may be.
        said: what the message must be that is none; ``None``: any text.
        must: it is a call.
    """
    if not isinstance(form, Harmony):
        raise RequestError("the tokenizer has not the marks of messages (harmony)")
    channel, body = lark.mark("<|channel|>"), lark.mark("<|message|>")
    again = f'{lark.mark("<|end|>")} {lark.mark("<|start|>")} "assistant"'
    text = lark.anything()
    thought = f'({channel} "analysis" {body} {text} {again})?'
    if must:
        return f"{thought} {call}"
    final = f'{channel} "final" {body} {said or text}'
    if call is None:
        return f"{thought} {final}"
    preamble = f'({channel} "commentary" {body} {text} {again})?'
    return f"{thought} ({preamble} {call} | {final})"
