"""Faults that users met, through the command line alone: nothing of tpctl is imported, so any version can be tried."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.processes import with_variable
from tests.tiny import SIZES, make_broken, make_checkpoint
from tests.unit.bad_input import local_answer

PATIENCE = 120.0  # seconds; what hung took ten minutes, or for ever
BROKEN = 8  # the token whose embedding is NaN
LINES: list[dict[str, Any]] = [
    {"id": "nan", "prompt": f"w{BROKEN} w6"},
    {"id": "fine", "prompt": "w7 w9", "logprobs": 1},
    {"id": "null", "prompt": "w7 w9", "temperature": None, "stop": None, "seed": None},
    {"id": "apart", "prompt": "w7 w9", "presence_penalty": 2.0, "frequency_penalty": 2.0, "min_tokens": 6},
]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def tpctl(*arguments: str | Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpctl", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def said(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.stderr
    assert result.stderr.startswith("tpctl: ")
    return result.stderr


def add_tokenizer(folder: Path, template: str = "{{ messages[0].content }}") -> Path:
    """Words, each with the space before it, as sentencepiece has them."""
    names = ["<unk>", "<s>", "</s>", *(f"▁w{number}" for number in range(3, SIZES["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_broken("llama2", folder, BROKEN)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def answered(model: Path) -> subprocess.CompletedProcess[str]:
    """A run of ``LINES``."""
    lines = "".join(json.dumps({"max_tokens": 6, **line}) + "\n" for line in LINES)
    return tpctl("batch", "-", "--model", model, "--device", "cpu", "--dtype", "float32", stdin=lines)


def rows(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The rows of a run, by their ids."""
    found = [json.loads(row) for row in result.stdout.splitlines()]
    assert len(found) == len(LINES), result.stderr
    return {row["id"]: row for row in found}


@pytest.mark.slow
def test_scores_that_are_no_numbers_are_an_error_of_their_request(answered: subprocess.CompletedProcess[str]) -> None:
    found = rows(answered)
    assert answered.returncode == 1 and found["nan"]["error"] and not found["nan"].get("text")
    assert "NaN" not in answered.stdout.replace(json.dumps(found["nan"]["error"]), "")  # which is no JSON
    assert "error" not in found["fine"] and len(found["fine"]["text"].split()) == 6


@pytest.mark.slow
def test_the_first_space_of_a_completion_is_kept(answered: subprocess.CompletedProcess[str]) -> None:
    row = rows(answered)["fine"]
    words = row["text"].split()
    assert row["text"] == "".join(f" {word}" for word in words)
    assert [entry["token"] for entry in row["logprobs"]] == [f" {word}" for word in words]


@pytest.mark.slow
def test_null_is_not_given_and_penalties_are(answered: subprocess.CompletedProcess[str]) -> None:
    found = rows(answered)
    assert found["null"].get("text") == found["fine"]["text"]
    assert "error" not in found["apart"] and len(set(found["apart"]["text"].split())) == 6


def test_values_beyond_the_range_of_a_cast_are_refused(tmp_path: Path) -> None:
    wide = make_checkpoint("llama2", tmp_path / "model")
    wide.model.norm.weight.data[3] = 70_000.0
    wide.save_pretrained(tmp_path / "model")
    line = said(tpctl("shard", tmp_path / "model", "--tp", "1", "--dtype", "float16", "-o", tmp_path / "out"))
    assert "model.norm.weight" in line and "70000" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_launcher_around_the_command_is_not_heard(model: Path) -> None:
    around = {"PET_NNODES": "2", "WORLD_SIZE": "2", "RANK": "1"}
    lines = '{"prompt": "w7", "max_tokens": 2}\n'
    result = tpctl("batch", "-", "--model", model, "--tp", "2", "--device", "cpu", stdin=lines, **around)
    assert result.returncode == 0 and len(json.loads(result.stdout)["text"].split()) == 2, result.stderr


@pytest.mark.slow
def test_a_rank_that_dies_while_the_chat_is_idle_is_told_at_once(model: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        command = [sys.executable, "-m", "tpctl", "chat", str(model), "--device", "cpu", "--max-tokens", "4"]
        command += ["--temperature", "0"]  # else the answer ends at once now and then
        env = {**os.environ, "TERM": "xterm", "TPCTL_CACHE": str(tmp_path / "cache")}
        chat = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr, env=env, start_new_session=True)
    try:
        _until(ours, rb">")  # the prompt
        _until(ours, None)
        os.write(ours, b"w7 w9\r")
        _until(ours, rb"w7 w9.*\bw\d+( w\d+){3}")
        (worker,) = with_variable(f"TPCTL_PARENT_PID={chat.pid}")
        _until(ours, None)
        os.kill(worker, signal.SIGKILL)
        assert chat.wait(PATIENCE) == 1  # it would wait for a message for ever
    finally:
        chat.kill()
        chat.wait()
        os.close(theirs)
        os.close(ours)
    assert "rank 0 was killed (SIGKILL)" in errors.read_text()


def _until(terminal: int, pattern: bytes | None) -> None:
    """Read what a program shows until it matches, or for ``None`` until nothing more comes."""
    shown, deadline = b"", time.monotonic() + PATIENCE
    while pattern is None or not re.search(pattern, shown, re.DOTALL):
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 1 << 16)
        elif pattern is None:
            return


def test_a_template_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 10 s, of which it is spared most."""
    make_checkpoint("llama2", tmp_path)
    begin = "import tpctl.client.template_worker as worker; worker.SECONDS = 0.3; worker.main()"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: real([command[0], "-c", begin], **rest))
    answer = local_answer(f"chat {add_tokenizer(tmp_path, LOOP)} -m w7 --device cpu", tmp_path)
    assert (answer.code, answer.out) == (1, "") and answer.err.startswith("tpctl: ")
    assert answer.err.count("\n") == 1 and "chat_template.jinja took more than 10 s" in answer.err


@pytest.mark.parametrize("text", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 1_000_000])
def test_a_manifest_that_is_nested_deeply_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tpctl.json").write_text(text)
    assert "tpctl.json" in said(tpctl("inspect-shards", tmp_path))


@pytest.mark.parametrize(
    "index",
    [b'{"weight_map": {"a": 5}}', b'{"weight_map": 7}', b"5", b"[" * 100_000, b'{"weight_map": {"a": "\\u0000"}}'],
)
def test_an_index_that_is_none_is_one_line(tmp_path: Path, index: bytes) -> None:
    make_checkpoint("llama2", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "part.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(index)
    line = said(tpctl("shard", tmp_path / "model", "--tp", "1", "-o", tmp_path / "out"))
    assert "model.safetensors.index.json" in line


def test_a_config_that_is_nested_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "config.json" in said(tpctl("plan", tmp_path))


def test_a_token_with_curly_quotes_is_one_line(tmp_path: Path) -> None:
    around = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "\u201chf_x\u201d"}
    assert "HF_TOKEN" in said(tpctl("download", "org/model", **around))


def test_an_output_that_is_a_loop_of_links_is_one_line(tmp_path: Path) -> None:
    make_checkpoint("llama2", tmp_path / "model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in said(tpctl("shard", tmp_path / "model", "--tp", "1", "-o", tmp_path / "loop"))
