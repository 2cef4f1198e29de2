"""What ``tpctl bench`` measures, and what it refuses to call a figure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.fake_client import engine_info, engine_stats
from tpctl.bench import measure
from tpctl.bench.shapes import SHAPES
from tpctl.bench.workload import make_workload, one_request
from tpctl.cli import bench as cli_bench
from tpctl.cli.app import app
from tpctl.errors import EngineError, PartitionError, UsageError
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig


class _Client:
    """An engine with a context of 16 tokens that is asked for nothing."""

    def __init__(self, config: Any) -> None:
        pass

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_ready(self) -> EngineInfo:
        return engine_info(max_model_len=16)


class _Answering(_Client):
    """An engine with a context as long as the workload "short" needs. It answers a request a call, and leaves out
    ``missing`` tokens."""

    missing = 0

    def wait_ready(self) -> EngineInfo:
        return engine_info(max_model_len=192)

    def submit(self, requests: Any) -> None:
        self.left = list(requests)

    def outputs(self) -> list[Output]:
        request = self.left.pop()
        return [Output(request.id, [1] * (request.sampling.max_tokens - self.missing), "length")]

    def stats(self) -> EngineStats:
        return engine_stats()


def test_time_per_token_needs_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EngineClient", _Client)
    config: Any = EngineConfig(Path("shards"), 1, max_num_seqs=8)
    with pytest.raises(EngineError, match="8 prompt tokens and 9 to generate are more than the 16 of --max-model-len"):
        measure.latency(config, 8, 8, 100, 1)
    with pytest.raises(EngineError, match="9 sequences are more than the 8 of --max-num-seqs"):
        measure.latency(config, 8, 7, 100, 1, sequences=(1, 9))


def test_time_per_token_leaves_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def timed(client: object, requests: list[Request]) -> float:
        seen.extend(requests)
        return len(requests) * (0.5 + 0.01 * (requests[0].sampling.max_tokens - 1))

    monkeypatch.setattr(measure, "EngineClient", _Client)
    monkeypatch.setattr(measure, "timed", timed)
    config: Any = EngineConfig(Path("shards"), 1, max_num_seqs=8)
    figures = measure.latency(config, 8, 5, 10**6, 3, sequences=(1, 4)).figures
    assert figures["tpot"].values == pytest.approx([10.0] * 3)
    assert figures["ttft"].values == pytest.approx([500.0] * 3)
    assert figures["step 4"].values == pytest.approx([40.0] * 3)
    assert figures["ttft 4"].values == pytest.approx([2000.0] * 3)
    assert len({tuple(request.token_ids) for request in seen}) == len({request.id for request in seen}) == len(seen)


def test_nano_is_the_peers_workload() -> None:
    work, shifted = make_workload("nano", 151936), make_workload("nano", 151936, shift=13)
    assert (len(work.requests), work.output_tokens) == (256, 133966)
    assert all(100 <= len(request.token_ids) <= 1024 for request in work.requests)
    assert {request.sampling.temperature for request in work.requests} == {0.6}
    assert all(a.token_ids[0] != b.token_ids[0] for a, b in zip(work.requests, shifted.requests, strict=True))
    assert len({request.id for request in [*work.requests, *shifted.requests]}) == 512


def test_each_run_is_said_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first too, which is what a single batch gets; the median leaves it out."""

    monkeypatch.setattr(measure, "EngineClient", _Answering)
    config: Any = None
    said: list[str] = []
    figures = measure.throughput(config, "short", 100, 2, say=said.append).figures
    assert [line.partition(":")[0] for line in said] == ["first run", "run 1 of 2", "run 2 of 2"]
    assert [len(figures[name].values) for name in ("throughput", "duration", "first run")] == [2, 2, 1]
    assert said[0] == f"first run: {figures['first run'].median:,.0f} tok/s"


def test_an_answer_that_was_cut_short_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    work = make_workload("short", 100)

    class Short(_Answering):
        missing = 1

    monkeypatch.setattr(measure, "EngineClient", Short)
    config: Any = None
    tokens = work.output_tokens
    with pytest.raises(EngineError, match=f"produced {tokens - len(work.requests)} tokens instead of {tokens}"):
        measure.throughput(config, "short", 100, 1)


@pytest.mark.parametrize(("wanted", "option"), [(8192, "--max-model-len"), (16384, "--kv-cache-memory")])
def test_a_workload_that_is_too_long_for_the_model(wanted: int, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(_Client):
        def wait_ready(self) -> EngineInfo:
            return engine_info(max_model_len=8192, wanted_model_len=wanted)

    monkeypatch.setattr(measure, "EngineClient", Ready)
    config: Any = None
    said = f"long has 12,000 prompt tokens and 256 to generate, 12,256 together, .* takes 8,192; raise {option} "
    with pytest.raises(EngineError, match=said):
        measure.throughput(config, "long", 100, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--shape nonsense", "unknown shape 'nonsense'; known: smollm2-135m, qwen3-0.6b, llama-3.1-8b"),
        ("--shape smollm2-135m --tp 17", "size 17 does not fit 9 query heads"),
        ("--shape smollm2-135m --attention-backend triton", "--attention-backend triton needs a GPU"),
        ("--shape smollm2-135m --max-model-len 100000000", "--max-model-len 100000000 is not between 2 and 8192"),
        ("--shape smollm2-135m --kv-cache-memory 5", "5 would be 5 bytes"),
        ("--shape smollm2-135m --max-num-seqs 9 --max-num-batched-tokens 8", "is less than --max-num-seqs 9"),
        ("--shape smollm2-135m --device cuda --tp 5000", "--device cuda needs a GPU|--tp 5000 needs 5000 GPUs"),
        ("demo --shape smollm2-135m", "two models"),
    ],
)
@pytest.mark.parametrize("command", ["throughput", "latency", "startup"])
def test_no_weights_are_made_for_what_cannot_run(
    command: str, options: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPCTL_CACHE", str(tmp_path))
    extra = [] if "--device" in options else ["--device", "cpu"]
    error = CliRunner().invoke(app, ["bench", command, *options.split(), *extra]).exception
    assert isinstance(error, PartitionError if "17" in said else UsageError)
    assert re.search(said, str(error))
    assert not list(tmp_path.iterdir())


def test_prompts_stay_within_a_small_vocabulary() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9}
    request = one_request(500, 9, 3, 131, sampling)
    assert max(request.token_ids) < 131
    assert (request.sampling.top_p, request.sampling.temperature, request.sampling.max_tokens) == (0.9, 0.7, 9)
    work = make_workload("short", 131, 5, sampling)
    assert {(r.sampling.temperature, r.sampling.top_p) for r in work.requests} == {(0.7, 0.9)}
    assert max(max(r.token_ids) for r in work.requests) < 131


@pytest.mark.parametrize("command", ["latency", "throughput", "startup"])
def test_help_names_every_shape(command: str) -> None:
    said = "".join(CliRunner().invoke(app, ["bench", command, "--help"]).stdout.split())
    assert f"Randomweightsofthisshapeinstead,orofitsfirstlayers:{','.join(SHAPES)}." in said


def test_a_report_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the scheduling policy in effect; a request's own sampling reaches the engine."""
    seen: list[Any] = []

    def measured(config: Any, workload: str, vocab_size: int, runs: int, sampling: Any, say: Any) -> Any:
        seen.append((workload, vocab_size, runs, sampling))
        figures = {"throughput": measure.Figure("tok/s", [1.0])}
        return measure.Measured(figures, engine_info(), engine_stats(steps=7))

    monkeypatch.setattr(measure, "throughput", measured)
    monkeypatch.setattr(cli_bench, "_config", lambda *args: (EngineConfig(Path("shards"), 1), "tiny", 131))
    arguments = ["bench", "throughput", "tiny", "--top-k", "5", "--runs", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--scheduling-policy", "makespan"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert seen == [("short", 131, 2, {"top_k": 5})]
    assert report["settings"]["sampling"] == {"top_k": 5}
    assert report["settings"]["engine"]["max_num_batched_tokens"] == 4096
    assert report["engine"]["scheduling_policy"] == "fcfs"
    assert list(report) == ["benchmark", "model", "figures", "engine", "machine", "settings"]
    assert list(report["engine"])[-2:] == ["speculation", "stats"]
    assert report["engine"]["stats"]["steps"] == 7
    assert report["machine"]["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", report["machine"]["commit"])
    assert "makespan needs a GPU" in result.stderr
