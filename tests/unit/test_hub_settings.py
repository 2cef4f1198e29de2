"""What the environment may do to the Hub's library: each variable is named; a cache that is complete is only read."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tpctl.checkpoint import hub
from tpctl.checkpoint.hub_cache import cached, remember
from tpctl.checkpoint.hub_errors import HubUnreachable, explained
from tpctl.checkpoint.hub_settings import check_importable, check_settings, check_token
from tpctl.checkpoint.sources import resolve
from tpctl.checkpoint.upload import upload_folder
from tpctl.errors import SourceError

VARIABLES = {
    "HF_HUB_ETAG_TIMEOUT": ["", "abc", "2.5", "nan", "-1", "0", "9" * 5000],
    "HF_HUB_DOWNLOAD_TIMEOUT": ["", "x", "1e9"],
    "HF_ENDPOINT": ["", "nonsense", "http://", "http://[::1", "http://ho st", "ftp://x", "http://x:99999", "http://é"],
    "HF_TOKEN": ["hf_\u2019x", "hf_a\nb", "hf a", "hf_\x00"],
    "HUGGING_FACE_HUB_TOKEN": ["\u201chf_x\u201d"],
    "http_proxy": ["foo://bar", "http://[", "http://h:x"],
    "HTTPS_PROXY": ["://"],
    "ALL_PROXY": ["ftp://x"],
    "SSL_CERT_FILE": ["/nowhere/at-all"],
}


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, "HTTP_PROXY", "https_proxy", "all_proxy", "SSL_CERT_DIR", "HF_HUB_OFFLINE"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VARIABLES.items() for value in values])
def test_a_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, name: value})  # not the system's, which takes no NUL
    for asked in (check_settings, lambda: hub.ask("org/model", None, None, 1)):
        with pytest.raises(SourceError) as caught:
            asked()
        message = str(caught.value)
        assert message.startswith(f"{name} ") and "\n" not in message and len(message) < 400, message
        assert "set it" in message or "copy the token again" in message


def test_settings_that_work_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_HUB_ETAG_TIMEOUT": "10",
        "HF_ENDPOINT": "https://[::1]:8080/hub",
        "HF_TOKEN": "hf_x\n",
        "HTTPS_PROXY": "proxy.example:3128",
        "http_proxy": "",
        "SSL_CERT_FILE": __file__,
    }.items():
        monkeypatch.setenv(name, value)
    check_settings("hf_y ")
    check_importable()


@pytest.mark.parametrize("name", ["revision", "message"])
def test_what_is_sent_to_the_hub_is_text(tmp_path: Path, name: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes(b"{}")
    for asked in (lambda: check_settings(**{name: "a\udc80"}), lambda: upload(tmp_path, name)):
        with pytest.raises(SourceError, match=rf"--{name} holds '\\udc80', which is no text in UTF-8"):
            asked()
    with pytest.raises(SourceError, match="--revision holds"):
        hub.ask("org/model", "a\udc80", None, 1)


def upload(folder: Path, option: str) -> None:
    upload_folder(folder, "org/model", **{option: "a\udc80"})


def test_a_token_is_not_repeated() -> None:
    with pytest.raises(SourceError, match=r"--token holds '’' \(U\+2019\), which no Hub token has") as caught:
        check_token("--token", "hf_secret\u2019")
    assert "secret" not in str(caught.value)


def test_what_nobody_foresaw_of_addresses_is_one_line() -> None:
    said = r"cannot be asked \(Invalid port\); check HF_ENDPOINT, HTTPS_PROXY"
    with pytest.raises(SourceError, match=said), explained("org/model", None):
        raise ValueError("Invalid port\nand more")


COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with a complete copy of org/model, in two weight files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--model"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    (snapshot / "1.safetensors").write_text("weights")
    return root


REMOTE = hub.RemoteModel(
    "org/model",
    COMMIT,
    tuple(
        hub.RemoteFile(name, 7, "0" * 64 if name.endswith("safetensors") else None)
        for name in ("config.json", "model.safetensors.index.json", "1.safetensors")
    ),
)

_read_only: list[str] = []
"""Folders where nothing may be written now."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _read_only:
        return
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, writes = arguments[0] if arguments else "", event in WRITING
    if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(_read_only[0]):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))


WRITING = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "os.utime",
}
sys.addaudithook(_refuse)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As if ``folder`` were mounted so; also for root, whom no mode of a folder holds back."""
    _read_only.append(str(folder))
    try:
        yield
    finally:
        _read_only.clear()


def test_the_guard_guards(tmp_path: Path) -> None:
    with read_only(tmp_path):
        for write in (lambda: (tmp_path / "x").write_text(""), lambda: (tmp_path / "y").mkdir()):
            with pytest.raises(OSError, match="Read-only file system"):
                write()
    (tmp_path / "x").write_text("")


@pytest.mark.parametrize("noted", [True, False])
def test_a_complete_cache_is_only_read(cache: Path, noted: bool) -> None:
    if not noted:
        (cache / "refs" / "main").unlink()
    with read_only(cache):
        folder = hub.download(REMOTE, revision="main")
    assert folder == cache / "snapshots" / COMMIT
    assert (cache / "refs" / "main").exists() == noted


def test_a_read_only_cache_serves_without_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise HubUnreachable("no answer")

    monkeypatch.setattr(hub, "ask", silent)
    said: list[str] = []
    with read_only(cache):
        source = resolve("org/model", notify=said.append)
    assert (source.folder, source.revision) == (cache / "snapshots" / COMMIT, COMMIT)
    assert said == ["using the copy of org/model in the Hugging Face cache: no answer"]


def test_what_is_noted_changes_with_the_hub(cache: Path) -> None:
    remember("org/model", "main", OTHER)
    assert (cache / "refs" / "main").read_text() == OTHER


def test_without_a_note_the_only_snapshot_is_it(cache: Path) -> None:
    (cache / "refs" / "main").unlink()
    assert cached("org/model", None) == (cache / "snapshots" / COMMIT, COMMIT)
    assert cached("org/model", "v1") is None
    (cache / "snapshots" / OTHER).mkdir()
    assert cached("org/model", None) is None


def test_a_note_that_leads_nowhere_is_not_overruled(cache: Path) -> None:
    (cache / "refs" / "main").write_text(OTHER)
    assert cached("org/model", None) is None
