"""Pieces of a file that are read together: neighbours, with small gaps, far apart, and behind the file's end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tpctl.errors import CheckpointError
from tpctl.sharding.moving import files as module
from tpctl.sharding.moving.files import Bytes, Files

SIZE = 40_000


def pieces_at(places: Sequence[tuple[int, int]]) -> list[tuple[int, Bytes]]:
    return [(first, np.zeros((1, size), np.uint8)) for first, size in places]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("places", "calls"),
    [
        ([], 0),
        ([(7, 0)], 0),
        ([(10, 5), (15, 20), (35, 1)], 1),
        ([(35, 1), (10, 5), (15, 20)], 1),  # in any order
        ([(0, 4), (100, 4), (4200, 4)], 1),  # gaps are read along
        ([(0, 4), (4101, 4)], 2),  # but not large ones
        ([(0, 10), (5, 10)], 2),
        ([(0, 10), (10, 0), (10, 10)], 1),
        ([(at, 1) for at in range(0, 2 * module.MOST_PIECES, 2)], 2),  # with gaps more than the system takes at once
    ],
)
def test_pieces_are_filled_in_few_calls(
    path: Path, places: list[tuple[int, int]], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, system = [], os.preadv

    def counting(fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        made.append(offset)
        return system(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    pieces, data = pieces_at(places), path.read_bytes()
    with Files() as files:
        files.open(path)
        files.read_pieces(path, pieces)
    assert len(made) == calls
    for first, out in pieces:
        assert out.tobytes() == data[first : first + out.nbytes]


def test_what_the_system_reads_in_part_is_read_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = os.preadv

    def part(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return system(fd, [buffers[0].cast("B")[:3]], offset)

    monkeypatch.setattr(os, "preadv", part)
    pieces, data = pieces_at([(0, 7), (7, 3), (12, 8)]), path.read_bytes()
    with Files() as files:
        files.open(path)
        files.read_pieces(path, pieces)
    for first, out in pieces:
        assert out.tobytes() == data[first : first + out.nbytes]


def test_pieces_behind_the_end_are_an_error_that_says_where(path: Path) -> None:
    with Files() as files:
        files.open(path)
        with pytest.raises(CheckpointError, match=f"ends at byte {SIZE}, 7 bytes too early"):
            files.read_pieces(path, pieces_at([(SIZE - 10, 12), (SIZE + 2, 5)]))
