"""Markdown on a terminal while it is being written.

Of a text that grows at its end, all blocks but the last are final: they are printed once and belong to the terminal,
which scrolls them. Only the last, open block is painted again as it grows; of one that is taller than the screen, its
end. An item of a list counts as a block, and so does a line of code, so that what is open is mostly small.

    printed │ # Title
            │  1 first item
    ────────┼────────────────────────  self._text begins here
    painted │  2 second item, half wri
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from markdown_it.token import Token
from rich.console import Console
from rich.text import Text

from tpctl.chat.markdown import FENCE_STYLE, ChatMarkdown, fence_line, highlighted, parse
from tpctl.chat.painter import Painter

_MOST_CODE = 80
"""Lines of an open block of code that are looked at to colour the next one; beyond, the older half is let go."""

_BLANK_END = re.compile(r"(?:\s|\x1b\[[0-9;]*m)*$")


class MarkdownStream:
    """Shows one answer.

    Args:
        console: a terminal.
        interval: seconds between two paintings at least; what comes faster is shown together.
    """

    def __init__(
        self, console: Console, *, interval: float = 0.04, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._painter = Painter(console)
        self._interval = interval
        self._clock = clock
        self._painted_at = -interval
        self._text = ""  # from where the open block begins
        self._final: list[str] = []  # rows to be printed with the next painting
        self._code: _OpenCode | None = None  # the open block, if it is one of code
        self._after = ""  # what was printed last: "item" of a list that is still open, another "block", or nothing

    def push(self, piece: str) -> None:
        """Add text to the end."""
        self._text += piece
        if "\n" in piece:
            self._settle()
        now = self._clock()
        if now - self._painted_at >= self._interval:
            self._painted_at = now
            self._paint(self._open_rows())

    def close(self) -> None:
        """The text is complete: print what was open."""
        if self._text and not self._text.endswith("\n"):
            self._text += "\n"
        self._settle()
        self._final += self._open_rows()
        if self._code is not None:
            self._final += self._rows(Text(fence_line(), style=FENCE_STYLE))
        self._text, self._code = "", None
        self._paint([])

    def _paint(self, open_rows: list[str]) -> None:
        final, self._final = self._final, []
        self._painter.paint(final, open_rows)

    def _settle(self) -> None:
        """Print the blocks that more text cannot change. Half a line may still become anything, so it is left alone."""
        while self._code is not None or self._settle_blocks():
            if self._code is not None and not self._settle_code(self._code):
                break

    def _settle_blocks(self) -> bool:
        """Whether the open block turned out to be one of code."""
        whole = self._text.rfind("\n") + 1
        blocks = _blocks(parse(self._text[:whole]))
        if not blocks:
            return False
        *ended, last = blocks
        for block in ended:
            self._print(block)
            self._after = "block"
        items = _items(last)
        for item in items[:-1]:
            self._print(item)
            self._after = "item"
        start = _lines(items[-1] if items else last)[0]
        self._text = _from_line(self._text, start)
        if last[0].type != "fence":
            return False
        first, _, self._text = self._text.partition("\n")
        self._code = _OpenCode(last[0], len(first) - len(first.lstrip(" ")))
        self._final += [*self._gap("block"), *self._rows(Text(fence_line(self._code.lexer), style=FENCE_STYLE))]
        self._after = "block"
        return True

    def _settle_code(self, code: _OpenCode) -> bool:
        """Print the new lines of an open block of code; whether it ended."""
        *lines, rest = self._text.split("\n")
        new = 0
        for number, line in enumerate(lines, 1):
            if code.is_ended_by(line):
                self._final += [*self._code_rows(code, new), *self._rows(Text(fence_line(), style=FENCE_STYLE))]
                self._text, self._code = "\n".join([*lines[number:], rest]), None
                return True
            code.lines.append(code.unindented(line))
            new += 1
        self._final += self._code_rows(code, new)
        if len(code.lines) > _MOST_CODE:
            del code.lines[: -_MOST_CODE // 2]
        self._text = rest
        return False

    def _code_rows(self, code: _OpenCode, count: int) -> list[str]:
        """The last ``count`` lines."""
        if not count:
            return []
        lines = highlighted("\n".join(code.lines), code.lexer, self._painter.width, count)
        return [row for line in lines for row in self._rows(line)]

    def _open_rows(self) -> list[str]:
        """The open block as it looks now."""
        if self._code is not None:
            if not self._text:
                return []
            code = self._code
            lines = [*code.lines, code.unindented(self._text)]
            return self._code_rows(_OpenCode(code.token, code.indent, lines), 1)
        rows: list[str] = []
        before = self._after
        for block in _blocks(parse(self._text)):
            rows += self._gap(_kind(block), before) + self._block_rows(block)
            before = "block"
        return rows

    def _print(self, block: list[Token]) -> None:
        self._final += self._gap(_kind(block)) + self._block_rows(block)

    def _gap(self, kind: str, before: str | None = None) -> list[str]:
        """The blank row between two blocks; there is none between the items of a list."""
        before = self._after if before is None else before
        return [""] if before == "block" or (before == "item" and kind != "list") else []

    def _block_rows(self, block: list[Token]) -> list[str]:
        rows = self._rows(ChatMarkdown(block))
        shown = [number for number, row in enumerate(rows) if row]
        return rows[shown[0] : shown[-1] + 1] if shown else []

    def _rows(self, what: ChatMarkdown | Text) -> list[str]:
        with self._console.capture() as captured:
            self._console.print(what, width=self._painter.width, end="\n")
        return [_trimmed(row) for row in captured.get().removesuffix("\n").split("\n")]


@dataclass
class _OpenCode:
    """A block of code without its closing fence: the fence that opened it, how far that was indented, and the lines."""

    token: Token
    indent: int
    lines: list[str] = field(default_factory=list)

    @property
    def lexer(self) -> str:
        return self.token.info.strip().partition(" ")[0] or "text"

    def is_ended_by(self, line: str) -> bool:
        mark = self.token.markup
        bare = line.strip()
        return len(line) - len(line.lstrip(" ")) <= 3 and bare.startswith(mark) and not bare.strip(mark[0])

    def unindented(self, line: str) -> str:
        return line[min(self.indent, len(line) - len(line.lstrip(" "))) :]


def _blocks(tokens: list[Token]) -> list[list[Token]]:
    """The outermost blocks, each with all of its tokens."""
    blocks: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks


def _items(block: list[Token]) -> list[list[Token]]:
    """A list's items, each as a list of its own; nothing if the block is no list."""
    opening, closing = block[0], block[-1]
    if _kind(block) != "list":
        return []
    items: list[list[Token]] = []
    number = int(opening.attrs.get("start", 1))
    for token in block[1:-1]:
        if token.level == 1 and token.nesting > 0:
            attrs = {"start": number + len(items)} if opening.type == "ordered_list_open" else {}
            items.append([opening.copy(attrs=attrs, map=token.map)])
        items[-1].append(token)
    return [[*item, closing] for item in items]


def _kind(block: list[Token]) -> str:
    return "list" if block[0].type in ("bullet_list_open", "ordered_list_open") else "block"


def _lines(block: list[Token]) -> tuple[int, int]:
    """The lines that a block is made of: the first, and the one behind its last."""
    first, last = block[0].map or (0, 0)
    return first, last


def _from_line(text: str, number: int) -> str:
    """``text`` without its first ``number`` lines."""
    return text.split("\n", number)[number]


def _trimmed(row: str) -> str:
    """Without spaces at the end, which a narrower window would wrap."""
    end = _BLANK_END.search(row)
    assert end is not None
    return f"{row[: end.start()]}\x1b[0m" if "\x1b" in row[: end.start()] else row[: end.start()]
