"""Parts of a batch without processes: a coordinator's board, and replicas that answer a line with its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder, names, spans_in
from tpctl.batch.formats.choose import plain
from tpctl.batch.formats.place import Formats, Part
from tpctl.batch.leases import Leases
from tpctl.batch.plan import Division, Plan
from tpctl.batch.prefixes import UNSHARED, Sharing
from tpctl.client.jobs import Line

Answer = Callable[[Line], dict[str, Any]]


def row(line: Line) -> dict[str, Any]:
    return {"id": line.number, "text": f"<{line.raw.decode().strip()}>", "prompt_tokens": 2, "completion_tokens": 1}


class Died(BaseException):
    """What takes a process with it."""


def write_prompts(tmp_path: Path, count: int) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "line {number}"}}\n' for number in range(1, count + 1)))
    return prompts


def formats_of(prompts: Path | Formats) -> Formats:
    return prompts if isinstance(prompts, Formats) else plain(prompts)


def parts_of(folder: JobFolder, prompts: Path | Formats, rows: int, sharing: Sharing = UNSHARED) -> list[Part]:
    folder.make()
    plan = Plan(folder, formats_of(prompts), Division(rows, sharing))
    plan._run()
    return list(plan.ready())


class Replicas:
    """Replicas that take turns, one line each; each new one has a new name. Of line n there are n tokens cached."""

    def __init__(self, folder: JobFolder, prompts: Path | Formats, answer: Answer = row) -> None:
        self.folder = folder
        self.formats = formats_of(prompts)
        self.answer = answer
        self.count = 0
        self.deaths = 0

    def work(self, lines: int | None = None) -> str:
        """A new replica answers so many lines, or all that it is offered; its name."""
        self.count += 1
        name = f"r{self.count}"
        leases = Leases(self.folder, self.formats, name)
        done = 0
        try:
            for group in leases.groups(1, 0.0, over=lambda: not any(spans_in(self.folder.offers))):
                for line in group:
                    if lines is not None and done >= lines:
                        return name
                    done += 1
                    leases.add(line, self.answer(line), line.number)
                    leases.flush()
        finally:
            leases.close()
        return name


def finish(
    folder: JobFolder, prompts: Path | Formats, parts: list[Part], replicas: Replicas, *, died: bool = True
) -> Board:
    """A new coordinator, and replicas one after the other, each until it has nothing to do or dies, until all is done.

    Args:
        died: whether a replica that leaves leases behind has died of a line.
    """
    board = Board(folder, formats_of(prompts))
    try:
        _go_on(board, parts, replicas, died)
    finally:
        board.close()
    return board


def _go_on(board: Board, parts: list[Part], replicas: Replicas, died: bool) -> None:
    for leases in board.holders().values():  # of an earlier run
        board.give_back(leases, died=False)
    board.collect()
    for part in parts:
        if part.number not in board.done and not board.under_way(part):
            board.offer(part)
    for _ in range(1000):
        if board.idle:
            return
        try:
            replicas.work()
        except Died:
            replicas.deaths += 1
        board.collect()
        for leases in board.holders().values():
            board.give_back(leases, died=died)
    raise AssertionError("it does not end")


def rows_of(folder: JobFolder) -> list[dict[str, Any]]:
    return [json.loads(raw) for _, path in sorted(folder.parts().items()) for raw in path.open()]


def left_over(folder: JobFolder) -> list[str]:
    """What should not be there any more when all is done."""
    places = (folder.offers, folder.leases, folder.work, folder.kept, folder.finished)
    return [f"{place.name}/{name}" for place in places for name in names(place)]
