"""Rows that begin alike: found, kept together, answered by one replica while it has room, and by others rather than
not at all."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_replicas import Replicas, _go_on, finish, left_over, parts_of, row, rows_of
from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import Asked, choose, plain
from tpctl.batch.formats.place import Part
from tpctl.batch.leases import Leases
from tpctl.batch.plan import Division, division_of
from tpctl.batch.prefixes import MOST_SHARES, Sharing, order_of, share_of, sharing_of, sizes
from tpctl.client.jobs import Line

ALIKE = "You are asked about one of many documents. Answer shortly. " * 2


def document(number: int, length: int = 400) -> str:
    words = random.Random(number)
    return ALIKE + " ".join(str(words.randrange(1000)) for _ in range(length // 4))


def line(id: int, text: str, chat: bool = False) -> bytes:
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return json.dumps({"id": f"a row of its own, {id}", **asked}).encode() + b"\n"


def scattered(documents: int, questions: int, chat: bool = False) -> list[bytes]:
    """All documents with the first question, then with the second one, and so on."""
    rows = [(document(one), question) for question in range(questions) for one in range(documents)]
    return [line(id, f"{text} Question {question}?", chat) for id, (text, question) in enumerate(rows)]


@pytest.mark.parametrize("chat", [False, True])
def test_documents_that_are_scattered_are_shared_out(chat: bool) -> None:
    raws = scattered(60, 10, chat)
    sharing = sharing_of(raws, 50, 8)
    assert sharing.shares == 8 and len(ALIKE) < sharing.depth <= 512
    shares = [share_of(raw, sharing) for raw in raws]
    assert shares[:60] * 10 == shares and len(set(shares)) == 8
    assert sizes(raws, sharing) == tuple(Counter(shares)[share] for share in range(8))


def test_rows_that_need_it_not_are_not() -> None:
    grouped = [line(id, f"{document(id // 10)} Question {id % 10}?") for id in range(600)]
    apart = [line(id, document(id)) for id in range(600)]
    few_kinds = [line(id, f"{document(id % 2)} {id}") for id in range(600)]
    short = [line(id, f"What is {id % 7}?") for id in range(600)]
    for raws in (grouped, apart, few_kinds, short, []):
        assert sharing_of(raws, 50, 8) == Sharing()
    assert sharing_of(scattered(60, 10), 50, 1) == Sharing()


def test_rows_that_begin_alike_are_neighbours_and_where_none_do_the_order_is_the_inputs() -> None:
    def order(raws: list[bytes], sharing: Sharing) -> list[int]:
        return order_of([Line(100 + at, 7 + at, raw) for at, raw in enumerate(raws)], sharing)

    raws = scattered(5, 4)
    for sharing in (Sharing(), Sharing(3, 256)):
        found = order(raws, sharing)
        assert sorted(found) == list(range(20))
        documents = [at % 5 for at in found]
        assert sum(a != b for a, b in pairwise(documents)) == 4
    assert order([line(id, f"What is {99 - id}?") for id in range(50)], Sharing()) == list(range(50))


def test_division_says_how_many_rows_parts_have_then(tmp_path: Path) -> None:
    prompts = tmp_path / "p"
    prompts.write_bytes(b"".join(scattered(60, 10)))
    found = division_of(plain(prompts), 2)
    assert (found.rows, found.sharing.shares) == (600, 8)
    assert division_of(plain(prompts), 2, 50) == Division(50, found.sharing)
    prompts.write_bytes(b"".join(scattered(3000, 3)))
    assert (
        division_of(plain(prompts), 2).rows == 8 * 1000
        and division_of(plain(prompts), 64).sharing.shares == MOST_SHARES
    )


class Fleet:
    """Replicas that take a span each in turn, and answer it."""

    def __init__(self, tmp_path: Path, raws: list[bytes], part_rows: int, sharing: Sharing) -> None:
        self.prompts = tmp_path / "prompts.jsonl"
        self.prompts.write_bytes(b"".join(raws))
        self.folder = JobFolder(tmp_path / "out")
        self.parts = parts_of(self.folder, self.prompts, part_rows, sharing)
        self.board = Board(self.folder, plain(self.prompts))
        self.taken: dict[str, list[int]] = {}

    def turn(self, leases: Leases) -> bool:
        with plain(self.prompts).source.open() as reader:
            lease = leases._take(reader)
        if lease is None:
            return False
        self.taken.setdefault(leases._name, []).append(lease.span.share)
        for one in lease.lines:
            leases.add(one, row(one), 1)
        return True


def test_each_share_is_one_replicas_and_all_of_it_is_done_when_some_are_gone(tmp_path: Path) -> None:
    raws = scattered(60, 10)
    fleet = Fleet(tmp_path, raws, 200, Sharing(6, 256))
    for part in fleet.parts:
        fleet.board.offer(part)
    assert len(fleet.parts) == 3 and fleet.board.offered == 18
    one, two = (Leases(fleet.folder, plain(fleet.prompts), name) for name in ("one", "two"))
    with plain(fleet.prompts).source.open() as reader:  # both begin at once
        first, second = one._take(reader), two._take(reader)
    assert first is not None and second is not None and first.span.share != second.span.share
    for leases, lease in ((one, first), (two, second)):
        for asked in lease.lines:
            leases.add(asked, row(asked), 1)
    for _ in range(2):
        assert fleet.turn(one) and fleet.turn(two)
    fleet.board.collect()
    assert set(fleet.taken["one"]) == {first.span.share} and set(fleet.taken["two"]) == {second.span.share}
    while fleet.turn(one):  # the other one is gone
        fleet.board.collect()
    assert fleet.board.idle and not left_over(fleet.folder)
    assert [found["id"] for found in rows_of(fleet.folder)] == list(range(1, 601))
    assert fleet.board.sums.cached_tokens == 600 and fleet.board.sums.rows == 600


def test_one_that_is_busy_leaves_what_others_have_and_one_that_is_idle_helps(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, scattered(60, 10), 600, Sharing(2, 256))
    fleet.board.offer(fleet.parts[0])
    (fleet.folder.state).write_text('{"share": 10000}')
    busy, other = (
        Leases(fleet.folder, plain(fleet.prompts), "busy", 50),
        Leases(fleet.folder, plain(fleet.prompts), "other"),
    )
    with plain(fleet.prompts).source.open() as reader:
        mine = busy._take(reader)
        assert mine is not None and busy._take(reader) is None
        for asked in mine.lines[: mine.missing - 49]:
            busy.add(asked, row(asked))
        helped = busy._take(reader)
        assert helped is not None and helped.span.share != mine.span.share
        assert other._take(reader) is None
    with plain(fleet.prompts).source.open() as reader:
        assert reader.read(fleet.parts[0])[0].number == 1


def test_pieces_that_lost_their_sums_are_read(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, scattered(30, 4), 120, Sharing(3, 256))
    fleet.board.offer(fleet.parts[0])
    leases = Leases(fleet.folder, plain(fleet.prompts), "r")
    assert fleet.turn(leases)
    fleet.board.collect()
    (sums,) = fleet.folder.kept.glob("*.sums")
    sums.unlink()
    board = Board(fleet.folder, plain(fleet.prompts))
    while fleet.turn(leases):
        board.collect()
    assert board.idle and not left_over(fleet.folder)
    assert (board.sums.rows, board.sums.cached_tokens, board.sums.prompt_tokens) == (120, 120, 240)


def test_prompts_in_a_field_of_another_name(tmp_path: Path) -> None:
    """Of lines that name their ids first."""
    raws = [raw.replace(b'"prompt"', '"fräge"'.encode()) for raw in scattered(60, 10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join(raws))
    spec = choose(str(prompts), "rows/", Asked(prompt_column="fräge"), "m")
    assert spec is not None
    formats = spec.formats()
    sharing = division_of(formats, 2, 50).sharing
    assert (sharing.shares, sharing.field) == (8, "fräge") and len(ALIKE) < sharing.depth <= 512
    part = parts_of(JobFolder(tmp_path / "out"), formats, 600, sharing)[0]
    assert part.sharing == sharing and Part.from_json(json.loads(json.dumps(asdict(part)))) == part
    lines = [Line(place, place + 1, raw) for place, raw in enumerate(raws[:120])]
    for one in (sharing, Sharing(field="fräge")):
        order = order_of(lines, one)
        assert all(abs(order.index(place) - order.index(place + 60)) == 1 for place in range(60))


@pytest.mark.parametrize("killed_after", [None, 0, 1, 40, 90])
def test_errors_that_are_tried_again_in_shares_of_an_input_that_grew(tmp_path: Path, killed_after: int | None) -> None:
    prompts, folder, sharing = tmp_path / "prompts.jsonl", JobFolder(tmp_path / "out"), Sharing(3, 256)
    raws = scattered(30, 5)
    prompts.write_bytes(b"".join(raws[:120]))

    def fails(line: Line) -> dict[str, Any]:
        return {"id": line.number, "error": "no"} if line.number % 7 == 0 else row(line)

    first = finish(folder, prompts, parts_of(folder, prompts, 50, sharing), Replicas(folder, prompts, fails))
    assert first.sums.errors == 17 and first.sums.rows == 120
    prompts.write_bytes(b"".join(raws))
    asked: list[int] = []

    def answers(line: Line) -> dict[str, Any]:
        asked.append(line.number)
        return row(line)

    replicas = Replicas(folder, prompts, answers)

    def again() -> Board:
        parts = parts_of(folder, prompts, 50, sharing)
        assert [part.rows for part in parts] == [50, 50, 20, 30]
        board = Board(folder, plain(prompts))
        board.drop_errors()
        for part in parts:
            if part.number in board.done and board.errors_of(part.number):
                board.reopen(part)
        if killed_after is None or asked:
            _go_on(board, parts, replicas, False)
        else:
            for part in parts[3:]:
                board.offer(part)
            replicas.work(killed_after)
        return board

    board = again()
    if killed_after is not None:
        asked.append(0)
        board.close()
        assert len(rows_of(folder)) >= 120
        board = again()
    assert [found["id"] for found in rows_of(folder)] == list(range(1, 151))
    assert not any("error" in found for found in rows_of(folder)) and not left_over(folder)
    assert (board.sums.rows, board.sums.errors, board.sums.prompt_tokens) == (150, 0, 300)
    failed = sum(range(7, 121, 7))  # of which ``Replicas`` says, as an engine does not, that they had something cached
    assert board.sums.cached_tokens == sum(range(1, 151)) + failed
    assert sorted({*asked} - {0}) == [n for n in range(1, 151) if n % 7 == 0 or n > 120]
