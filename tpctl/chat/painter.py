"""Rows at the end of a terminal's screen that are painted again and again, below others that stay."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_LEAST_WIDTH = 4


class Painter:
    """Paints rows over those of the last painting. Rows that are as they were are not touched, so nothing flickers.

    Between paintings the cursor is at the end of the last painted row.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[str] = []  # on the screen, and to be painted over

    @property
    def width(self) -> int:
        """Cells that a row may take: the last column is left free, where terminals differ in what they do."""
        return max(self._console.width - 1, _LEAST_WIDTH)

    def paint(self, final: list[str], rows: list[str]) -> None:
        """Print ``final`` for good where the last painting was, and below it paint ``rows``: as many as fit, the last
        ones."""
        rows = rows[-max(self._console.height - 1, 1) :]
        old, wanted = self._rows, [*final, *rows]
        same = 0
        while same < min(len(old), len(wanted)) and old[same] == wanted[same]:
            same += 1
        if wanted and same == len(wanted) < len(old):
            same -= 1  # for the cursor to stand behind the last row
        out = ""
        if same < len(old):
            up = sum(self._height(row) for row in old[same:]) - 1  # a window made narrower has wrapped what was wider
            out += "\r" + (f"\x1b[{up}A" if up else "")
        elif old and same < len(wanted):
            out += "\n"
        out += "\n".join(f"{row}\x1b[K" for row in wanted[same:])
        out += "\x1b[J" if same < len(old) else ""
        out += "\n" if final and not rows else ""
        self._rows = rows
        self._console.file.write(out)
        self._console.file.flush()

    def _height(self, row: str) -> int:
        return max(1, -(-cell_len(_ESCAPE.sub("", row)) // max(self._console.width, 1)))
