"""Two coordinators of one folder, where no lock tells them of each other: as on a network's file system that has none,
when the first was thought dead."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_replicas import row, write_prompts
from tpctl.batch.coordinator import Coordinator
from tpctl.batch.folder import JobFolder, json_lines
from tpctl.batch.formats.choose import plain
from tpctl.batch.local import Local
from tpctl.batch.plan import Division, Plan
from tpctl.batch.replica import Replica
from tpctl.errors import OutputError

ROWS = 2000


def answer(folder: JobFolder, prompts: Path, name: str, ended: threading.Event) -> None:
    with Replica(folder, name, 1) as place:
        leases = place.begin(plain(prompts))
        for group in leases.groups(5, 0.01, ended.is_set):
            for line in group:
                leases.add(line, row(line))
            leases.flush()
            time.sleep(0.03)  # it takes longer than until the first coordinator gives its next sign


@pytest.mark.parametrize("later", [0.0, 0.3])
def test_rows_are_there_once_and_the_first_one_ends(tmp_path: Path, later: float) -> None:
    folder = JobFolder(tmp_path / "out")
    folder.make()
    prompts = write_prompts(tmp_path, ROWS)
    ended = threading.Event()
    said: list[str] = []

    def first() -> None:
        try:
            plan = Plan(folder, plain(prompts), Division(50))
            with Coordinator(folder, plan, Local(folder.root, [], "")) as coordinator:
                coordinator.run(lambda progress: None, lambda: False)
        except OutputError as error:
            said.append(str(error))

    threads = [threading.Thread(target=first)]
    threads[0].start()
    time.sleep(0.1)
    names = ("one", "other", "third")
    threads += [threading.Thread(target=answer, args=(folder, prompts, name, ended)) for name in names]
    for thread in threads[1:]:
        thread.start()
    time.sleep(later)
    with Coordinator(folder, Plan(folder, plain(prompts), Division(50)), Local(folder.root, [], "")) as coordinator:
        done = coordinator.run(lambda progress: None, lambda: not any(thread.is_alive() for thread in threads[1:]))
        ended.set()
    for thread in threads:
        thread.join(60)
    assert done and len(said) == 1 and "has taken" in said[0] and "this one ends" in said[0]
    parts = [folder.part(number) for number in range(ROWS // 50)]
    rows: list[dict[str, Any]] = [json.loads(line) for part in parts for line in part.open()]
    assert [found["id"] for found in rows] == list(range(1, ROWS + 1))
    counted = {entry["part"]: entry["sums"]["rows"] for entry in json_lines(folder.log)}
    assert sum(counted.values()) == coordinator.board.sums.rows == ROWS
