"""Parquet in and out: rows found again by file, row group and place; the same guarantees as with lines."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.batch_formats_run import answer
from tests.unit.batch_replicas import Died, Replicas, finish, left_over, parts_of
from tests.unit.batch_tables import formats_of, parts_read, reply, table, write
from tests.unit.fake_client import FakeClient, write_tokenizer
from tpctl.batch import folder as batch_folder
from tpctl.batch.board import Board, assemble
from tpctl.batch.folder import JobFolder, json_lines, names
from tpctl.batch.formats import parquet, parquet_sink
from tpctl.batch.formats.place import Part, read_checked
from tpctl.batch.leases import Leases
from tpctl.batch.plan import Division, Plan, division_of
from tpctl.batch.prefixes import Sharing
from tpctl.client.jobs import Line
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import OutputError, SourceError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_one_engine_keeps_the_columns_and_their_types(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = table(11).append_column("prompt", pa.array([f"p{n}" if n != 5 else None for n in range(11)]))
    source = write(tmp_path / "in.parquet", data)
    out = tmp_path / "out.parquet"
    assert answer(tokenizer, source, out, id_column="key", keep_columns="all").errors == 1
    found = pq.read_table(out)
    own = ["id", "text", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens", "note", "error"]
    assert found.schema.names == own + data.schema.names
    kept = found.select(data.schema.names)
    assert kept.schema == data.schema and kept.drop(["price"]).equals(data.drop(["price"]))
    assert found["id"].to_pylist() == data["key"].to_pylist()
    assert found["text"].to_pylist() == [f"<p{n}>" if n != 5 else None for n in range(11)]
    assert found["error"].to_pylist()[5] == "row 6: prompt, the prompt, is null"
    assert not out.with_name("out.parquet.partial").exists()


def test_pyarrow_duckdb_and_datasets_read_parts_and_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(20))
    folder = JobFolder(tmp_path / "out")
    formats = formats_of(source, id_column="key", keep_columns=("label", "nested"))
    board = finish(folder, formats, parts_of(folder, formats, 7), Replicas(folder, formats, reply))
    whole = tmp_path / "whole.parquet"
    assemble(folder, formats.sink, whole, len(board.done), lambda: None)
    assert sorted(path.name for path in folder.root.glob("part*")) == [f"part-0000{n}.parquet" for n in range(3)]
    assert pq.read_table(whole).equals(parts_read(folder))
    for files in (f"{folder.root}/part-*.parquet", str(whole)):
        rows = duckdb.sql(
            f"select id, text, label, nested.a from '{files}' order by prompt_tokens, nested.a"
        ).fetchall()
        assert rows == [(f"k{n}", f"<q{n}>", n % 3, n) for n in range(20)]
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("parquet", data_files=str(whole), split="train", cache_dir=str(tmp_path / "cache"))
    assert data["text"][:2] == ["<q0>", "<q1>"] and data["label"][:4] == [0, 1, 2, 0]


GROUPS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(GROUPS, GROUPS, st.integers(1, 9))
def test_parts_hold_every_row_of_several_files_also_when_there_are_more(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], more: list[int], rows: int
) -> None:
    scratch = tmp_path_factory.mktemp("p")
    folder, inputs = JobFolder(scratch / "out"), scratch / "in"
    count = 0
    for files in (first, more):
        for size in files:
            write(inputs / f"f{count:04d}.parquet", table(size, count), group=3)
            count += size
        formats = formats_of(inputs, id_column="key")
        parts = parts_of(folder, formats, rows)
        with formats.source.open() as reader:
            lines = [line for part in parts for line in read_checked(reader, part)]
            assert lines == list(reader.lines())
        assert [json.loads(line.raw) for line in lines] == [{"question": f"q{n}", "key": f"k{n}"} for n in range(count)]
        assert [line.number for line in lines] == list(range(1, count + 1))
        assert sum(part.rows for part in parts) == count and all(0 < part.rows <= rows for part in parts)


def test_killed_anywhere_deadly_rows_and_errors_that_are_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(25))
    formats = formats_of(source, id_column="key", keep_columns=("label", "image"))
    folder, wrong = JobFolder(tmp_path / "out"), {3, 14}

    def odd(line: Line) -> dict[str, Any]:
        if line.number == 8:
            raise Died
        return {"id": f"k{line.number - 1}", "error": "no"} if line.number in wrong else reply(line)

    parts = parts_of(folder, formats, 10)
    replicas = Replicas(folder, formats, odd)
    board = finish(folder, formats, parts, replicas)
    found = parts_read(folder)
    assert found["id"].to_pylist() == [f"k{n}" for n in range(25)] and board.sums.errors == 3
    assert found["image"].to_pylist() == [bytes([n]) for n in range(25)]
    assert "row 8: at least 3 engines died or hung while they answered it" in found["error"].to_pylist()
    folder.log.unlink()
    again = Board(folder, formats)
    assert replace(again.sums, cached_tokens=board.sums.cached_tokens) == board.sums  # of which rows say nothing
    computed = []
    replicas.answer = lambda line: computed.append(line.number) or reply(line)
    for number in (0, 1):
        again.reopen(parts[number])
    replicas.work()
    again.collect()
    assert computed == [3, 8, 14] and again.sums.errors == 0 and not left_over(folder)
    found = parts_read(folder)
    assert found["text"].to_pylist() == [f"<q{n}>" for n in range(25)] and found["error"].null_count == 25
    assert found["label"].to_pylist() == table(25)["label"].to_pylist()


def test_a_changed_row_group_is_named_and_a_grown_file_is_welcome(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(20))
    folder = JobFolder(tmp_path / "out")
    formats = formats_of(source, id_column="key")
    parts = parts_of(folder, formats, 8)
    write(source, table(28))
    grown = parts_of(folder, formats_of(source, id_column="key"), 8)
    assert grown[:3] == parts and [part.rows for part in grown] == [8, 8, 4, 8]
    assert [part.offset for part in grown] == [0, 8, 16, 20]

    changed = table(28).to_pylist()
    changed[13]["question"] = "another"
    write(source, pa.Table.from_pylist(changed, table(1).schema))
    with pytest.raises(
        UsageError,
        match=r"rows 9 to 16 \(row group 2 of \S+ to row group 3 of \S+in\.parquet\) of \S+in\.parquet are not those",
    ):
        parts_of(folder, formats_of(source, id_column="key"), 8)
    reading = formats_of(source, id_column="key")
    with reading.source.open() as reader, pytest.raises(SourceError, match=r"rows 9 to 16 .* changed after the batch"):
        read_checked(reader, grown[1])
    write(source, table(12))
    with pytest.raises(UsageError, match=r"rows 9 to 16 .*more rows at its end are welcome"):
        parts_of(folder, formats_of(source, id_column="key"), 8)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 8)):
        write(tmp_path / "in" / f"{name}.parquet", table(8, first))
    formats = formats_of(tmp_path / "in", keep_columns=("image",))
    with formats.source.open() as reader:
        some: Any = reader
        assert some.table(0, 8, ("question",)).num_rows == 8
        write(tmp_path / "in" / "b.parquet", table(8, 100))
        with pytest.raises(SourceError, match=r"b\.parquet changed after it was first looked at"):
            some.table(8, 8, ("question",))
    with pytest.raises(SourceError, match=r"b\.parquet changed after it was first looked at"):
        formats.sink.encode(io.BytesIO(), 8, [b'{"id": 9, "text": "x"}'] * 8)


def test_parts_of_a_batch_are_an_input_themselves(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(20))
    formats, folder = formats_of(source), JobFolder(tmp_path / "out")
    finish(folder, formats, parts_of(folder, formats, 7), Replicas(folder, formats, reply))
    write(folder.finished / "other.parquet", table(1))
    with formats_of(folder.root, prompt_column="text").source.open() as reader:
        assert [json.loads(line.raw)["text"] for line in reader.lines()] == [f"<q{n}>" for n in range(20)]


def test_what_is_not_read_may_change(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(8))
    folder = JobFolder(tmp_path / "out")
    parts = parts_of(folder, formats_of(source), 8)
    write(source, table(8).set_column(2, "label", pa.array(["other"] * 8)))
    assert parts_of(folder, formats_of(source), 8) == parts


@pytest.mark.parametrize("keep", [0, 1, 9, 100])
def test_an_index_that_was_cut_off_is_found_anew_and_repeated_ids_with_it(tmp_path: Path, keep: int) -> None:
    data = table(20).set_column(1, "key", pa.array([n % 9 if n != 3 else None for n in range(20)], pa.int64()))
    source = write(tmp_path / "in.parquet", data)
    folder = JobFolder(tmp_path / "out")
    whole = parts_of(folder, formats_of(source, id_column="key"), 6)
    assert [part.repeated for part in whole] == [(), (3, 4, 5), (1, 2, 3, 4, 5), (0, 1)]  # 3 and 4 of row 13, once
    for file in (folder.index, folder.ids):
        file.write_bytes(file.read_bytes()[: -keep or None])
        assert parts_of(folder, formats_of(source, id_column="key"), 6) == whole


def test_an_interrupted_run_goes_on_and_sees_rows_that_changed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.parquet", table(12)), tmp_path / "out.parquet"
    asked: Any = {"prompt_column": "question", "keep_columns": ("image",)}
    assert answer(tokenizer, source, out, stop_after=5, **asked).interrupted and not out.exists()
    data = table(14).to_pylist()
    data[1]["question"] = "new"
    write(source, pa.Table.from_pylist(data, table(1).schema))
    fake = FakeClient(tokenizer)
    tally = answer(tokenizer, source, out, resume=True, fake=fake, **asked)
    assert 4 <= tally.resumed < 12 and len(fake.requests) == 14 - tally.resumed
    found = pq.read_table(out)
    assert found["text"].to_pylist() == [f"<{'new' if n == 1 else f'q{n}'}>" for n in range(14)]
    assert found["image"].to_pylist() == [bytes([n]) for n in range(14)]


class Full(io.RawIOBase):
    """A file on a disk that has no more room after so many bytes."""

    room = 0

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if Full.room < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.room -= len(data)
        return self._file.write(data)

    def fileno(self) -> int:
        return self._file.fileno()


@pytest.mark.parametrize("room", [0, 10, 600, 1400])
def test_a_full_disk_while_a_part_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    source = write(tmp_path / "in.parquet", table(10))
    formats, folder = formats_of(source, keep_columns=("image",)), JobFolder(tmp_path / "out")
    parts = parts_of(folder, formats, 10)
    board = Board(folder, formats)
    board.offer(parts[0])
    real = batch_folder.write_whole

    def on_a_full_disk(path: Path, what: Callable[[Any], object]) -> None:
        Full.room = room
        with batch_folder.writing(path), Full(path.with_name(f".{path.name}")) as file:
            what(file)

    monkeypatch.setattr("tpctl.batch.leases.write_whole", on_a_full_disk)
    replicas = Replicas(folder, formats, reply)
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        replicas.work()
    assert not folder.parts()
    assert all(name.startswith(".") or name.endswith(".sums") for name in names(folder.finished))
    monkeypatch.setattr("tpctl.batch.leases.write_whole", real)
    board.give_back([name for held in board.holders().values() for name in held], died=False)
    computed = []
    replicas.answer = lambda line: computed.append(line) or reply(line)
    replicas.work()
    board.collect()
    assert not computed and parts_read(folder)["text"].to_pylist() == [f"<q{n}>" for n in range(10)]
    assert not left_over(folder)


def test_memory_holds_one_row_group_and_a_part_of_large_rows_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.parquet", table(60), group=10)
    held = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, at, **how: held.append((at, how["columns"])) or real(self, at, **how),
    )
    formats = formats_of(source)
    with formats.source.open() as reader:
        assert len(list(reader.lines())) == 60
        assert held == [(at, ["question"]) for at in range(6)]
        held_now: Any = reader
        assert [table.num_rows for _, table in held_now._held.values()] == [10]
    monkeypatch.setattr(parquet, "LARGEST", 200)
    parts = parts_of(JobFolder(tmp_path / "out"), formats, 50)
    assert max(part.rows for part in parts) < 20 and sum(part.rows for part in parts) == 60


def test_a_large_file_is_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_sink, "_ROWS", 4)
    monkeypatch.setattr(parquet_sink, "_WHOLE_ROWS", 8)
    source = write(tmp_path / "in.parquet", table(22))
    formats, folder = formats_of(source, keep_columns=("label",)), JobFolder(tmp_path / "out")
    board = finish(folder, formats, parts_of(folder, formats, 5), Replicas(folder, formats, reply))
    whole = tmp_path / "whole.parquet"
    assemble(folder, formats.sink, whole, len(board.done), lambda: None)
    sizes = [pq.read_metadata(whole).row_group(at).num_rows for at in range(pq.read_metadata(whole).num_row_groups)]
    assert sizes == [10, 10, 2] and pq.read_table(whole)["label"].to_pylist() == [n % 3 for n in range(22)]


def test_the_plan_knows_its_size_before_it_is_made(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(30))
    folder = JobFolder(tmp_path / "out")
    folder.make()
    plan = Plan(folder, formats_of(source), Division(7))
    assert (plan.size, plan.end, plan.rows) == (30, 0, 0)
    plan._run()
    assert sum(part.rows for part in plan.ready()) == 30 == plan.end
    assert [Part.from_json(value).offset for value in json_lines(folder.index)] == [0, 7, 14, 21, 28]
    leases = Leases(folder, formats_of(source), "r")
    leases.close()


def test_rows_that_begin_alike_are_shared_out_as_lines_are(tmp_path: Path) -> None:
    texts = [f"document {n % 6} {'x' * 300} question {n}" for n in range(60)]
    source = write(tmp_path / "in.parquet", pa.table({"question": texts, "key": [f"k{n}" for n in range(60)]}))
    formats, folder = formats_of(source, id_column="key"), JobFolder(tmp_path / "out")
    assert division_of(formats, 2).sharing.shares > 1
    parts = parts_of(folder, formats, 30, Sharing(4, 256))
    assert all(len(part.shares) == 4 and sum(part.shares) == part.rows for part in parts)
    board = finish(folder, formats, parts, Replicas(folder, formats, reply))
    assert board.sums.rows == 60 and not left_over(folder)
    assert parts_read(folder)["text"].to_pylist() == [f"<{text}>" for text in texts]
