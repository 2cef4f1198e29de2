"""A model's Markdown for a terminal: rich's rendering, with nothing that the model wrote left out.

rich drops HTML (so ``<think>``), reference definitions and the addresses of images, and joins lines that the model kept
apart (a poem's). Here HTML and definitions are text, addresses are shown, and a line stays a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement, Paragraph
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from tpctl.chat.wrap import break_points

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
_THEME = "ansi_dark"  # the terminal's own colours, on its own background
FENCE_STYLE = "dim"


def parse(text: str) -> list[Token]:
    return _PARSER.parse(text)


class _Paragraph(Paragraph):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.split("\n", allow_blank=True):
            line.expand_tabs(4)
            for part in line.divide(break_points(line.plain, options.max_width)):
                part.rstrip()
                yield part


class _Heading(Heading):
    """Left-aligned, with the level's marks kept: a terminal has one size of letters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text("#" * int(self.tag[1:]) + " ", style="bold")
        text.append_text(self.text)
        text.stylize("bold")
        for part in text.divide(break_points(text.plain, options.max_width)):
            part.rstrip()
            yield part


class _CodeBlock(CodeBlock):
    """Between its fences, flush left, so that it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip("\n")
        yield Text(fence_line(self.lexer_name), style=FENCE_STYLE)
        yield from highlighted(code, self.lexer_name, options.max_width)
        yield Text(fence_line(), style=FENCE_STYLE)


class _Rule(MarkdownElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment("─" * options.max_width)
        yield Segment.line()


class ChatMarkdown(Markdown):
    """Blocks that ``parse`` gave."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "hr": _Rule,
    }

    def __init__(self, tokens: Sequence[Token]) -> None:
        # Links are written out: what a link of the terminal's own leads to cannot be seen.
        super().__init__("", code_theme=_THEME, hyperlinks=False)
        self.parsed = [_kept(token) for token in tokens]


def fence_line(lexer: str = "text") -> str:
    return "```" + ("" if lexer == "text" else lexer)


def highlighted(code: str, lexer: str, width: int, last: int = 0) -> list[Text]:
    """The lines of ``code`` in colour, in the parts that ``width`` makes of them; the ``last`` lines, or (0) all."""
    text = Syntax("", lexer, theme=_THEME, background_color="default").highlight(code)
    rows: list[Text] = []
    for line in text.split("\n", allow_blank=True)[: code.count("\n") + 1][-last:]:
        line.expand_tabs(4)
        rows += line.divide(break_points(line.plain, width))
    return rows


def _kept(token: Token) -> Token:
    """The token with the children that rich would leave out, or join, as text."""
    if token.type != "inline" or not token.children:
        return token
    return token.copy(children=[_kept_inline(child) for child in token.children])


def _kept_inline(token: Token) -> Token:
    if token.type == "softbreak":
        return token.copy(type="hardbreak")
    if token.type == "image":
        return Token("text", "", 0, content=f"{token.content} ({token.attrs.get('src', '')})")
    return token
