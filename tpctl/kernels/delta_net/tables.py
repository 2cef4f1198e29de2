"""Where a step's prompts have their states, and how they are divided into chunks; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tpctl.accounting import MOST_NET_CHUNKS, NET_CHUNK


class NewTokens(NamedTuple):
    """Those of one sequence: ``length`` of them from row ``first`` of the step on, the first at ``position``. Its state
    is in slot ``read`` (-1: it begins) and left in ``write``; ``keeps``: (after so many tokens, a slot), in order."""

    first: int
    length: int
    position: int
    read: int
    write: int
    keeps: tuple[tuple[int, int], ...] = ()


class Group(NamedTuple):
    """Sequences ``sequence`` and on, ``sequences`` of them, whose chunks are ``chunk`` and on."""

    chunk: int
    chunks: int
    sequence: int
    sequences: int


@dataclass
class Chunks:
    """A step's, in columns.

    Attributes:
        chunks: of each chunk its first row, tokens (0: there is none), its position, the slot that the state behind it
            is copied to (-1: none), and its sequence.
        sequences: of each sequence its first chunk, first row, and the slots that it reads and writes; one more at the
            end, whose first chunk is none's.
    """

    chunks: list[list[int]] = field(default_factory=lambda: [[] for _ in range(5)])
    sequences: list[list[int]] = field(default_factory=lambda: [[] for _ in range(4)])
    groups: list[Group] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of all chunks, and of all sequences."""
        return sum(map(len, self.chunks)), sum(map(len, self.sequences))

    @property
    def count(self) -> int:
        return len(self.chunks[0])

    def padded(self, chunks: int, sequences: int) -> list[int]:
        """All columns behind each other, of so many chunks and sequences; those that there are not are empty."""
        numbers: list[int] = []
        for column in self.chunks:
            numbers += column + [0] * (chunks - len(column))
        for column in self.sequences:
            numbers += column + column[-1:] * (sequences + 1 - len(column))
        return numbers

    @classmethod
    def of(cls, sequences: Iterable[NewTokens]) -> Chunks:
        made = cls()
        for number, one in enumerate(sequences):
            begin = len(made.chunks[0])
            _append(made.sequences, (begin, one.first, one.read, one.write))
            made._cut(number, one)
            made._gather(begin)
        _append(made.sequences, (len(made.chunks[0]), 0, -1, -1))
        return made

    def _cut(self, number: int, one: NewTokens) -> None:
        start = 0
        for stop, slot in (*one.keeps, (one.length, -1)):
            while start < stop:
                length = min(NET_CHUNK, stop - start)
                save = slot if start + length == stop else -1
                _append(self.chunks, (one.first + start, length, one.position + start, save, number))
                start += length

    def _gather(self, begin: int) -> None:
        """Put the last sequence, whose chunks begin there, into a group."""
        number, count = len(self.sequences[0]) - 1, len(self.chunks[0]) - begin
        if self.groups and self.groups[-1].chunks + count <= MOST_NET_CHUNKS:
            last = self.groups.pop()
            self.groups.append(last._replace(chunks=last.chunks + count, sequences=last.sequences + 1))
        else:
            self.groups.append(Group(begin, count, number, 1))


def _append(columns: list[list[int]], row: tuple[int, ...]) -> None:
    for column, value in zip(columns, row, strict=True):
        column.append(value)
