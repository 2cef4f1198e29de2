"""``bench quality`` in this process, and the models that it scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import make_checkpoint
from tests.unit.fake_client import write_tokenizer
from tpctl.bench import quality as bench
from tpctl.cli.app import app
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.report import EngineInfo
from tpctl.wire.settings import EngineConfig

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 3 + "é中\n"


class InProcess:
    """An engine of one rank in this process, with what ``EngineClient`` and ``Mailbox`` have."""

    most_open = 0

    def __init__(self, config: EngineConfig) -> None:
        with torch.inference_mode():
            self.engine = Engine(config, TPGroup())
        self.open = 0

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def mailbox(self) -> InProcess:
        return self

    def wait_ready(self) -> EngineInfo:
        return self.engine.info()

    def submit(self, requests: list[Request]) -> None:
        self.open += len(requests)
        InProcess.most_open = max(InProcess.most_open, self.open)
        with torch.inference_mode():
            assert self.engine.apply(Add(requests)) == []

    def outputs(self) -> list[Output]:
        with torch.inference_mode():
            outputs = self.engine.step()
        self.open -= len(outputs)
        return outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders and transformers' models: ``whole``, and ``rounded``, the same with other weights."""
    folder = tmp_path_factory.mktemp("quality")
    found: dict[str, Any] = {"folder": folder}
    for name in ("whole", "rounded"):
        model: Any = make_checkpoint("llama2", folder / name, vocab_size=300)
        if name == "rounded":
            torch.manual_seed(11)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
            model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        found[name] = model
    return found


@pytest.fixture
def run(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The command, with its engine in this process: its report."""
    monkeypatch.setenv("TPCTL_CACHE", str(made["folder"] / "cache"))
    monkeypatch.setattr(bench, "EngineClient", InProcess)
    monkeypatch.chdir(made["folder"])
    Path("text").write_text(TEXT, encoding="utf-8")

    def command(line: str, *, text: str | None = "text") -> Any:
        arguments = ["bench", "quality", *line.split(), "--device", "cpu", *(["--text", text] if text else [])]
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None:
            raise result.exception
        return json.loads(result.stdout) if "--json" in line else result.stdout

    yield command
    assert not list((made["folder"] / "cache").glob("tmp*"))
