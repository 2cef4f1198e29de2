"""An answer's text as the parsers of calls read it: as it comes, each a generator that yields where it needs more.

Marks that are single tokens stand in the text as one character each, half a surrogate pair, which no decoded text has:
so what merely looks like a mark is not taken for one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from tpctl.client.overlap import overlap
from tpctl.client.tools.calls import CallPiece, new_id
from tpctl.client.tools.json_value import JsonValue

T = TypeVar("T")
Reading = Generator[None, None, T]

_SYMBOLS = 0xD800
_ENDS_NAME = re.compile(r"[\s<>{}()\"'\ud800-\udfff]")


class Malformed(Exception):
    """What was read is no call."""


class Enough(Exception):
    """There is a call, and there may be one only."""


class Symbols:
    """The marks of a form, of which some are single tokens.

    Attributes:
        by_id: the character that stands for a token.
        of: the character or text that stands for a mark.
    """

    def __init__(self, marks: Sequence[str], added: Mapping[str, int]) -> None:
        """``added``: ids of the tokens that the tokenizer adds, by their text."""
        single = [mark for mark in dict.fromkeys(marks) if mark in added]
        self.of = {mark: mark for mark in marks} | {mark: chr(_SYMBOLS + at) for at, mark in enumerate(single)}
        self.by_id = {added[mark]: self.of[mark] for mark in single}
        self._texts = {ord(self.of[mark]): mark for mark in single}

    def plain(self, text: str) -> str:
        """Text with the marks as they are written."""
        return text.translate(self._texts) if self._texts else text


class Reader:
    """Text as it comes, and what parsers make of it.

    Attributes:
        ended: no more text will come; ``cut``: for the answer may have no more tokens.
        single: the first whole call ends all reading.
        count: calls that are whole.
        pieces: what is to be told, taken out by whoever reads.
    """

    def __init__(
        self, symbols: Symbols, names: Mapping[str, Any], *, short_ids: bool = False, single: bool = False
    ) -> None:
        """``names``: of the tools, with the JSON schemas of their arguments."""
        self._symbols = symbols
        self.names = names
        self._short_ids = short_ids
        self.single = single
        self.text = ""  # that is not read yet
        self._taken: list[str] = []  # since the last whole call, or the mark that opened one
        self._begun = False
        self.ended = self.cut = False
        self.count = 0
        self._at = 0  # a call's place; one that was told and taken back keeps its own
        self.pieces: list[str | CallPiece] = []

    def more(self) -> Reading[None]:
        """Wait for text. Raises ``Malformed`` if none comes any more."""
        before = len(self.text)
        while len(self.text) == before:
            if self.ended:
                raise Malformed
            yield

    def drop(self, count: int) -> str:
        """Take characters."""
        text, self.text = self.text[:count], self.text[count:]
        self._taken.append(text)
        return text

    def space(self) -> Reading[None]:
        """Pass over white space."""
        while not (bare := self.text.lstrip()):
            self.drop(len(self.text))
            yield from self.more()
        self.drop(len(self.text) - len(bare))

    def at(self, *marks: str) -> Reading[str | None]:
        """Which mark comes next, if any of them does. It is not taken."""
        known = [(mark, self._symbols.of.get(mark, mark)) for mark in marks]
        while True:
            for mark, text in known:
                if self.text.startswith(text):
                    return mark
            if self.ended or not any(text.startswith(self.text) for _, text in known):
                return None
            yield from self.more_or_end()

    def more_or_end(self) -> Reading[None]:
        """Wait for text, or until it is known that none comes."""
        before = len(self.text)
        while len(self.text) == before and not self.ended:
            yield

    def passed(self, *marks: str) -> Reading[str | None]:
        """Take white space and one of the marks, if one follows; which. The end of the answer is none."""
        while not self.text.lstrip() and not self.ended:
            yield from self.more_or_end()
        self.drop(len(self.text) - len(self.text.lstrip()))
        found = yield from self.at(*marks)
        if found is not None:
            self.drop(len(self._symbols.of.get(found, found)))
        elif self.cut and any(self._symbols.of.get(mark, mark).startswith(self.text) for mark in marks):
            self.drop(len(self.text))  # one of them, but for its end
        return found

    def take(self, *marks: str) -> Reading[str]:
        """As ``passed``. Raises ``Malformed`` if none of them follows."""
        found = yield from self.passed(*marks)
        if found is None:
            raise Malformed
        return found

    def until(
        self, mark: str, tell: Callable[[str], object], *, trim: bool = False, check: bool = False
    ) -> Reading[None]:
        """Take text up to and with a mark, telling it as it comes.

        Args:
            trim: leave out a line break at each end.
            check: the text is a name: what cannot be in one makes it ``Malformed``.
        """
        end = self._symbols.of.get(mark, mark)
        begun = not trim
        while True:
            at = self.text.find(end)
            safe = at if at >= 0 else len(self.text) - overlap(self.text, end)
            if at < 0 and trim and self.text[:safe].endswith("\n"):
                safe -= 1
            if not begun and (safe > 0 or at >= 0):
                begun = True
                if self.text.startswith("\n") and at != 0:
                    self.drop(1)
                    continue
            text = self.text[:safe]
            if check and _ENDS_NAME.search(text):
                raise Malformed
            if at >= 0:
                self.drop(safe + len(end))
                tell(self._symbols.plain(text[:-1] if trim and text.endswith("\n") else text))
                return
            if text:
                tell(self._symbols.plain(self.drop(safe)))
            yield from self.more()

    def name(self, end: str) -> Reading[str]:
        """A name up to and with a mark."""
        found: list[str] = []
        yield from self.until(end, found.append, check=True)
        return "".join(found)

    def all_until(self, end: str, *, trim: bool = False) -> Reading[str]:
        """Text up to and with a mark."""
        found: list[str] = []
        yield from self.until(end, found.append, trim=trim)
        return "".join(found)

    def json(self, tell: Callable[[str], object]) -> Reading[None]:
        """Take a JSON value, telling its text as it comes. Raises ``Malformed``."""
        value = JsonValue()
        while True:
            count = value.push(self.text)
            if value.failed:
                raise Malformed
            if count:
                tell(self._symbols.plain(self.drop(count)))
            if value.done:
                return
            yield from self.more()

    def value(self) -> Reading[Any]:
        """A JSON value. Raises ``Malformed``."""
        found: list[str] = []
        yield from self.json(found.append)
        return decoded("".join(found))

    def begin(self, name: str, id: str | None = None) -> None:
        """A call of a tool begins. Raises ``Malformed`` if nobody offered that tool."""
        if name not in self.names:
            raise Malformed
        self._begun = True
        self.pieces.append(CallPiece(self._at, id or new_id(self._short_ids), name))

    def argue(self, text: str) -> None:
        """The next characters of a call's arguments."""
        if text:
            self.pieces.append(CallPiece(self._at, arguments=text))

    def end(self) -> None:
        """The call is whole. Raises ``Enough``."""
        self.count += 1
        self._at += 1
        self._begun = False
        self._taken.clear()
        if self.single:
            raise Enough

    def begin_with(self, text: str) -> None:
        """Text that is a call's if there is one, and text if there is none."""
        self._taken[:] = [text]

    def give_up(self) -> None:
        """What was taken since the last whole call is text; but not of one that was told and is cut off."""
        if self._begun and self.ended and self.cut:
            self.pieces.append(CallPiece(self._at, cut=True))
            self._begun, self.text = False, ""
            self._taken.clear()
            return
        text = self._symbols.plain("".join(self._taken))
        if self._begun:
            self.pieces.append(CallPiece(self._at, taken_back=True))
            self._at += 1
            self._begun = False
        if text.strip() or not self.count:
            self.say(text)
        self._taken.clear()

    def say(self, text: str) -> None:
        """Text that is no part of a call."""
        if text:
            self.pieces.append(self._symbols.plain(text))

    def say_until(self, marks: Sequence[str]) -> Reading[str]:
        """Say text up to a mark; which it is. White space before it is left out, and after a call.

        What may begin a mark, and white space that may stand before one, is held back.
        """
        known = [(mark, self._symbols.of.get(mark, mark)) for mark in marks]
        self.begin_with("")
        fresh = self.count > 0
        while True:
            found = [(at, mark) for mark, text in known if (at := self.text.find(text)) >= 0]
            at, mark = min(found, default=(-1, ""))
            if not mark:
                at = len(self.text) - max((overlap(self.text, text) for _, text in known), default=0)
            text = self.text[:at].lstrip() if fresh else self.text[:at]
            shown = text.rstrip()
            if shown:
                fresh = False
                self.say(shown)
            if mark:
                self._taken.append(text[len(shown) :])
                self.text = self.text[at:]
                self.drop(len(self._symbols.of.get(mark, mark)))
                return mark
            self.text = text[len(shown) :] + self.text[at:]
            if self.ended:
                self.say("" if fresh else self.text)
                self.text = ""
            yield


def decoded(text: str) -> Any:
    """A JSON text's value. Raises ``Malformed``."""
    try:
        return finite_json(text)
    except (ValueError, RecursionError):
        raise Malformed from None


def finite_json(text: str) -> Any:
    """A JSON text's value, in which no number is beyond every float: of it no JSON could be made again.

    Raises:
        ValueError: one is, or it is no JSON, of which Python's NaN and Infinity are no part either.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value
