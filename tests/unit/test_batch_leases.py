"""Leases over a folder: whoever dies, and wherever, every line has one row in the end, and the same one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_replicas import (
    Died,
    Replicas,
    finish,
    left_over,
    parts_of,
    row,
    rows_of,
    write_prompts,
)
from tpctl.batch import leases as leases_module
from tpctl.batch.board import Board
from tpctl.batch.folder import DEATHS, JobFolder, Span, names, put
from tpctl.batch.formats.choose import plain
from tpctl.batch.leases import Leases
from tpctl.batch.prefixes import Sharing
from tpctl.batch.rows import kept_rows
from tpctl.client.jobs import Line
from tpctl.errors import OutputError, RequestError

COUNT = 25


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "out")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path, COUNT)


WANTED = [row(Line(n - 1, n, json.dumps({"prompt": f"line {n}"}).encode())) for n in range(1, COUNT + 1)]


def test_undisturbed(folder: JobFolder, prompts: Path) -> None:
    board = finish(folder, prompts, parts_of(folder, prompts, 10), Replicas(folder, prompts))
    assert rows_of(folder) == WANTED and not left_over(folder)
    assert (board.sums.rows, board.sums.prompt_tokens, board.sums.completion_tokens) == (COUNT, 2 * COUNT, COUNT)
    assert sorted(folder.parts()) == [0, 1, 2]


@contextmanager
def killed_at(step: int, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The process ends at the so manieth change of the file system from here; yields what was changed before."""
    seen: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Path, *args: Any, **more: Any) -> Any:
            if name != "open" or (args or ["r"])[0][0] in "aw":
                if len(seen) == step:
                    seen.append(f"died before {name} {path.name}")
                    raise Died
                seen.append(f"{name} {path.name}")
            return original(path, *args, **more)

        return change

    with patch.context() as inner:
        inner.setattr(os, "fsync", lambda number: None)
        for name in ("rename", "replace", "unlink", "open"):
            inner.setattr(Path, name, counted(name, getattr(Path, name)))
        yield seen


@pytest.mark.parametrize(("rows", "sharing"), [(10, Sharing()), (25, Sharing(3, 64))], ids=["parts", "shares"])
def test_killed_at_any_change_of_any_file(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, rows: int, sharing: Sharing
) -> None:
    """Of coordinator and replicas at once, with a line that kills engines, so that parts are narrowed, too."""

    def deadly(line: Line) -> dict[str, Any]:
        if line.number == 13:
            raise Died
        return row(line)

    steps = 0
    while True:
        folder = JobFolder(tmp_path / f"out-{steps}")
        parts = parts_of(folder, prompts, rows, sharing)
        replicas = Replicas(folder, prompts, deadly)
        with killed_at(steps, monkeypatch) as seen:
            try:
                finish(folder, prompts, parts, replicas)
                ended = True
            except Died:
                ended = False
        if not ended:
            finish(folder, prompts, parts, Replicas(folder, prompts, deadly))
        found = rows_of(folder)
        error = found.pop(12)
        assert error["id"] == 13 and "died or hung while they answered it" in error["error"], seen[-1]
        assert found == WANTED[:12] + WANTED[13:], seen[-1]
        assert not left_over(folder), seen[-1]
        # Of each row that is there, and none twice, whoever was killed.
        assert Board(folder, plain(prompts)).sums.cached_tokens == sum(range(1, COUNT + 1)) - 13, seen[-1]
        if len(seen) == steps:  # nothing was left to die before
            break
        steps += 1
    assert steps > 100


def test_rows_of_a_replica_that_died_are_not_computed_again(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    board = Board(folder, plain(prompts))
    board.offer(parts[0])
    replicas = Replicas(folder, prompts)
    name = replicas.work(7)
    assert list(board.holders()) == [name]
    board.give_back(board.holders()[name], died=True)
    assert sorted(kept_rows(folder, 0)) == list(range(7))
    computed = []
    replicas.answer = lambda line: computed.append(line.number) or row(line)
    replicas.work()
    board.collect()
    assert computed == [8, 9, 10] and rows_of(folder) == WANTED[:10]


@pytest.mark.parametrize("line", [1, 10, 13, 25])
def test_a_deadly_line_becomes_an_error_row_after_some_deaths(folder: JobFolder, prompts: Path, line: int) -> None:
    def deadly(asked: Line) -> dict[str, Any]:
        if asked.number == line:
            raise Died
        return row(asked)

    replicas = Replicas(folder, prompts, deadly)
    board = finish(folder, prompts, parts_of(folder, prompts, 25), replicas)
    found = rows_of(folder)
    assert found[line - 1] == {
        "id": line,
        "error": f"line {line}: at least {DEATHS} engines died or hung while they answered it",
    }
    assert found[: line - 1] + found[line:] == WANTED[: line - 1] + WANTED[line:]
    assert board.sums.errors == 1 and replicas.deaths >= DEATHS


def test_deaths_that_no_line_is_to_blame_for_make_no_error_rows(folder: JobFolder, prompts: Path) -> None:
    chance = iter([True, False, False, True, True] * 200)

    def unlucky(line: Line) -> dict[str, Any]:
        if next(chance):
            raise Died
        return row(line)

    finish(folder, prompts, parts_of(folder, prompts, 25), Replicas(folder, prompts, unlucky), died=False)
    assert rows_of(folder) == WANTED


def test_who_was_thought_dead_and_hands_in_first_is_believed_and_the_other_one_dropped(
    folder: JobFolder, prompts: Path
) -> None:
    parts = parts_of(folder, prompts, 10)
    board = Board(folder, plain(prompts))
    board.offer(parts[0])
    slow, quick = Leases(folder, plain(prompts), "slow"), Leases(folder, plain(prompts), "quick")
    asked_slow = next(slow.groups(10, 0.0))
    slow.add(asked_slow[0], row(asked_slow[0]))
    slow.flush()
    board.give_back(board.holders()["slow"], died=True)
    asked_quick = next(quick.groups(10, 0.0))
    assert [line.number for line in asked_quick] == list(range(2, 11))
    for leases, asked in ((slow, asked_slow[1:]), (quick, asked_quick)):
        for line in asked:
            leases.add(line, row(line))
    assert len([name for name in names(folder.finished) if not name.endswith(".sums")]) == 2
    board.collect()
    assert rows_of(folder) == WANTED[:10] and board.sums.rows == 10
    assert not left_over(folder)


def test_of_several_that_want_a_part_one_gets_it(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    board = Board(folder, plain(prompts))
    for part in parts:
        board.offer(part)
    put(folder.state, {"share": 1000})
    takers = [Leases(folder, plain(prompts), f"t{number}") for number in range(5)]
    with plain(prompts).source.open() as reader:
        got = [(taker, taker._take(reader)) for _ in range(3) for taker in takers]
    taken = [lease.span.part for _, lease in got if lease is not None]
    assert sorted(taken) == [0, 1, 2]


def test_a_lease_that_is_cleared_away_as_it_is_taken_is_passed_over(
    folder: JobFolder, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two coordinators that do not know of each other: one has the part, which the other one had offered again."""
    parts = parts_of(folder, prompts, 10)
    board = Board(folder, plain(prompts))
    for part in parts:
        board.offer(part)
    move, cleared = leases_module.move, []

    def cleared_away(source: Path, target: Path) -> bool:
        taken = move(source, target)
        if not cleared:
            cleared.append(target.name)
            target.unlink()
        return taken

    monkeypatch.setattr(leases_module, "move", cleared_away)
    line = next(Leases(folder, plain(prompts), "r").groups(10, 0.01))[0]
    assert cleared == [Span(0, 0, 10).held_by("r")] and line.index == 10


def test_nobody_takes_more_than_its_share_or_anything_beside_a_suspect(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 5)
    board = Board(folder, plain(prompts))
    for part in parts:
        board.offer(part)
    leases = Leases(folder, plain(prompts), "r")
    with plain(prompts).source.open() as reader:
        put(folder.state, {"share": 12})
        assert [leases._take(reader) is not None for _ in range(3)] == [True, True, False]
        suspect = Leases(folder, plain(prompts), "s")
        for name in names(folder.offers):
            if name.startswith("00002."):
                (folder.offers / name).rename(folder.offers / Span(2, 0, 5, DEATHS - 1).name)
        lease = suspect._take(reader)
        assert lease is not None and lease.span.alone and suspect._take(reader) is None
        put(folder.state, {"share": 1000})
        (folder.leases / lease.span.held_by("s")).rename(folder.offers / lease.span.name)
        assert [one.span.part for one in iter(lambda: leases._take(reader), None)] == [3, 4]


def test_error_rows_are_tried_again_on_demand_and_the_part_stays_until_then(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    wrong = {3, 14}
    replicas = Replicas(folder, prompts)
    replicas.answer = lambda line: {"id": line.number, "error": "no"} if line.number in wrong else row(line)
    board = finish(folder, prompts, parts, replicas)
    assert board.sums.errors == 2
    computed = []
    again = Board(folder, plain(prompts))
    cached = again.sums.cached_tokens
    assert [again.errors_of(number) for number in range(3)] == [1, 1, 0]
    for number in (0, 1):
        again.reopen(parts[number])
    assert again.sums.errors == 0 and len(rows_of(folder)) == COUNT
    replicas.answer = lambda line: computed.append(line.number) or row(line)
    replicas.work()
    again.collect()
    assert computed == [3, 14] and rows_of(folder) == WANTED and again.sums.errors == 0
    assert again.sums.cached_tokens == cached + 3 + 14
    assert Board(folder, plain(prompts)).sums == again.sums


def test_error_rows_in_unfinished_parts_are_tried_again_too(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    board = Board(folder, plain(prompts))
    board.offer(parts[0])
    replicas = Replicas(folder, prompts, lambda line: {"id": line.number, "error": "no"})
    name = replicas.work(4)
    board.give_back(board.holders()[name], died=False)
    replicas.answer = row
    again = Board(folder, plain(prompts))
    again.drop_errors()
    replicas.work()
    again.collect()
    assert rows_of(folder) == WANTED[:10]


def test_sums_that_were_lost_are_read_from_the_parts(folder: JobFolder, prompts: Path) -> None:
    board = finish(folder, prompts, parts_of(folder, prompts, 10), Replicas(folder, prompts))
    kept = folder.log.read_bytes()
    folder.log.write_bytes(kept[:20] + b"\n" + kept)  # a full disk, and later there was room again
    assert Board(folder, plain(prompts)).sums == board.sums
    for log in (kept[:-20], b""):
        folder.log.write_bytes(log)
        found = Board(folder, plain(prompts)).sums
        assert found.cached_tokens < board.sums.cached_tokens  # of which the rows say nothing
        assert replace(found, cached_tokens=board.sums.cached_tokens) == board.sums


def test_a_part_that_lost_rows_is_refused_and_one_that_is_removed_comes_again(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    finish(folder, prompts, parts, Replicas(folder, prompts))
    path = folder.part(1)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(OutputError, match=r"part-00001\.jsonl has 3 rows, but had 10; bring it back, or remove it"):
        Board(folder, plain(prompts))
    path.write_bytes(whole[:-5])
    with pytest.raises(OutputError, match=r"part-00001\.jsonl is damaged; bring it back, or remove it"):
        Board(folder, plain(prompts))
    path.unlink()
    assert finish(folder, prompts, parts, Replicas(folder, prompts)).sums.rows == COUNT and rows_of(folder) == WANTED


def test_sums_are_those_of_the_part_that_is_there_where_the_log_knows_another_one(
    folder: JobFolder, prompts: Path
) -> None:
    parts = parts_of(folder, prompts, 10)
    finish(folder, prompts, parts, Replicas(folder, prompts))
    path = folder.part(1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b'{"id": 11, "error": "e"}\n', *lines[1:]]))  # as before it was tried again
    sums = finish(folder, prompts, parts, Replicas(folder, prompts)).sums
    assert (sums.rows, sums.errors) == (COUNT, 1)


def test_numbers_that_json_has_no_form_for_are_the_lines_error(folder: JobFolder, prompts: Path) -> None:
    parts = parts_of(folder, prompts, 10)
    Board(folder, plain(prompts)).offer(parts[0])
    leases = Leases(folder, plain(prompts), "r")
    (line, *_) = next(leases.groups(10, 0.0))
    with pytest.raises(RequestError, match="not finite"):
        leases.add(line, {"id": 1, "logprobs": [float("nan")]})
    leases.add(line, {"id": 1, "error": "not finite"})


def test_a_folder_that_is_gone_is_one_line(folder: JobFolder, prompts: Path) -> None:
    import shutil

    parts = parts_of(folder, prompts, 10)
    Board(folder, plain(prompts)).offer(parts[0])
    leases = Leases(folder, plain(prompts), "r")
    groups = leases.groups(1, 0.0)
    lines = next(groups)
    shutil.rmtree(folder.root)
    with pytest.raises(OutputError, match=r"is gone; bring it back|cannot write"):
        for line in [*lines, *(line for group in groups for line in group)]:
            leases.add(line, row(line))
    with pytest.raises(OutputError, match="is gone; bring it back"):
        folder.check_there()


def test_names_of_spans() -> None:
    span = Span(12, 3, 40, 1)
    assert span.name == "00012.3-40.1" and Span.parse(span.held_by("host-7_x")) == (span, "host-7_x")
    assert Span.parse(Span(123456, 0, 1).name) == (Span(123456, 0, 1), "")
    span = Span(12, 3, 40, 1, 16)
    assert span.name == "00012.3-40.1~16" and Span.parse(span.held_by("r")) == (span, "r")
    assert span.meets(Span(12, 42, 1)) and not span.meets(Span(12, 43, 1)) and not span.meets(Span(11, 3, 40))
    for other in ("00012.3-40.1@", ".00012.3-40.1.99", "00012.3-40.1@r.sums", "x", "00012.3-40"):
        assert Span.parse(other) is None
