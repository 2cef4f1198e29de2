"""Calls found in an answer's text as it comes, by the form that its family writes them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.client.tools.calls import CallPiece
from tpctl.client.tools.forms import ToolForm
from tpctl.client.tools.reader import Enough, Malformed, Reader, Reading, Symbols

Told = list[str | CallPiece]


class CallParser:
    """Tells calls from text. What is no whole call stays text, in its place."""

    def __init__(self, form: ToolForm, symbols: Symbols, names: Mapping[str, Any], *, single: bool = False) -> None:
        """Begin an answer.

        Args:
            symbols: of the form's marks.
            names: of the tools, with the JSON schemas of their arguments.
            single: the first call ends the answer.
        """
        self._reader = Reader(symbols, names, short_ids=form.short_ids, single=single)
        self._run = _answer(self._reader, form)

    @property
    def over(self) -> bool:
        """Whether there is a call, and there may be one only."""
        return self._reader.single and self._reader.count > 0

    def push(self, text: str) -> Told:
        """What text, in which single tokens' marks are symbols, adds."""
        self._reader.text += text
        next(self._run, None)
        return self._taken()

    def cut(self) -> None:
        """The answer ends here for it may have no more tokens; ``finish`` is next."""
        self._reader.cut = True

    def finish(self) -> Told:
        """What was held back."""
        self._reader.ended = True
        next(self._run, None)
        return self._taken()

    def _taken(self) -> Told:
        pieces, self._reader.pieces = self._reader.pieces, []
        return pieces


def _answer(reader: Reader, form: ToolForm) -> Reading[None]:
    try:
        if form.bare:
            while not reader.text.strip() and not reader.ended:
                yield
            if reader.text.lstrip().startswith(form.bare):
                yield from reading(reader, form, "")
        while True:
            opened = yield from reader.say_until(form.opens)
            yield from reading(reader, form, opened)
    except Enough:
        return


def reading(reader: Reader, form: ToolForm, opened: str) -> Reading[None]:
    """Read calls; what was begun and is none becomes text. Raises ``Enough``."""
    try:
        yield from form.calls(reader, opened)
    except Malformed:
        reader.give_up()
