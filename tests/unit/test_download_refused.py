"""``tpctl download`` where the Hub, the network, the model or the disk do not let it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.downloads import MODEL, WEIGHTS, Run, failed, files, needed
from tests.unit.downloads import commands as commands
from tests.unit.downloads import hub as hub  # the fixtures
from tests.unit.downloads import run as run
from tests.unit.hub_server import Hub, Refusal
from tpctl.checkpoint.cache import require_space
from tpctl.checkpoint.hub import _in_threads
from tpctl.checkpoint.safetensors import TensorSpec, build_header
from tpctl.errors import SourceError


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
