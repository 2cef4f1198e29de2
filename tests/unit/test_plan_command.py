"""``tpctl plan`` as a command: text, JSON, and a model on the Hub of which no weights are fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.downloads import Run, failed, files
from tests.unit.downloads import commands as commands
from tests.unit.downloads import hub as hub  # the fixtures
from tests.unit.downloads import run as run
from tests.unit.hub_server import Hub, Refusal
from tests.unit.synthetic import make_checkpoint, make_config
from tests.unit.test_fit import LLAMA_405B, config_folder


def test_text_names_sizes_costs_and_the_limit(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    result = run("plan", str(folder), "--tp", "6", "--max-model-len", "8192")
    assert result.returncode == 0, result.stderr
    assert "405,853.4 M parameters" in result.stdout and "from config.json alone" in result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line[:3].strip().isdigit()}
    assert "even" in rows["8"] and "uneven" in rows["6"] and "8.9%" in rows["6"]
    assert "tp 129 and more cannot work" in result.stdout
    assert "tp 6 does not fit one sequence of 8192 tokens" in result.stdout
    assert max(map(len, rows.values())) <= 80
    reserves = result.stdout.splitlines()[-1]
    assert "72.0 GiB (90% of 80.0 GiB)" in reserves
    assert "1568 MiB for the CUDA context" in reserves and "2016 MiB kept for CUDA graphs" in reserves


def test_json_is_the_report(run: Run, tmp_path: Path) -> None:
    result = run("plan", str(config_folder(tmp_path / "big", LLAMA_405B)), "--gpu-memory", "141GiB", "--json")
    report = json.loads(result.stdout)
    assert report["gpu_memory"] == 141 << 30
    assert report["tp_size"] == 8 and len(report["ranks"]) == 8
    rank = report["ranks"][0]
    taken = rank["weight_bytes"] + rank["activation_bytes"] + rank["kv_cache_bytes"]
    assert taken + report["context_bytes"] + report["reserve_bytes"] == int((141 << 30) * 0.9)


def test_of_a_hub_model_only_headers_travel(hub: Hub, run: Run, tmp_path: Path) -> None:
    config = make_config(hidden_size=384, intermediate_size=512)
    model = files(str(make_checkpoint(tmp_path / "model", config)))
    commit = hub.add("org/model", model)
    result = run("plan", "org/model", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["model"], report["revision"], report["exact"]) == ("org/model", commit, True)
    assert len(model["model.safetensors"]) > 1_000_000
    assert set(hub.bodies("model.safetensors")) == {"bytes=0-100000"}
    local = json.loads(run("plan", str(tmp_path / "model"), "--json").stdout)
    assert local["sizes"] == report["sizes"] and local["ranks"] == report["ranks"]


def test_a_hub_model_without_safetensors_is_planned_from_its_config(hub: Hub, run: Run) -> None:
    hub.add("org/model", {"config.json": json.dumps(LLAMA_405B).encode(), "pytorch_model.bin": b"pickled"})
    report = json.loads(run("plan", "org/model", "--json").stdout)
    assert report["exact"] is False and report["parameters"] == 405_853_388_800


def test_failures_are_one_line(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", {"README.md": b""})
    assert "has no config.json" in failed(run("plan", "org/model"))
    assert "knows no model org/absent" in failed(run("plan", "org/absent"))
    assert "no such file or folder here" in failed(run("plan", "absent"))
    hub.refusals = [Refusal("/api/", 403, {"X-Error-Code": "GatedRepo"})]
    assert "is gated" in failed(run("plan", "org/model"))
    unknown = config_folder(tmp_path / "unknown", {"model_type": "mamba"})
    assert 'model_type "mamba" is not supported' in failed(run("plan", str(unknown)))
    assert run("plan", str(unknown), "--gpu-memory", "lots").returncode == 2


def test_planning_imports_nothing_heavy(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    code = (
        "import sys; from tpctl.checkpoint.metadata import read_metadata; "
        "from tpctl.planning.fit import Budget, plan_model; "
        f"plan_model(read_metadata({str(folder)!r}), Budget()); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"[]", "holds a list, but a JSON object is needed"),
        (b"[" * 100_000, "is nested more than 64 levels deep"),
        (b'{"weight_map": ' + b"[" * 100 + b"]" * 100 + b"}", "is nested more than 64 levels deep"),
        (b"{", "is not valid JSON"),
        (b'{"weight_map": {"a": 5}}', "lists 5, which is not a file name"),
        (b"{}", "it has no object weight_map"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_an_index_that_is_broken_is_not_passed_over(
    hub: Hub, run: Run, tmp_path: Path, index: bytes, said: str, where: str
) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    (folder / "model.safetensors.index.json").write_bytes(index)
    hub.add("org/model", files(str(folder)))
    model = str(folder) if where == "folder" else "org/model"
    line = failed(run("plan", model))
    assert f"{model}/model.safetensors.index.json" in line and said in line


def test_an_index_without_its_files_is_planned_from_the_config(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "big", LLAMA_405B)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    for options in ([], ["--quantize", "fp8"]):
        assert "from config.json alone" in run("plan", str(folder), *options).stdout
