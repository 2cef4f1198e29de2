"""What commands are given by name: empty names, names that are not UTF-8, and what lies where a file should be."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.cli import app as app_module
from tpctl.errors import OutputError
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint

Run = Callable[..., tuple[int, str]]
"""``tpctl ARGUMENTS``: the exit code, and the one line on stderr."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tpctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("tpctl: "), (out, err)
        return int(ended.value.code or 0), err.removeprefix("tpctl: ").rstrip("\n")

    return command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shard", "", "--tp", "2"], "MODEL is empty; give it a value"),
        (["shard", "model", "--tp", "2", "-o", ""], "-o is empty; give it a value, or leave it out"),
        (["shard", "model", "--tp", "2", "-o", "", "--force"], "-o is empty"),
        (["reshard", "two", "--tp", "3", "-o", "", "--force"], "-o is empty; give it a value"),
        (["merge", "two", "--output=", "--force"], "-o is empty; give it a value"),
        (["merge", "", "-o", "x"], "FOLDER is empty"),
        (["inspect-shards", ""], "FOLDER is empty"),
        (["inspect-shards", "two", "--html", ""], "--html is empty"),
        (["inspect-shards", "two", "--source", ""], "--source is empty"),
        (["batch", ""], "PROMPTS is empty"),
        (["batch", "in", "-o", ""], "-o is empty"),
        (["batch", "in", "--model", ""], "--model is empty"),
        (["chat", ""], "MODEL is empty; give it a value, or leave it out"),
        (["chat", "--chat-template", ""], "--chat-template is empty"),
        (["plan", ""], "MODEL is empty"),
        (["download", "org/x", "--revision", ""], "--revision is empty"),
        (["download", "org/x", "-o", ""], "-o is empty"),
        (["upload", "", "org/x"], "FOLDER is empty"),
        (["bench", "latency", ""], "MODEL is empty"),
    ],
)
def test_what_is_empty_is_no_name_of_this_folder(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "own.txt").write_text("mine")
    code, line = run(*arguments)
    assert code == 2 and line.startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_paths_that_are_not_utf_8(run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "tiny\udc80"
    shutil.copytree(model, tmp_path / bad)
    (tmp_path / f"{bad}.gguf").write_bytes(b"GGUF")
    (tmp_path / "alias").symlink_to(bad)
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ["shard", bad, "--tp", "2", "-o", "x"],
        ["shard", "alias", "--tp", "2", "-o", "x"],
        ["shard", "model", "--tp", "2", "-o", bad + "o"],
        ["plan", f"{bad}.gguf"],
        ["chat", bad, "-m", "hi"],
        ["batch", "in", "--model", bad],
        ["batch", "in", "-o", bad + "o"],
        ["download", bad],
        ["merge", bad, "-o", "x"],
    ):
        code, line = run(*arguments)
        assert code == 1 and "tiny\\x80" in line and line.endswith(" is not UTF-8; rename it"), arguments
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "c\udc81"))
    code, line = run("batch", os.devnull, "--model", "model")
    assert (code, line) == (1, f"the path {tmp_path}/c\\x81 is not UTF-8; rename it")
    monkeypatch.chdir(tmp_path / bad)
    assert run("plan", ".") == (1, f"the path {tmp_path}/tiny\\x80 is not UTF-8; rename it")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["notes\udc80", "model\udc80.safetensors"])
def test_a_file_name_in_the_folder_that_is_not_utf_8(run: Run, tmp_path: Path, model: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        (model / "model.safetensors").rename(model / name)
    else:
        (model / name).touch()
    shown = name.replace("\udc80", "\\x80")
    for arguments in (["shard", "model", "--tp", "2", "-o", "x"], ["download", "model", "-o", "x"]):
        assert run(*arguments) == (1, f"the path model/{shown} is not UTF-8; rename it")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_texts_that_are_not_utf_8(run: Run) -> None:
    for option in ("--stop", "--system"):
        code, line = run("chat", option, "a\udcff")
        assert (code, line) == (2, f"{option} holds '\\udcff', which is no text in UTF-8; write it again")


def test_a_current_folder_that_was_deleted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setenv("PWD", "/somewhere/gone")
    (tmp_path / "gone").rmdir()
    said = "the current folder (/somewhere/gone) was deleted; change to another one (cd)"
    assert run("plan", "model") == (1, said)
    os.chdir(tmp_path)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a dangling link": (lambda path: path.symlink_to("away"), "is a link to away, which is not there"),
    "a loop": (lambda path: path.symlink_to(path.name), "is a link that leads back to itself"),
    "a pipe": (os.mkfifo, "is a pipe, but must be a regular file"),
    "a folder": (Path.mkdir, "is a folder, but must be a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, but must be a regular file"),
}
NAMES = [
    "tokenizer.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tpctl.json",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_taken_for_missing(run: Run, tmp_path: Path, model: Path, kind: str) -> None:
    make, said = KINDS[kind]
    for name in NAMES:
        path, kept = model / name, tmp_path / "kept"
        if there := path.exists():
            path.rename(kept)
        make(path)
        for arguments in (["shard", "model", "--tp", "2", "-o", "x"], ["download", "model", "-o", "x"]):
            code, line = run(*arguments)
            assert code == 1 and line.startswith(f"model/{name} {said}"), (name, line)
        if name in ("tokenizer_config.json", "chat_template.jinja", "config.json", "model.safetensors"):
            assert run("chat", "model", "-m", "hi")[1].startswith(f"model/{name} {said}")
        if name not in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert run("plan", "model")[1].startswith(f"model/{name} {said}")
        if name == "tokenizer.json":
            (tmp_path / "in").write_text('{"prompt": "a"}\n')
            assert run("batch", "in", "--model", "model")[1].startswith(f"model/{name} {said}")
            (tmp_path / "in").unlink()
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        if there:
            kept.rename(path)
        assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_weight_file_is_named(run: Run, model: Path, kind: str) -> None:
    make, said = KINDS[kind]
    (model / "model.safetensors").unlink()
    make(model / "other.safetensors")
    assert run("shard", "model", "--tp", "2", "-o", "x")[1].startswith(f"model/other.safetensors {said}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_file_that_is_none(run: Run, tmp_path: Path, model: Path, kind: str) -> None:
    make, said = KINDS[kind]
    make(tmp_path / "t")
    for command in (["chat", "model", "-m", "hi"], ["batch", "in", "--model", "model"]):
        code, line = run(*command, "--chat-template", "t")
        assert code == 1 and line.startswith(f"t {said}")


def test_merging_and_resharding_wait_for_no_pipe(tmp_path: Path, model: Path) -> None:
    shards = tmp_path / "two"
    shard_checkpoint(model, shards, 2)
    (shards / "LICENSE").unlink()
    os.mkfifo(shards / "LICENSE")
    for act in (lambda: merge_shards(shards, tmp_path / "x"), lambda: reshard(shards, tmp_path / "x", 3)):
        with pytest.raises(Exception, match=r"LICENSE is a pipe, but must be a regular file|LICENSE was altered"):
            act()
    assert not (tmp_path / "x").exists()


def test_force_takes_nobodys_own_files_along(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    (model / "picture.png").touch()  # copied, so it belongs to the shards
    for name in ("README.md", "tokenizer.model", "chat_template.jinja", "modeling_llama.py", "merges.txt"):
        (model / name).touch()
    shard_checkpoint(model, out, 2)
    (out / "model-rank-7-part-0.safetensors").touch()
    shard_checkpoint(model, out, 3, force=True)
    merged = tmp_path / "merged"
    (model / "picture.png").unlink()
    shard_checkpoint(model, out, 2, force=True)
    merge_shards(out, merged)
    merge_shards(out, merged, force=True)
    for folder in (out, merged):
        for name in ("thesis.txt", "run.py", "data.json", "photos"):
            own = folder / name
            own.mkdir() if name == "photos" else own.write_text("mine")
            with pytest.raises(OutputError, match=f"holds {name}, which is no part of a model, and --force would"):
                shard_checkpoint(model, folder, 2, force=True)
            assert own.exists()
            own.rmdir() if name == "photos" else own.unlink()
