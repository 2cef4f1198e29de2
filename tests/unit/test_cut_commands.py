"""Options that say how a model is cut, as commands; and models that are cut and not run, refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_input import local_answer
from tests.unit.downloads import Run, failed, files
from tests.unit.downloads import commands as commands
from tests.unit.downloads import hub as hub  # the fixtures
from tests.unit.downloads import run as run
from tests.unit.hub_server import Hub
from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tests.unit.test_plan_sizes import FP8, MOE
from tpctl.arch.families import FAMILIES
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.safetensors import TensorSpec
from tpctl.manifest.manifest import Manifest
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", make_config("qwen3_moe", **MOE, **FP8), files=2)


def answered(command: str, folder: Path) -> str:
    answer = local_answer(command, folder)
    assert answer.code == 0, answer
    return answer.out


def test_the_groups_that_experts_are_dealt_to_are_said(model: Path, tmp_path: Path) -> None:
    said = answered("shard model --tp 4 --ep 2 --even -o two", tmp_path)
    assert said.startswith("two: model (qwen3_moe) cut for tp 4, experts dealt to 2 groups of ranks, evenly: borders ")
    report = json.loads(answered("shard model --tp 4 --ep 4 -o four --json", tmp_path))
    assert (report["expert_parallel"], report["even"]) == (4, False)
    of_shards = answered("plan two --tp 4", tmp_path)
    assert "tp 4 fits, experts dealt to 2 groups of ranks, evenly: borders may divide blocks" in of_shards
    same, found = (answered(f"plan {what} --tp 4 --json", tmp_path) for what in ("model --ep 2 --even", "two"))
    assert {**json.loads(same), "model": "two"} == json.loads(found)
    assert json.loads(answered("plan two --ep 1 --no-even --tp 4 --json", tmp_path))["expert_parallel"] == 1
    sizes = answered("plan model --ep 4", tmp_path)  # every size that cannot be is explained
    assert "\ntp 1 is impossible: 1 rank does not form 4 equal groups; use --ep 1\n" in sizes
    assert "\ntp 2-3 are impossible; of tp 2: 2 ranks do not form 4 equal groups; use --ep 1, 2\n" in sizes
    assert "groups of ranks" not in answered("shard model --tp 2 -o one", tmp_path) + answered("plan one", tmp_path)


@pytest.mark.parametrize(
    ("options", "cutting"),
    [
        ("", Cutting()),
        ("--expert-parallel", Cutting(4)),
        ("--ep 2", Cutting(2)),
        ("--even", Cutting(1, even=True)),
        ("--ep 2 --even", Cutting(2, even=True)),
        ("--ep 1 --no-even", Cutting()),
    ],
)
def test_options_are_the_cut(model: Path, tmp_path: Path, options: str, cutting: Cutting) -> None:
    answered(f"shard model --tp 4 {options} -o given", tmp_path)
    shard_checkpoint(model, tmp_path / "asked", 4, source_id="model", cutting=cutting)
    assert folder_bytes(tmp_path / "given") == folder_bytes(tmp_path / "asked")
    report = json.loads(answered(f"plan model --tp 4 {options} --json", tmp_path))
    manifest = Manifest.load(tmp_path / "given")
    for rank in report["ranks"]:
        assert rank["file_bytes"] == sum(part.size for part in manifest.shards[rank["rank"]].parts)
    merge_shards(tmp_path / "given", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(model)


@pytest.mark.parametrize(
    ("options", "cutting"),
    [
        ("", Cutting(2, even=True)),
        ("--no-even", Cutting(2)),
        ("--expert-parallel", Cutting(4, even=True)),
        ("--ep 1", Cutting(1, even=True)),
    ],
)
def test_resharding_keeps_what_no_option_changes(model: Path, tmp_path: Path, options: str, cutting: Cutting) -> None:
    answered("shard model --tp 2 --ep 2 --even -o two", tmp_path)
    answered(f"reshard two --tp 4 {options} -o four", tmp_path)
    shard_checkpoint(model, tmp_path / "asked", 4, source_id="model", cutting=cutting)
    assert folder_bytes(tmp_path / "four") == folder_bytes(tmp_path / "asked")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("shard model --tp 4 --expert-parallel --ep 2", "--expert-parallel and --ep 2 say two things"),
        ("plan model --expert-parallel --ep 2", "--expert-parallel and --ep 2 say two things"),
        ("shard model --tp 4 --ep 3", "4 ranks do not form 3 equal groups"),
        ("shard model --tp 4 --ep 0", "'--ep'"),
        ("plan dense --ep 2", "the model has no experts"),
        ("shard dense --tp 2 --expert-parallel", "the model has no experts"),
        ("shard model --tp 2 --ep 7", "7 groups of ranks cannot share 6 experts"),
    ],
)
def test_what_cannot_be_dealt_is_refused(model: Path, tmp_path: Path, command: str, said: str) -> None:
    make_checkpoint(tmp_path / "dense", make_config())
    before = sorted(tmp_path.iterdir())
    answer = local_answer(command, tmp_path)
    assert answer.code and answer.err.count("\n") == 1 and said in answer.err, answer
    assert sorted(tmp_path.iterdir()) == before


TOWER = TensorSpec("vision.patch.weight", "BF16", (4, 4))


@pytest.fixture
def seeing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a tower beside the text model."""
    llama = FAMILIES["llama"]
    describe = llama.describe
    family = replace(llama, describe=lambda *of: replace(describe(*of), towers=(r"vision\..*",)))
    monkeypatch.setitem(FAMILIES, "llama", family)
    return make_checkpoint(tmp_path / "seeing", make_config(), extra=[TOWER])


def test_what_sees_is_left_out_by_name(seeing: Path, tmp_path: Path) -> None:
    refused = local_answer("shard seeing --tp 2", tmp_path)
    assert refused.code == 1 and "1 tensor of what sees or hears, such as vision.patch.weight" in refused.err
    assert "--text-only" in refused.err and not (tmp_path / "seeing-tp2").exists()
    assert "left out: 1 tensor of what sees or hears" in answered("plan seeing", tmp_path)
    answered("shard seeing --tp 2 --text-only -o two", tmp_path)
    answered("reshard two --tp 3 -o three", tmp_path)
    merge_shards(tmp_path / "three", tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(seeing)


def test_the_rank_that_lacks_is_cut_as_the_others(model: Path, tmp_path: Path) -> None:
    answered("shard model --tp 4 --ep 2 --even --ranks 0-2 -o some", tmp_path)
    said = local_answer("merge some -o out", tmp_path).err
    assert "`tpctl shard MODEL --tp 4 --ep 2 --even --ranks 3 -o some`" in said
    answered("shard model --tp 4 --ep 2 --even --ranks 3 -o some", tmp_path)
    answered("merge some -o out", tmp_path)


UNRUN = {"vocab_size_per_layer_input": 60}
"""What makes a model of Gemma 4 one that is cut and not run."""
ASKS = ("chat {model} -m hello", "batch {prompts} --model {model} -o answers.jsonl")
WHY = "which tpctl cuts but does not run yet; use shard, plan, inspect-shards and merge"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    return path


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("where", ["model", "shards"])
@pytest.mark.parametrize("template", [True, False], ids=["chat", "base"])
def test_what_does_not_run_is_refused_before_it_is_cut_or_hashed(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str, where: str, template: bool
) -> None:
    model = make_checkpoint(tmp_path / "model", make_config("gemma4_text", **UNRUN))
    if template:
        (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    shard_checkpoint(model, tmp_path / "shards", 2)

    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("tpctl.client.prepare.ensure_sharded", never)
    monkeypatch.setattr("tpctl.client.prepare.ensure_verified", never)
    answer = local_answer(ask.format(model=where, prompts=prompts), tmp_path)
    assert answer.code == 1 and answer.out == "" and answer.err.count("\n") == 1 and WHY in answer.err, answer


@pytest.mark.parametrize("ask", ASKS)
def test_without_a_tokenizer_nothing_is_cut(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    folder = make_checkpoint(tmp_path / "mute", make_config())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenizer.json").unlink()

    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("tpctl.client.prepare.ensure_sharded", never)
    answer = local_answer(ask.format(model="mute", prompts=prompts), tmp_path)
    assert answer.code == 1 and "mute has no tokenizer.json, so text cannot be turned into" in answer.err, answer


@pytest.mark.parametrize("ask", ASKS)
def test_of_a_hub_model_that_does_not_run_only_headers_travel(
    hub: Hub, run: Run, prompts: Path, tmp_path: Path, ask: str
) -> None:
    config = make_config("gemma4_text", **UNRUN, hidden_size=768)
    weights = files(str(make_checkpoint(tmp_path / "made", config)))
    hub.add("org/cut", weights)
    assert len(weights["model.safetensors"]) > 200_000
    assert f"embeddings for each layer of 60 tokens out of 70, {WHY}" in failed(
        run(*ask.format(model="org/cut", prompts=prompts).split())
    )
    assert set(hub.bodies("model.safetensors")) <= {"bytes=0-100000"}
