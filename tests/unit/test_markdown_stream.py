"""What stands on a terminal when Markdown has come in pieces: no more, no less and nothing twice; nothing broken at the
edge. A small terminal of our own says what stands there."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Iterable
from itertools import pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console

from tpctl.chat.markdown_stream import MarkdownStream
from tpctl.chat.streams import PlainStream, console, safe
from tpctl.chat.wrap import break_points


class Terminal(io.StringIO):
    """Rows with a window of ``height`` on the last of them; rows above it cannot be reached any more.

    Attributes:
        touched: rows that were written since it was last emptied.
    """

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows = [""]
        self.row = 0
        self.touched: set[int] = set()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", plain):
            if part == "\n":
                self.row += 1
                if self.row == len(self.rows):
                    self.rows.append("")
                self.column = 0
            elif part == "\r":
                self.column = 0
            elif part.startswith("\x1b["):
                self.control(int(part[2:-1] or 1), part[-1])
            else:
                self.put(part)
        return len(text)

    column = 0

    def control(self, count: int, what: str) -> None:
        if what == "A":
            assert count < self.height, "a row that has left the window"
            self.row -= count
        elif what == "K":
            self.rows[self.row] = self.rows[self.row][: self.column]
        elif what == "J":
            self.rows[self.row :] = [self.rows[self.row][: self.column]]
        else:
            raise AssertionError(f"unexpected control {what}")

    def put(self, text: str) -> None:
        row = self.rows[self.row]
        self.rows[self.row] = row[: self.column] + text + row[self.column + len(text) :]
        self.column += len(text)
        assert cell_len(self.rows[self.row][: self.column]) < self.width, "the last column is left free"
        self.touched.add(self.row)


def shown(pieces: Iterable[str], width: int = 40, height: int = 12) -> list[str]:
    terminal = Terminal(width, height)
    screen = Console(file=terminal, width=width, height=height, force_terminal=True, highlight=False)
    stream = MarkdownStream(screen, interval=0)
    for piece in pieces:
        stream.push(piece)
    stream.close()
    assert terminal.rows.pop() == ""  # the prompt begins a line
    return [row.rstrip() for row in terminal.rows]


DOCUMENT = """# Title of it

Some **bold text**, *it*, `code`, a [link](http://x.y/z), ![img](http://a/b.png) and <think>hm</think>.
A second line
a third, of a poem

1. First item with words that are wrapped at the edge
2. Second **item**
   - nested one

   ```python
   x = 1
   ```
10. ten

| a | b |
|---|--:|
| 中文字 | 3 |

```python
def f(x):
    return x

    # four
```
> quote of
> two lines

---
- bullet
中文段落：答案是四十二。这是一个很长的段落，没有空格，应该在正确的地方换行。

[1]: http://kept

<div>html</div>"""

SHOWN = """# Title of it

Some bold text, it, code, a link
(http://x.y/z), img (http://a/b.png)
and <think>hm</think>.
A second line
a third, of a poem

 1 First item with words that are
   wrapped at the edge
 2 Second item
    • nested one
   ```python
   x = 1
   ```
 10 ten

 a       b
 ─────────
 中文字  3

```python
def f(x):
    return x

    # four
```

▌ quote of
▌ two lines

───────────────────────────────────────

 • bullet
   中文段落：答案是四十二。这是一个很长
   的段落，没有空格，应该在正确的地方换
   行。

[1]: http://kept

<div>html</div>"""


@pytest.mark.parametrize("seed", range(5))
def test_a_document_in_pieces(seed: int) -> None:
    dice = random.Random(seed)
    text, pieces = DOCUMENT, []
    while text:
        size = dice.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    assert shown(pieces) == SHOWN.split("\n")


@pytest.mark.parametrize(
    "text",
    [
        "```\n" + "".join(f"line {n}\n" for n in range(60)) + "```\nend",
        "```py\n" + "".join(f"x{n} = '''\n" for n in range(300)),  # never closed
        "word " * 400,
        "| a |\n|---|\n" + "".join(f"| {n} |\n" for n in range(40)),
        "".join(f"- item {n}\n" for n in range(60)),
        "1. one\n" + "".join(f"   - sub {n}\n" for n in range(40)) + "2. two",
    ],
    ids=["code", "long code", "paragraph", "table", "list", "item"],
)
def test_what_is_taller_than_the_window_stands_there_once(text: str) -> None:
    rows = shown(re.findall(r".{1,20}|\n", text), height=10)
    assert rows == shown([text], height=10_000)
    numbers = re.findall(r"\d+", " ".join(re.sub(r"^ [12] ", "", row) for row in rows))
    wanted = re.findall(r"\d+", text.removeprefix("1.").replace("2. two", ""))
    assert numbers == wanted


def test_rows_that_stay_are_not_painted_again() -> None:
    terminal = Terminal(40, 12)
    stream = MarkdownStream(Console(file=terminal, width=40, height=12, force_terminal=True), interval=0)
    stream.push("first line\nsecond line\nthi")
    terminal.touched.clear()
    stream.push("rd")
    assert terminal.touched == {2}


def test_paintings_are_no_closer_than_the_interval() -> None:
    terminal = Terminal(40, 12)
    screen = Console(file=terminal, width=40, height=12, force_terminal=True)
    now = 0.0
    stream = MarkdownStream(screen, interval=1, clock=lambda: now)
    stream.push("a")
    now = 0.5
    stream.push("b")
    assert terminal.rows == ["a"]
    now = 1.0
    stream.push("c")
    assert terminal.rows == ["abc"]


def test_a_narrower_window_is_painted_over_whole() -> None:
    """The terminal has wrapped a row of 36 cells into two of 20: they are gone, and nothing above them is."""
    terminal = Terminal(40, 12)
    screen = Console(file=terminal, width=40, height=12, force_terminal=True)
    stream = MarkdownStream(screen, interval=0)
    stream.push("above\n\n" + "abcde " * 6)
    assert terminal.rows == ["above", "", "abcde " * 5 + "abcde"]
    terminal.rows[2:] = ["abcde abcde abcde ab", "cde abcde abcde"]
    terminal.row, terminal.width = 3, 20
    screen.width = 20
    stream.push("fg")
    assert [row.rstrip() for row in terminal.rows] == ["above", "", "abcde abcde abcde", "abcde abcde abcde", "fg"]


def test_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert safe("a\x1b[2Jb\x07\x9bc\r\n\td") == "a[2Jbc\n\td"
    written = io.StringIO()
    screen = Console(file=written, width=40, height=12, force_terminal=True)
    stream = MarkdownStream(screen, interval=0)
    stream.push("[good.example](http://bad.example)")
    stream.close()
    assert "\x1b]" not in written.getvalue()  # a link of the terminal's, which shows only its text
    assert "http://bad.example" in written.getvalue()


@pytest.mark.parametrize(
    ("text", "width", "parts"),
    [
        ("one two three", 7, ["one two ", "three"]),
        ("one  two", 4, ["one  ", "two"]),
        ("    indented code here", 14, ["    indented ", "code here"]),
        ("abcdefghij kl", 4, ["abcd", "efgh", "ij ", "kl"]),
        ("答案是四十二。完", 12, ["答案是四十", "二。完"]),  # no stop at the beginning of a line
        ("他说「好」", 6, ["他说", "「好」"]),  # no bracket opened at the end of one
        ("Python是语言", 8, ["Python是", "语言"]),
        ("say “hello there”", 11, ["say “hello ", "there”"]),
        ("", 5, [""]),
    ],
)
def test_where_lines_break(text: str, width: int, parts: list[str]) -> None:
    cuts = [0, *break_points(text, width), len(text)]
    assert [text[start:end] for start, end in pairwise(cuts)] == parts


def test_plain_text_breaks_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    stream = PlainStream(lambda: 10)
    for piece in ("Some wo", "rds **as** they", " are\n  x", "yz abcdefghijklm", "n", "opq 中文中文中文"):
        stream.push(piece)
    stream.close()
    assert capsys.readouterr().out == "Some words \n**as** \nthey are\n  xyz \nabcdefghijklmnopq 中\n文中文中文\n"


def test_the_size_is_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of ``COLUMNS``, which a window that is resized does not change."""
    monkeypatch.setenv("COLUMNS", "33")
    monkeypatch.setenv("LINES", "11")
    sizes = [os.terminal_size((80, 24)), os.terminal_size((50, 20))]
    monkeypatch.setattr("os.get_terminal_size", lambda *descriptor: sizes[0])
    found = console()
    assert (found.width, found.height) == (80, 24)
    del sizes[0]
    assert (found.width, found.height) == (50, 20)
