"""What files and names of others do on a terminal: nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.cli.app import LONGEST, main
from tpctl.cli.console import byte_progress, note, print_json, say, status
from tpctl.errors import counted, json_printable, printable, shown


def test_what_steers_is_shown_and_letters_stay() -> None:
    assert printable("\x1b[31m\r\n\x07\x9b\u202e\u2028\ud800") == r"\x1b[31m\r\n\x07\x9b\u202e\u2028\ud800"
    for text in ("plain", "naïve 東京 🤖 👩‍💻 نص", "C:\\x1b"):
        assert printable(text) == text


@given(value=st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_stays_what_it_is(value: object) -> None:
    text = json_printable(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert printable(text) == text


def test_notes_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2J\nb")
    note("first\x07\nsecond")
    print_json({"a": "\x9b"})
    out, err = capsys.readouterr()
    assert out == 'a\\x1b[2J\\nb\n{\n  "a": "\\u009b"\n}\n'
    assert err == "first\\x07\nsecond\n"


def test_counts_are_in_number() -> None:
    assert [counted(number, "file") for number in (0, 1, 2, 1000)] == ["0 files", "1 file", "2 files", "1,000 files"]


def test_a_value_is_shown_however_deep_it_is_and_named_where_a_number_is_too_long() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == 39 * "[" + "…"
    assert len(shown("x" * 10**6)) == 40


@pytest.mark.parametrize("name", ["mo[/del]", "mo[bold]", "mo:smile:", "mo[link=x]"])
@pytest.mark.parametrize("command", ["plan ./{}", "shard ./{} --tp 2 -o out"])
def test_brackets_and_colons_of_names_are_no_markup(
    tmp_path: Path, name: str, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / name, make_config(num_hidden_layers=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tpctl", *command.format(name).split()])
    with mock.patch("signal.signal"), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"./{name}" in capfd.readouterr().out


def test_nor_are_they_in_bars_and_spinners(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with byte_progress("downloading a[/b]\x07") as progress:
        progress(1, 2, "c[/d].safetensors")
    with status("loading a[/b]\x07"):
        pass
    assert "\x07" not in capfd.readouterr().err


def test_a_message_is_one_line_however_long_a_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[31m\n" + "x" * 10_000
    monkeypatch.setattr(sys, "argv", ["tpctl", "plan", name])
    with mock.patch("signal.signal"), pytest.raises(SystemExit) as ended:
        main()
    err = capfd.readouterr().err
    assert ended.value.code == 1
    assert err.count("\n") == 1 and "\x1b" not in err and len(err) < LONGEST + 100


def test_of_a_long_value_only_the_beginning_is_looked_at() -> None:
    """A server says what is wrong with a list of millions on its event loop."""

    class Unseen(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(len(self)):
                assert number < 100
                yield 123

    assert shown(Unseen([123] * 1_000_000)) == "[123, 123, 123, 123, 123, 123, 123, 123…"
    assert shown({"a": Unseen([1] * 1000)}) == '{"a": [' + "123, " * 6 + "12…"
