"""JSON values in text: where one ends that comes in pieces, and how one is written."""

from __future__ import annotations

import json
import re
from typing import Any

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = " \t\n\r"
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def encoded(value: Any, **options: Any) -> str:
    """A value as JSON that UTF-8 can be made of: half a surrogate pair, which a model may write, stays an escape.

    ``options``: of ``json.dumps``.
    """
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


class JsonValue:
    """Reads one value by JSON's grammar (RFC 8259), without making it.

    Attributes:
        done: whether it has ended; a number by itself ends with what follows it.
        failed: whether what came is the beginning of none.
    """

    def __init__(self) -> None:
        self._open: list[str] = []  # brackets
        self._state = "value"
        self._word = ""
        self._hex = 0
        self.done = False
        self.failed = False

    def push(self, text: str) -> int:
        """Take in text; how much of its beginning belongs to the value."""
        at = 0
        while at < len(text) and not self.done and not self.failed:
            at = self._step(text, at)
        return at

    def _step(self, text: str, at: int) -> int:
        char = text[at]
        match self._state:
            case "string" | "key string":
                if found := _PLAIN.match(text, at):
                    return found.end()
                if char == "\\":
                    self._state = self._state.replace("string", "escape")
                elif char == '"':
                    self._ended() if self._state == "string" else self._go("colon")
                else:
                    self.failed = True
            case "escape" | "key escape":
                self._hex = 4 if char == "u" else 0
                self.failed = char not in '"\\/bfnrtu'
                self._state = self._state.replace("escape", "hex" if self._hex else "string")
            case "hex" | "key hex":
                self._hex -= 1
                self.failed = char not in _HEX
                if not self._hex:
                    self._state = self._state.replace("hex", "string")
            case "word":
                if found := _WORD.match(text, at):
                    self._word += found[0]
                    return found.end()
                self.failed = not _SCALAR.fullmatch(self._word)
                self._ended()
                return at
            case _ if char in _SPACE:
                pass
            case state:
                self._structure(state, char)
        return at if self.failed else at + 1

    def _structure(self, state: str, char: str) -> None:
        """A character outside of strings and words, no white space."""
        if (state == "first value" and char == "]") or (state == "first key" and char == "}"):
            self._close()
        elif state in ("value", "first value"):
            self._begin(char)
        elif state in ("key", "first key") and char == '"':
            self._go("key string")
        elif state == "colon" and char == ":":
            self._go("value")
        elif state == "after" and char == ",":
            self._go("key" if self._open[-1] == "{" else "value")
        elif state == "after" and char == {"{": "}", "[": "]"}[self._open[-1]]:
            self._close()
        else:
            self.failed = True

    def _begin(self, char: str) -> None:
        if char in "{[":
            self._open.append(char)
            self._go("first key" if char == "{" else "first value")
        elif char == '"':
            self._go("string")
        elif char in "-0123456789tfn":
            self._word = char
            self._go("word")
        else:
            self.failed = True

    def _close(self) -> None:
        self._open.pop()
        self._ended()

    def _ended(self) -> None:
        self.done = not self._open
        self._go("after")

    def _go(self, state: str) -> None:
        self._state = state
