"""An input as parts: every line in one of them, found again, and what changed is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batch_runs import numbered
from tests.unit.fake_client import job_parser, write_tokenizer
from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import plain
from tpctl.batch.formats.ids import Ids, id_of, keys_of
from tpctl.batch.formats.place import Part, read_checked
from tpctl.batch.plan import PARTS_EACH, Division, Plan, division_of
from tpctl.client.jobs import Line
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import SourceError, TpctlError, UsageError


def plan(folder: JobFolder, prompts: Path, rows: int = 3) -> list[Part]:
    """All parts, found in this thread."""
    folder.make()
    found = Plan(folder, plain(prompts), Division(rows))
    found._run()
    parts = list(found.ready())
    assert found.whole and found.rows == sum(part.rows for part in parts)
    return parts


def lines_of(parts: list[Part], prompts: Path) -> list[Line]:
    with plain(prompts).source.open() as reader:
        return [line for part in parts for line in read_checked(reader, part)]


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "out")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


TEXTS = st.lists(st.sampled_from([b"a", b"", b"  ", b'{"id": 3}', b"\xe2\x80\xa8x", b"b\r", b"\x0c"]), max_size=30)


@given(TEXTS, TEXTS, st.booleans(), st.integers(1, 4))
def test_parts_hold_every_line_as_one_reader_finds_them_also_when_the_input_grows(
    tmp_path_factory: pytest.TempPathFactory, first: list[bytes], more: list[bytes], ended: bool, rows: int
) -> None:
    scratch = tmp_path_factory.mktemp("plan")
    prompts, folder = scratch / "p", JobFolder(scratch / "out")
    prompts.write_bytes(b"\n".join(first) + (b"\n" if ended and first else b""))
    for grown in (b"", b"\n" + b"\n".join(more) if not ended else b"\n".join(more)):
        with prompts.open("ab") as file:
            file.write(grown)
        parts = plan(folder, prompts, rows)
        with prompts.open("rb") as stream:
            wanted = [(line.index, line.number, line.raw.strip()) for line in numbered(stream)]
        assert [(line.index, line.number, line.raw.strip()) for line in lines_of(parts, prompts)] == wanted
        assert [part.number for part in parts] == list(range(len(parts)))
        assert all(0 < part.rows <= rows for part in parts)


def test_a_last_line_that_grew_and_an_earlier_one_that_changed_are_refused(folder: JobFolder, tmp_path: Path) -> None:
    prompts = tmp_path / "p"
    prompts.write_text("a\nb\nc\nd\ne")
    plan(folder, prompts)
    prompts.write_text("a\nb\nc\nd\nee")
    with pytest.raises(UsageError, match=r"lines 4 to 5 of .*p are not those that .*out was begun with"):
        plan(folder, prompts)
    prompts.write_text("a\nB\nc\nd\ne")
    with pytest.raises(UsageError, match="lines 1 to 3 of"):
        plan(folder, prompts)
    prompts.write_text("a\nb\n")
    with pytest.raises(UsageError, match="lines 1 to 3 of"):
        plan(folder, prompts)


def test_a_replica_reads_no_line_that_changed_meanwhile(folder: JobFolder, tmp_path: Path) -> None:
    prompts = tmp_path / "p"
    prompts.write_text("a\nb\n")
    parts = plan(folder, prompts)
    prompts.write_text("a\nx\n")
    with pytest.raises(SourceError, match=r"lines 1 to 2 of .*p changed after the batch began"):
        lines_of(parts, prompts)


@pytest.mark.parametrize("keep", [0, 1, 5, 8, 100])
def test_an_index_that_was_cut_off_anywhere_is_found_anew(folder: JobFolder, tmp_path: Path, keep: int) -> None:
    prompts = tmp_path / "p"
    prompts.write_text("".join(f'{{"id": {n % 7}}}\n' for n in range(10)))
    whole = plan(folder, prompts)
    assert [part.repeated for part in whole] == [(), (), (1, 2), (0,)]
    for file in (folder.index, folder.ids):
        file.write_bytes(file.read_bytes()[: -keep or None])
        assert plan(folder, prompts) == whole


def test_small_inputs_are_divided_for_all_replicas(tmp_path: Path) -> None:
    prompts = tmp_path / "p"
    prompts.write_text("x\n" * 100)
    assert division_of(plain(prompts), 4) == Division(-(-100 // (4 * PARTS_EACH)))
    prompts.write_text("x\n" * 40000)
    assert division_of(plain(prompts), 4) == Division(1000)
    prompts.write_text("\n")
    assert division_of(plain(prompts), 4) == Division(1)


@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=12))
def test_ids_that_were_used_before_are_found(runs: list[list[int]]) -> None:
    ids, seen = Ids(), set()
    for run in runs:
        wanted = []
        for place, key in enumerate(run):
            if key in seen or key in run[:place]:
                wanted.append(place)
        seen.update(run)
        assert ids.add(np.array(run, dtype=np.uint64)) == wanted


IDS = st.one_of(
    st.integers(-(2**70), 2**70), st.text(max_size=5), st.none(), st.booleans(), st.floats(allow_nan=False), st.just([])
)


@given(IDS, st.booleans(), st.booleans())
def test_a_lines_id_is_the_one_that_the_parser_finds(
    tokenizer: Tokenizer, id: object, first: bool, ascii: bool
) -> None:
    entry = {"id": id, "prompt": "x"} if first else {"prompt": 'x "id": 5,', "id": id}
    raw = json.dumps(entry, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    assert id_of(raw, 9) == job_parser(tokenizer).parse(Line(0, 9, raw)).id
    assert len(keys_of([(9, raw)])) == 1


@pytest.mark.parametrize(
    ("raw", "id"),
    [
        (b"{", 9),
        (b"[]", 9),
        (b'{"id": 5', 9),
        (b'{"\\u0069d": 5}', 5),
        (b' {"id":"a\\u0062"}', "ab"),
        (b'{"id": "\xff"}', 9),
        (b'{"id": 007}', 9),
        (b"[" * 100_000, 9),
    ],
)
def test_ids_of_strange_lines(raw: bytes, id: str | int) -> None:
    assert id_of(raw, 9) == id


def test_equal_numbers_with_and_without_an_id_are_equal() -> None:
    assert keys_of([(7, b"{}")]) == keys_of([(1, b'{"id": 7}')]) != keys_of([(1, b'{"id": "7"}')])


def test_an_input_that_vanishes_is_said(folder: JobFolder, tmp_path: Path) -> None:
    prompts = tmp_path / "p"
    prompts.write_text("a\n")
    folder.make()
    found = Plan(folder, plain(prompts), Division(3))
    prompts.unlink()
    found._run()
    with pytest.raises((OSError, TpctlError)):
        list(found.ready())
