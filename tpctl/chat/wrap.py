"""Where lines may break: between words, and beside characters that are two cells wide, of which text without spaces
(Chinese, Japanese) is made."""

from __future__ import annotations

import re

from rich.cells import cell_len

_WIDE = (
    r"\u1100-\u115f\u2e80-\u303e\u3041-\u33ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff60"
    r"\U00020000-\U0003fffd"
)
_OPENING = "〈《「『【〔〖〘〚（［｛‘“"
_CLOSING = "、。〉》」』】〕〗〙〛！），．：；？］｝〜ー・…’”!),.:;?}" + r"\]"
# A wide character with the brackets and stops that belong to it, or a run of others, or nothing; then spaces.
WORD = re.compile(rf"(?:[{_OPENING}]*(?:[{_WIDE}][{_CLOSING}]*|[^\s{_WIDE}{_OPENING}]+)|[{_OPENING}]+|(?=\s))[^\S\n]*")


def break_points(line: str, width: int) -> list[int]:
    """Offsets at which ``line``, which holds no newline, is cut so that each part takes ``width`` cells at most.

    Spaces at the end of a part may lie beyond. A word is cut only where it is longer than a whole line.
    """
    breaks: list[int] = []
    column = 0
    for match in WORD.finditer(line):
        word = match[0]
        size = cell_len(word.rstrip())
        if column and column + size > width:
            breaks.append(match.start())
            column = 0
        if size > width:
            for offset, char in enumerate(word.rstrip(), match.start()):
                wide = cell_len(char)
                if column and column + wide > width:
                    breaks.append(offset)
                    column = 0
                column += wide
            column += cell_len(word) - size
        else:
            column += cell_len(word)
    return breaks
