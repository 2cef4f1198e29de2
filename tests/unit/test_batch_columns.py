"""Which columns and files a batch takes, what is kept of them, and what is said of those that cannot be used."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.unit.batch_formats_run import answer, read_lines, write_lines
from tests.unit.batch_replicas import Replicas, finish, parts_of
from tests.unit.batch_tables import formats_of, parts_read, reply, table, write
from tests.unit.fake_client import write_tokenizer
from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import Asked, choose
from tpctl.cli.batch_formats import refuse_among_input
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import OutputError, SourceError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_without_ids_rows_have_their_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(9))
    folder = JobFolder(tmp_path / "out")
    formats = formats_of(source)
    finish(folder, formats, parts_of(folder, formats, 4), Replicas(folder, formats, reply))
    assert parts_read(folder)["id"].to_pylist() == list(range(1, 10))
    assert not folder.ids.read_bytes()
    nulls = write(tmp_path / "nulls.parquet", pa.table({"prompt": ["a", "b"], "id": pa.array([7, None], pa.int64())}))
    assert answer(tokenizer, nulls, tmp_path / "out.parquet").errors == 1
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (found[0]["id"], found[1]["id"], found[1]["error"]) == (
        7,
        None,
        "row 2 has no id, which ids are to come from",
    )


def test_messages_in_a_column(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": "Hi", "name": None}], [{"role": "user", "content": "Yo", "name": None}]]
    source = write(tmp_path / "in.parquet", pa.table({"messages": talk}))
    formats = choose(str(source), "out.jsonl", Asked(), "m").formats()
    with formats.source.open() as reader:
        assert reader.mentions("messages") and not reader.mentions("chat_template_kwargs")
    answer(tokenizer, source, tmp_path / "out.jsonl")
    assert [row["text"] for row in read_lines(tmp_path / "out.jsonl")] == ["<[u]Hi[a]>", "<[u]Yo[a]>"]


def test_from_tables_to_lines_and_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(5).drop(["image", "when"]))
    lines = tmp_path / "out.jsonl"
    answer(tokenizer, source, lines, prompt_column="question", keep_columns="all", answer_column="answer")
    rows = read_lines(lines)
    assert rows[4] == {
        "id": 5,
        "answer": "<q4>",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "question": "q4",
        "key": "k4",
        "label": 1,
        "tags": ["4", None],
        "nested": {"a": 4, "b": None},
        "price": 2.0,
    }
    assert rows[2]["price"] is None  # NaN
    back = tmp_path / "back.parquet"
    answer(tokenizer, lines, back, prompt_column="question", id_column="key")
    assert pq.read_table(back).select(["id", "text"]).to_pylist()[0] == {"id": "k0", "text": "<q0>"}
    scored = write_lines(tmp_path / "scored.jsonl", [{"prompt": "a", "logprobs": 1}, {"id": 7, "prompt": "b"}])
    answer(tokenizer, scored, back.with_name("scored.parquet"))
    found = pq.read_table(back.with_name("scored.parquet")).to_pylist()
    assert [row["id"] for row in found] == ["1", "7"] and found[0]["logprobs"][0]["token"] == "<"
    sink = choose(str(scored), "o.parquet", Asked(), "m").formats().sink
    (score, *_), *_ = (row.get("logprobs", [None]) for row in sink.decode(back.with_name("scored.parquet")))
    assert score["top"] == [{"id": score["id"], "token": "<", "logprob": -0.5}]


def test_kept_fields_of_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = write_lines(
        tmp_path / "in.jsonl",
        [{"id": "a", "prompt": "x", "label": [1], "max_tokens": 2}, {"prompt": "y", "more": 1}, "no"],
    )
    answer(tokenizer, prompts, tmp_path / "out.jsonl", keep_columns=("label",))
    kept, unknown, broken = read_lines(tmp_path / "out.jsonl")
    assert (kept["label"], kept["completion_tokens"]) == ([1], 2)
    assert "unknown field 'more'" in unknown["error"] and unknown["label"] is None
    assert "is not JSON" in broken["error"]
    answer(tokenizer, prompts, tmp_path / "all.jsonl", prompt_column="prompt", keep_columns="all")
    kept, other, _ = read_lines(tmp_path / "all.jsonl")
    assert kept["completion_tokens"] == 4 and kept["max_tokens"] == 2 and other["more"] == 1
    write_lines(prompts, [{"prompt": "x", "error": 5}])
    answer(tokenizer, prompts, tmp_path / "taken.jsonl", prompt_column="prompt", keep_columns="all")
    assert (
        '"error" is kept, and what answers\' rows have is called so' in read_lines(tmp_path / "taken.jsonl")[0]["error"]
    )


def test_kept_fields_of_lines_over_parts_with_errors_that_are_tried_again(tmp_path: Path) -> None:
    lines = [{"question": f"q{n}", "key": f"k{n}", "text": n, "tags": [n]} for n in range(10)]
    prompts = write_lines(tmp_path / "in.jsonl", lines)
    asked: Any = {"id_column": "key", "keep_columns": ("text", "tags"), "answer_column": "answer"}
    formats, folder = formats_of(prompts, **asked), JobFolder(tmp_path / "out")
    replicas = Replicas(folder, formats, reply)
    replicas.answer = lambda line: {**reply(line), "error": "no"} if line.number == 4 else reply(line)
    parts = parts_of(folder, formats, 10)
    assert finish(folder, formats, parts, replicas).sums.errors == 1
    board = Board(folder, formats)
    board.reopen(parts[0])
    replicas.answer = reply
    replicas.work()
    board.collect()
    rows = read_lines(folder.part(0))
    assert [(row["id"], row["answer"], row["text"], row["tags"]) for row in rows] == [
        (f"k{n}", f"<q{n}>", n, [n]) for n in range(10)
    ]
    assert not any("error" in row or "kept" in row for row in rows)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt_column": "nope"}, r'in\.parquet has no column "nope"; it has "question", "key", "label", "image"'),
        ({"prompt_column": None}, r"has neither a column prompt nor one of messages; say with --prompt-column"),
        (
            {"prompt_column": "label"},
            r'column "label" of .*in\.parquet is int8; prompts are texts, or lists of messages',
        ),
        ({"prompt_column": "tags"}, r'column "tags" of .*in\.parquet is list<.*string>; prompts are texts'),
        ({"id_column": "price"}, r'column "price" of .*in\.parquet is float; ids are texts or whole numbers'),
        ({"id_column": "x"}, r'has no column "x"'),
        ({"keep_columns": ("key", "x")}, r'has no column "x"'),
        ({"keep_columns": ("key",), "answer_column": "key"}, r'column "key" is kept, and what answers. rows have'),
        (
            {"keep_columns": ("image",), "output_format": "jsonl"},
            r'column "image" of .* is binary, which JSON has no form',
        ),
        (
            {"keep_columns": ("when",), "output_format": "jsonl"},
            r'column "when" of .* is timestamp\[ms, tz=UTC\], which',
        ),
    ],
)
def test_columns_that_cannot_be_used_are_one_line(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    source = write(tmp_path / "in.parquet", table(3))
    with pytest.raises(SourceError, match=said):
        formats_of(source, **asked)


def test_files_that_cannot_be_used_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", table(200), group=100)
    raw = source.read_bytes()
    for broken in (raw[:-40], b"PAR1", raw[:-8] + b"\xff\xff\xff\x7fPAR1", b""):
        source.write_bytes(broken)
        with pytest.raises(SourceError, match=r"in\.parquet is no Parquet file, or a damaged one: ") as error:
            formats_of(source)
        assert "\n" not in str(error.value)
    place = pq.read_metadata(io.BytesIO(raw)).row_group(1).column(0).data_page_offset
    source.write_bytes(raw[:place] + bytes(byte ^ 255 for byte in raw[place : place + 60]) + raw[place + 60 :])
    formats = formats_of(source)  # its end is whole
    with pytest.raises(SourceError, match=r"row group 1 of .*in\.parquet") as error, formats.source.open() as reader:
        list(reader.lines())
    assert "\n" not in str(error.value)
    other = tmp_path / "two"
    write(other / "a.parquet", table(2))
    write(other / "b.parquet", table(2).set_column(0, "question", pa.array([1, 2])))
    with pytest.raises(SourceError, match=r'column "question" is int64 in .*b\.parquet, and string in .*a\.parquet'):
        formats_of(other)
    write(other / "b.parquet", table(2).drop(["question"]))
    with pytest.raises(SourceError, match=r'b\.parquet has no column "question"'):
        formats_of(other)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["question", "question"])
    with pytest.raises(SourceError, match='has two columns that are called "question"'):
        formats_of(write(tmp_path / "twice.parquet", twice))
    with pytest.raises(SourceError, match="a column prompt and one of messages; say with --prompt-column"):
        formats_of(write(tmp_path / "both.parquet", pa.table({"prompt": ["a"], "messages": ["b"]})), prompt_column=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty is a folder without Parquet files; give a file of prompts"):
        formats_of(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").touch()
    with pytest.raises(SourceError, match="empty is a model's folder, not a file of prompts; give it with --model"):
        formats_of(tmp_path / "empty")
    with pytest.raises(SourceError, match=r"no file is called .*none-\*\.parquet"):
        formats_of(tmp_path / "none-*.parquet")
    with pytest.raises(SourceError, match=r"cannot read .*absent\.parquet: No such file or directory"):
        formats_of(tmp_path / "absent.parquet")


def test_options_that_contradict_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.parquet", table(3))
    lines = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "label": 1}])
    for prompts, out, asked, said in [
        (source, "-", {"output_format": "parquet"}, "Parquet is no stream; name a file or a folder"),
        ("-", "o", {"input_format": "parquet"}, "Parquet is read by rows' places; give a file in place of -"),
        (
            "-",
            "o.parquet",
            {"prompt_column": None},
            "Parquet is written for what is read from a file",
        ),
        (
            lines,
            "o.parquet",
            {"prompt_column": "prompt", "keep_columns": ("label",)},
            "--keep-columns has no types",
        ),
        (source, "o", {"keep_columns": ("a", "")}, "a column's name is empty"),
        (source, "o", {"answer_column": "error"}, "--answer-column error is what rows have already"),
    ]:
        with pytest.raises(UsageError, match=said):
            formats_of(prompts, out, **asked)
    with pytest.raises(SourceError, match=r'no line of .*in\.jsonl has a field "text"; they have "prompt", "label"'):
        choose(str(lines), "o", Asked(prompt_column="text"), "m")
    inputs = write(tmp_path / "in" / "a.parquet", table(3)).parent
    for out in (inputs / "rows.parquet", inputs / "rows", inputs / "a.parquet"):
        with pytest.raises(OutputError, match="would be among the files of"):
            refuse_among_input(choose(str(inputs), str(out), Asked(prompt_column="question"), "m"), str(out))
    refuse_among_input(choose(str(inputs), "elsewhere/", Asked(prompt_column="question"), "m"), "elsewhere/")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UsageError, match=r"Parquet needs pyarrow, which is not installed; `pip install 'tpctl\[data\]'`"
    ):
        formats_of(source)
    (tmp_path / "shards").mkdir()
    with pytest.raises(SourceError, match="shards is a folder without Parquet files"):
        formats_of(tmp_path / "shards")


class FakeHub(MemoryFileSystem):
    """Stands in for huggingface_hub's file system, which cannot be reached: the Hub's names over files in memory."""

    protocol = ("hf",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("hf:/")))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", FakeHub, clobber=True)
    FakeHub.store.clear()
    yield FakeHub()
    fsspec.register_implementation("hf", real, clobber=True)


def test_a_data_set_of_the_hub_is_read_as_files_are(hub: FakeHub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, first in (("b", 5), ("a", 0)):
        path = write(tmp_path / f"{name}.parquet", table(5, first), group=2)
        hub.pipe_file(f"/datasets/org/set/data/train-{name}.parquet", path.read_bytes())
    hub.pipe_file("/datasets/org/set/README.md", b"a card")
    name = "hf://datasets/org/set"
    formats, folder = formats_of(name, keep_columns=("image",)), JobFolder(tmp_path / "out")
    finish(folder, formats, parts_of(folder, formats, 4), Replicas(folder, formats, reply))
    assert parts_read(folder)["text"].to_pylist() == [f"<q{n}>" for n in range(10)]
    assert parts_read(folder)["image"].to_pylist() == [bytes([n]) for n in range(10)]
    for narrower in (f"{name}/data/*-a.parquet", f"{name}/data/train-a.parquet", f"{name}/data"):
        with formats_of(narrower).source.open() as reader:
            assert reader.size == (10 if narrower.endswith("data") else 5)
    for wrong in ("hf://datasets/org/none", f"{name}/data/*.csv"):
        with pytest.raises(
            SourceError, match="names no Parquet files; see what the data set has, or add @refs/convert/parquet"
        ):
            formats_of(wrong)
    hub.pipe_file("/datasets/org/set/data/train-a.parquet", b"")
    with pytest.raises(SourceError, match=r"train-a\.parquet is no Parquet file, or a damaged one"):
        formats_of(name)


def test_a_hub_that_cannot_be_reached_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, path: str) -> bool:
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(FakeHub, "isdir", broken)
    with pytest.raises(SourceError, match="cannot read hf://datasets/org/set: no route to the Hub"):
        formats_of("hf://datasets/org/set")


def test_a_number_that_json_does_not_know_in_a_kept_field_is_null_and_ends_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = ['{"prompt": "a", "price": NaN, "all": {"of": [1.5, Infinity]}}', '{"prompt": 7, "price": -Infinity}']
    source = write_lines(tmp_path / "in.jsonl", lines)
    assert answer(tokenizer, source, tmp_path / "out.jsonl", keep_columns="all").errors == 1
    rows = read_lines(tmp_path / "out.jsonl")
    assert (rows[0]["text"], rows[0]["price"], rows[0]["all"]) == ("<a>", None, {"of": [1.5, None]})
    assert "prompt is 7" in rows[1]["error"] and rows[1]["price"] is None


@pytest.mark.parametrize("column", ["prompt", "id", "messages"])
def test_a_text_that_is_no_utf8_is_its_rows_error_alone(tokenizer: Tokenizer, tmp_path: Path, column: str) -> None:
    texts = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    data = {"prompt": ["a", "b", "c"], "id": ["a", "b", "c"], column: texts}
    if column == "messages":
        message = pa.StructArray.from_arrays([pa.array(["user"] * 3), texts], ["role", "content"])
        data = {"messages": pa.ListArray.from_arrays([0, 1, 2, 3], message), "id": ["a", "b", "c"]}
    source = write(tmp_path / "in.parquet", pa.table(data))
    assert answer(tokenizer, source, tmp_path / "out.parquet").errors == 1
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["a", None if column == "id" else "b", "c"]
    assert "is not valid Unicode" in rows[1]["error"] and rows[0]["text"] and rows[2]["text"]
    spec = choose(str(source), "rows/", Asked(), "m")
    assert spec is not None
    assert [part.repeated for part in parts_of(JobFolder(tmp_path / "out"), spec.formats(), 3)] == [()]
