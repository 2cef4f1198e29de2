"""Two coordinators of one folder, where no lock tells them of each other: as on a network's file system that has none,
when the first was thought dead."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import IO

import pytest

from tests.unit.batch_replicas import Answer, row, rows_of, write_prompts
from tests.unit.batch_tables import formats_of, parts_read, reply, table, write
from tpctl.batch import folder as folder_module
from tpctl.batch.coordinator import Coordinator
from tpctl.batch.folder import JobFolder, json_lines, put, write_whole
from tpctl.batch.formats.choose import plain
from tpctl.batch.formats.place import Formats
from tpctl.batch.local import Local
from tpctl.batch.plan import Division, Plan
from tpctl.batch.replica import Replica
from tpctl.errors import OutputError

ROWS = 2000


def answer(folder: JobFolder, formats: Formats, reply: Answer, name: str, ended: threading.Event) -> None:
    with Replica(folder, name, 1) as place:
        leases = place.begin(formats)
        for group in leases.groups(5, 0.01, ended.is_set):
            for line in group:
                leases.add(line, reply(line))
            leases.flush()
            time.sleep(0.03)  # it takes longer than until the first coordinator gives its next sign


@pytest.mark.parametrize(("later", "tables"), [(0.0, False), (0.3, False), (0.3, True)])
def test_rows_are_there_once_and_the_first_one_ends(tmp_path: Path, later: float, tables: bool) -> None:
    folder = JobFolder(tmp_path / "out")
    folder.make()
    prompts = write(tmp_path / "in.parquet", table(ROWS), 300) if tables else write_prompts(tmp_path, ROWS)

    def formats() -> Formats:
        """Each process has its own."""
        return formats_of(prompts, id_column="key", keep_columns=("image", "price")) if tables else plain(prompts)

    ended = threading.Event()
    said: list[str] = []

    def first() -> None:
        try:
            plan = Plan(folder, formats(), Division(50))
            with Coordinator(folder, plan, Local(folder.root, [], "")) as coordinator:
                coordinator.run(lambda progress: None, lambda: False)
        except OutputError as error:
            said.append(str(error))

    threads = [threading.Thread(target=first)]
    threads[0].start()
    time.sleep(0.1)
    names = ("one", "other", "third")
    threads += [
        threading.Thread(target=answer, args=(folder, formats(), reply if tables else row, name, ended))
        for name in names
    ]
    for thread in threads[1:]:
        thread.start()
    time.sleep(later)
    with Coordinator(folder, Plan(folder, formats(), Division(50)), Local(folder.root, [], "")) as coordinator:
        done = coordinator.run(lambda progress: None, lambda: not any(thread.is_alive() for thread in threads[1:]))
        ended.set()
    for thread in threads:
        thread.join(60)
    assert done and len(said) == 1 and "has taken" in said[0] and "this one ends" in said[0]
    assert len(folder.parts()) == ROWS // 50
    if tables:
        given = table(ROWS)
        read = parts_read(folder)
        assert read["id"] == given["key"] and read["image"] == given["image"] and read["error"].null_count == ROWS
    else:
        assert [found["id"] for found in rows_of(folder)] == list(range(1, ROWS + 1))
    counted = {entry["part"]: entry["sums"]["rows"] for entry in json_lines(folder.log)}
    assert sum(counted.values()) == coordinator.board.sums.rows == ROWS


def test_two_that_write_one_file_at_once_both_leave_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers on two hosts processes have the same id."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "00000.whole"
    seen = []

    def other(write: IO[bytes]) -> None:
        write.write(b"a" * 10)

    def first(write: IO[bytes]) -> None:
        write.write(b"a" * 5)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(folder_module, "OWN", "another")
            write_whole(path, other)
            put(tmp_path / "state.json", b"theirs")
        seen.append(path.read_bytes())
        write.write(b"a" * 5)

    write_whole(path, first)
    assert [*seen, path.read_bytes()] == [b"a" * 10] * 2 and not [*tmp_path.glob(".*")]


def test_what_another_tidies_away_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that was taken over, and does not know it yet, offers a part that the other one has published."""
    replace, taken = Path.replace, []

    def tidied(path: Path, target: Path) -> Path:
        if not taken:
            taken.append(path)
            path.unlink()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", tidied)
    put(tmp_path / "00010.0-50.0", b"{}")
    assert taken and (tmp_path / "00010.0-50.0").read_bytes() == b"{}" and not [*tmp_path.glob(".*")]
