"""JSON files of checkpoints: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig
from tpctl.errors import CheckpointError
from tpctl.json_file import MOST_BYTES, parse, read_object


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),  # a byte order mark, as Windows' editors write
        (b'{"a": 1, "b": [2], "a": 1}', {"a": 1, "b": [2]}),
        (b'{"model_max_length": 1000000000000000019884624838656}', {"model_max_length": int(1e30)}),
        ("[" * 60 + "]" * 60, None),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ("Infinity", float("inf")),
    ],
)
def test_what_is_read(raw: bytes | str, value: Any) -> None:
    found = parse(raw if isinstance(raw, bytes) else raw.encode(), "x.json")
    assert value is None or found == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is not valid JSON: Expecting property name"),
        (b"", "is not valid JSON"),
        (b"\xff", r"is not UTF-8 text \(byte 0 is 0xff\)"),
        (b"[" * 100_000, "is nested more than 64 levels deep"),
        (b"[" * 100 + b"]" * 100, "is nested more than 64 levels deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested more than 64 levels deep"),
        (b"9" * 401, "a number has 401 digits, more than 400"),
        (b"-" + b"9" * 100_000, "a number has 100001 digits"),
        (b'{"a": 1, "a": 2}', '"a" occurs twice, as 1 and as 2'),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^x.json .*{message}") as caught:
        parse(raw, "x.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder, but must be a regular file"):
        read_object(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a pipe, but must be a regular file"):
        read_object(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_object(tmp_path / "none")
    assert read_object(tmp_path / "none", default={}) == {}
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"has {MOST_BYTES + 1} bytes, but such a file has at most {MOST_BYTES}"):
        read_object(tmp_path / "large")
    for text, kind in (
        ("[]", "a list"),
        ('"x"', "a text"),
        ("null", "null"),
        ("true", "true or false"),
        ("3", "a number"),
    ):
        (tmp_path / "other").write_text(text)
        with pytest.raises(CheckpointError, match=f"holds {kind}, but a JSON object is needed"):
            read_object(tmp_path / "other")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_configs_are_read_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()), encoding="utf-8-sig")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8-sig")
    assert ModelConfig.load(tmp_path).eos_token_ids == (7,)
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=f"{name} is nested more than 64 levels deep"):
        ModelConfig.load(tmp_path)
