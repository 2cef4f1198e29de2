"""``tpctl doctor`` reports what is there, also where torch is broken."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tpctl.cli.app import app
from tpctl.errors import EngineError
from tpctl.launch import doctor


def test_reports_this_machine() -> None:
    import torch

    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    )
    assert len(found["torch"]["gpus"]) == torch.cuda.device_count()
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("gloo", "shared", "said"),
    [
        (True, True, "shared memory, gloo where ranks cannot map it"),
        (True, False, "gloo"),
        (False, True, "gloo is not available: only --tp 1 can run"),
    ],
)
def test_what_cpu_ranks_talk_through(gloo: bool, shared: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = doctor.Torch(cuda=None, gpus=[], nccl=None, gloo=gloo, shared_memory=shared, onednn=True)
    monkeypatch.setattr(doctor, "_ask_torch", lambda: (torch, None))
    assert f"between CPUs     {said}\n" in CliRunner().invoke(app, ["doctor"]).stdout


def test_broken_torch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    found = doctor.examine()
    assert found.torch is None
    assert found.problem == "ImportError: libcudart.so.13: cannot open shared object file"
    result = CliRunner().invoke(app, ["doctor"])
    assert isinstance(result.exception, EngineError)
    assert "--device cpu" in result.stdout
