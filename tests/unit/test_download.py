"""``tpctl download`` and ``upload`` against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.hub_server import Hub, Refusal, serving
from tpctl.checkpoint.cache import require_space
from tpctl.checkpoint.hub import _in_threads
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.errors import SourceError

WEIGHTS = bytes(range(256)) * 12_000
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickled",
    "README.md": b"hello",
    "onnx/model.onnx": b"onnx",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as served:
        yield served


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """This process' environment, with ``hub`` as the Hub and caches in ``folder``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TPCTL_"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "TPCTL_CACHE": str(folder / "cache")}
    return {**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    def tpctl(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tpctl", *arguments],
            env={**environment(hub, tmp_path), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return tpctl


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def needed(model: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in model.items() if re.search(r"^[^/]*\.(json|safetensors)$", name)}


def failed(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tpctl: "), result.stderr
    return lines[0]


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


def test_private_repositories_need_the_token(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.token = "hf_secret"
    line = failed(run("download", "org/model"))
    assert "private (HTTP 401)" in line and "--token" in line
    assert run("download", "org/model", "--token", "hf_secret").returncode == 0
    assert run("download", "org/model", "-o", "unused", HF_TOKEN="wrong").returncode == 1


@pytest.mark.parametrize(
    ("refusal", "said", "advice"),
    [
        (
            Refusal("/api/", 403, {"X-Error-Code": "GatedRepo"}),
            "org/model is gated (HTTP 403)",
            "accept its terms",
        ),
        (Refusal("/api/", 403), "forbids access to org/model (HTTP 403)", "token"),
        (Refusal("/api/", 404), "knows no model org/model", "check the name"),
        (Refusal("/api/", 429, {"Retry-After": "7"}), "too many requests (HTTP 429)", "try again in 7 s"),
        (Refusal("/api/", 500), "fails (HTTP 500)", "try again in a few minutes"),
        (Refusal("/api/", 503), "fails (HTTP 503)", "try again in a few minutes"),
        (
            Refusal("tokenizer.json", 404, {"X-Error-Code": "EntryNotFound"}),
            "lacks a file",
            "another --revision",
        ),
        (Refusal("model.safetensors", 429, {"Retry-After": "900"}), "(HTTP 429)", "try again in 900 s"),
    ],
)
def test_refusals_name_the_next_step(hub: Hub, run: Run, refusal: Refusal, said: str, advice: str) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [refusal]
    line = failed(run("download", "org/model"))
    assert said in line and advice in line


def test_a_short_rate_limit_is_waited_out(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [Refusal("model.safetensors", 429, {"Retry-After": "0"}, times=2, method="GET")]
    assert files(run("download", "org/model").stdout.strip()) == needed(MODEL)
    assert len(hub.bodies("model.safetensors")) == 3


def test_a_server_error_during_a_transfer_is_tried_again(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [Refusal("model.safetensors", 502, times=1, method="GET")]
    assert files(run("download", "org/model").stdout.strip()) == needed(MODEL)


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal("/api/", 503, times=1),
        Refusal("/api/", 502, times=2),
        Refusal("/api/", 504, {"Retry-After": "1"}, times=1),
        Refusal("/api/", 429, {"Retry-After": "1"}, times=1),
        Refusal("tokenizer.json", 503, times=1, method="GET"),
        Refusal("config.json", 429, {"Retry-After": "0"}, times=2, method="GET"),
    ],
    ids=lambda refusal: f"{refusal.part} {refusal.status}",
)
def test_a_moment_of_trouble_ends_no_download(hub: Hub, run: Run, refusal: Refusal) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [replace(refusal)]
    result = run("download", "org/model")
    assert (result.returncode, result.stderr) == (0, "")
    assert files(result.stdout.strip()) == needed(MODEL)
    assert hub.refusals[0].times == 0


def test_trouble_that_lasts_is_told_after_a_few_requests(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [Refusal("/api/", 503)]
    assert "fails (HTTP 503)" in failed(run("download", "org/model", HF_HUB_ETAG_TIMEOUT="2"))
    assert 2 <= len(hub.requests) <= 4


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


def test_damaged_bytes_are_refused(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    hub.damaged.add("model.safetensors")
    assert "arrived damaged" in failed(run("download", "org/model"))
    hub.damaged.clear()
    assert files(run("download", "org/model").stdout.strip()) == needed(MODEL)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"README.md": b"hello"}, "has no config.json"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"pickled"},
            "no safetensors weights, only PyTorch pickles",
        ),
        ({"config.json": b"{}", "model.Q4.gguf": b"GGUF"}, "holds GGUF files only (model.Q4.gguf); fetch one"),
        (
            {"README.md": b"", "b.Q8.gguf": b"", "a-00001-of-00002.gguf": b"", "a-00002-of-00002.gguf": b""},
            "(a-00001-of-00002.gguf, b.Q8.gguf); fetch one, as with `hf download org/model "
            "--include 'a-*-of-00002.gguf' --local-dir .`, and pass it: `tpctl chat ./a-00001-of-00002.gguf`",
        ),
        ({"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""}, "nothing says which"),
    ],
)
def test_repositories_without_usable_weights(hub: Hub, run: Run, model: dict[str, bytes], said: str) -> None:
    hub.add("org/model", model)
    assert said in failed(run("download", "org/model"))


def test_an_unreachable_hub_is_one_line_and_a_copy_serves_without_it(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    nowhere = "http://127.0.0.1:9"
    line = failed(run("download", "org/model", HF_ENDPOINT=nowhere))
    assert f"the Hub at {nowhere} cannot be reached" in line and "local checkpoint folder" in line
    folder = run("download", "org/model").stdout
    offline = run("download", "org/model", HF_ENDPOINT=nowhere)
    assert (offline.returncode, offline.stdout) == (0, folder)
    assert "using the copy of org/model" in offline.stderr
    quiet = run("download", "org/model", HF_HUB_OFFLINE="1")
    assert (quiet.returncode, quiet.stdout) == (0, folder)
    assert "HF_HUB_OFFLINE" in failed(run("download", "org/other", HF_HUB_OFFLINE="1"))


def test_a_silent_hub_is_given_up(hub: Hub, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line = failed(run("download", "org/model", HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1"))
    assert "cannot be reached" in line


def test_the_disk_is_looked_at_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SourceError, match=r"downloading m needs 1\.0 KiB but .* has 1000 B free"):
        require_space(tmp_path / "not" / "there", 1025, "downloading m")
    require_space(tmp_path, 1000, "downloading m")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "gpt2"}, ["--tp", "2"], 'model_type "gpt2" is not supported'),
        ({}, ["--tp", "9"], "tensor-parallel size 9 does not fit 4 query heads"),
    ],
)
def test_what_cannot_run_is_refused_before_its_weights(
    hub: Hub, run: Run, config: dict[str, str], options: list[str], message: str
) -> None:
    known = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    header = build_header([TensorSpec("model.norm.weight", "U8", (len(WEIGHTS),))])
    files = {"config.json": json.dumps({**known, **config}).encode(), "model.safetensors": header.raw + WEIGHTS}
    hub.add("org/model", {**MODEL, **files})
    assert message in failed(run("shard", "org/model", *options))
    headers_only = re.compile(r"bytes=\d+-\d+")
    assert all(text is not None and headers_only.fullmatch(text) for text in hub.bodies("model.safetensors"))


def test_files_that_are_no_download_are_not_overwritten(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(b"my own")
    assert "holds files" in failed(run("download", "org/model", "-o", str(mine)))
    assert (mine / "model.safetensors").read_bytes() == b"my own"


def test_a_server_that_only_puts_off_is_given_up(hub: Hub, run: Run) -> None:
    hub.add("org/model", MODEL)
    hub.refusals = [Refusal("model.safetensors", 429, {"Retry-After": "0"}, method="GET")]
    assert "brought nothing new after 0 of" in failed(run("download", "org/model"))


def test_after_a_failure_the_other_transfers_are_stopped_and_end_first() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def fails() -> None:
        raise SourceError("no such file")

    def runs() -> None:
        assert stopped.wait(60)
        time.sleep(0.2)
        ended.set()

    with pytest.raises(SourceError, match="no such file"):
        _in_threads([runs, fails], stopped.set)
    assert ended.is_set()
