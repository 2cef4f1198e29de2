"""``tpctl download`` and ``upload`` against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.unit.downloads import MODEL, WEIGHTS, Run, environment, failed, files, needed
from tests.unit.downloads import commands as commands
from tests.unit.downloads import hub as hub  # the fixtures
from tests.unit.downloads import run as run
from tests.unit.hub_server import Hub, Refusal


def test_fetches_only_what_is_needed_and_only_once(hub: Hub, run: Run) -> None:
    commit = hub.add("org/model", MODEL)
    result = run("download", "org/model", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["id"], found["revision"]) == ("org/model", commit)
    assert files(found["folder"]) == needed(MODEL)
    fetched = len(hub.bodies("model.safetensors"))
    again = run("download", "org/model")
    assert again.stdout.strip() == found["folder"]
    assert len(hub.bodies("model.safetensors")) == fetched == 1


def test_a_cut_connection_is_continued_where_it_broke(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.cuts["model.safetensors"] = [1_000_000, 500_000]
    result = run("download", "org/model")
    assert result.returncode == 0, result.stderr
    assert files(result.stdout.strip())["model.safetensors"] == WEIGHTS
    ranges = hub.bodies("model.safetensors")
    starts = [int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in ranges[1:] if text]  # type: ignore[index]
    assert len(ranges) == 3 and ranges[0] is None
    assert 0 < starts[0] < starts[1] <= 1_500_000


def test_a_later_run_continues_an_unfinished_file(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.cuts["model.safetensors"] = [1_000_000]
    hub.refusals = [Refusal("model.safetensors", 403, method="GET", skip=1)]
    assert "HTTP 403" in failed(run("download", "org/model"))
    hub.refusals.clear()
    result = run("download", "org/model")
    assert files(result.stdout.strip())["model.safetensors"] == WEIGHTS
    last = hub.bodies("model.safetensors")[-1]
    assert last is not None and int(last.removeprefix("bytes=").rstrip("-")) > 0


def test_ctrl_c_ends_at_once_and_keeps_what_arrived(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    stall = hub.stalls["model.safetensors"] = threading.Event()
    command = [sys.executable, "-m", "tpctl", "download", "org/model"]
    with subprocess.Popen(
        command, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not any(path.stat().st_size for path in tmp_path.rglob("*.partial")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    stall.set()
    hub.stalls.clear()
    assert files(run("download", "org/model").stdout.strip()) == needed(MODEL)
    last = hub.bodies("model.safetensors")[-1]
    assert last is not None and int(last.removeprefix("bytes=").rstrip("-")) > 0


def test_output_that_cannot_be_written(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failed(run("download", "org/model", "-o", str(tmp_path / "file")))
    assert str(tmp_path / "file") in failed(run("download", "org/model", "-o", str(tmp_path / "file" / "x")))


def test_output_folder_holds_the_files_and_follows_the_revision(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    hub.add("org/model", {**MODEL, "model.safetensors": WEIGHTS[::-1]}, revision="v2")
    out = str(tmp_path / "out")
    assert run("download", "org/model", "-o", out).stdout.strip() == out
    assert files(out) == needed(MODEL)
    assert run("download", "org/model@v2", "-o", out).returncode == 0
    assert files(out)["model.safetensors"] == WEIGHTS[::-1]
    assert not (tmp_path / "hf" / "hub" / "models--org--model" / "blobs").exists()


def test_revisions_are_told_apart(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    other = hub.add("org/model", {**MODEL, "config.json": b'{"other": 1}'}, revision="v2")
    for arguments in (["org/model", "--revision", "v2"], ["org/model@v2"], [f"org/model@{other}"]):
        result = run("download", *arguments)
        assert files(result.stdout.strip())["config.json"] == b'{"other": 1}', result.stderr
    assert "no revision 'v3'" in failed(run("download", "org/model@v3"))
    assert "different revisions" in failed(run("download", "org/model@v2", "--revision", "v3"))


def test_a_commit_in_the_cache_asks_nobody(hub: Hub, run: Run) -> None:
    commit = hub.add("org/model", MODEL)
    folder = run("download", "org/model").stdout
    asked = len(hub.requests)
    assert run("download", f"org/model@{commit}").stdout == folder
    assert len(hub.requests) == asked


def test_an_index_decides_which_files_are_weights(hub: Hub, run: Run) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    parts = {"model-1.safetensors": b"one", "model-2.safetensors": b"two", "consolidated.safetensors": b"all"}
    model = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **parts}
    hub.add("org/model", model)
    found = files(run("download", "org/model").stdout.strip())
    assert found == {name: data for name, data in model.items() if name != "consolidated.safetensors"}
    del model["model-2.safetensors"]
    hub.add("org/model", model)
    assert "its index lists model-2.safetensors" in failed(run("download", "org/model"))


def with_stale_index(hub: Hub, *, parts: bool) -> dict[str, bytes]:
    """A repository with ``model.safetensors``, and beside it the index of an earlier save."""
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    model = {**MODEL, "model.safetensors.index.json": json.dumps(index).encode()}
    if parts:
        model |= {"model-1.safetensors": b"one", "model-2.safetensors": b"two"}
    hub.add("org/model", model)
    return model


@pytest.mark.parametrize("parts", [True, False])
def test_one_file_comes_before_a_stale_index_on_the_hub(hub: Hub, run: Run, parts: bool) -> None:
    model = with_stale_index(hub, parts=parts)
    result = run("download", "org/model")
    assert result.returncode == 0, result.stderr
    found = files(result.stdout.strip())
    assert found["model.safetensors"] == WEIGHTS and hub.bodies("model.safetensors")
    assert not {"model-1.safetensors", "model-2.safetensors"} & found.keys()
    assert not hub.bodies("model-1.safetensors") + hub.bodies("model.safetensors.index.json")
    assert found.items() <= model.items()


def test_one_file_comes_before_a_stale_index_in_the_cache(hub: Hub, run: Run) -> None:
    """What another tool fetched whole is complete, though the files of the index are not there."""
    model = with_stale_index(hub, parts=False)
    result = run("download", "org/model")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    (folder / "model.safetensors.index.json").write_bytes(model["model.safetensors.index.json"])
    asked = len(hub.requests)
    offline = run("download", "org/model", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout.strip()) == (0, str(folder)), offline.stderr
    (folder / "model.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in failed(run("download", "org/model", HF_HUB_OFFLINE="1"))
    assert len(hub.requests) == asked


def test_two_runs_that_fetch_the_same_file(hub: Hub, tmp_path: Path) -> None:
    """The second waits until the first has checked and placed the file, and fetches nothing."""
    hub.add("org/model", MODEL)
    from tpctl.checkpoint.transfer import Download, Meter

    digest = hashlib.sha256(WEIGHTS).hexdigest()
    url = f"{hub.url}/org/model/resolve/main/model.safetensors"
    errors, received = list[BaseException](), list[int]()

    def fetch() -> None:
        meter = Meter(len(WEIGHTS), None)
        try:
            Download(url, {}, tmp_path / "file", len(WEIGHTS), digest).fetch(meter)
        except BaseException as error:
            errors.append(error)
        received.append(meter.done)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert received == [len(WEIGHTS)] * 4
    assert len(hub.bodies("model.safetensors")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unfinished_file_of_another_revision_is_dropped(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    hub.add("org/model", {**MODEL, "model.safetensors": WEIGHTS[::-1]}, revision="v2")
    hub.cuts["model.safetensors"] = [1_000_000]
    hub.refusals = [Refusal("model.safetensors", 403, method="GET", skip=1)]
    out = tmp_path / "out"
    failed(run("download", "org/model", "-o", str(out)))
    [left] = out.glob(".*.partial")
    assert left.stat().st_size > 0
    hub.refusals.clear()
    result = run("download", "org/model@v2", "-o", str(out))
    assert result.returncode == 0, result.stderr
    line = f"({left}) that an unfinished download of another revision left"
    assert result.stderr.count("\n") == 1 and line in result.stderr
    assert files(str(out)) == needed({**MODEL, "model.safetensors": WEIGHTS[::-1]})
