"""The GPU engine's host side without a GPU: the runner, its slots, the ladder and the pace (``stand_in``)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import INTERPRET
from tests.gpu.stand_in import DIRECT, HOST, ONE, SHAPE, TWO, best, finish, prompts_of, replayed, start
from tests.tiny import LONG_ROPES, make_broken, make_checkpoint
from tpctl.distributed import TPGroup
from tpctl.engine import engine
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.partition.cuts import Range
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Abort, Add, Request
from tpctl.wire.report import TokenLogprob
from tpctl.wire.sampling import SamplingParams

__all__ = ["replayed"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRET, reason="GPUs run the whole engine: test_engine"),
]
PACKAGE = Path(engine.__file__).parent.parent


@pytest.mark.always
@pytest.mark.parametrize("way", ["graphs", "eager", "paced", "tight"])
def test_tokens_equal_transformers(way: str, tmp_path: Path, replayed: list[Hashable]) -> None:
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(3, 17, 36, 9, 50, 9)
    prompts["5"] = prompts["2"][:32] + prompts["5"]  # a shared prefix
    if way == "tight":  # each fits into a block, their answers not
        prompts = prompts_of(14, 15, 15)
    bytes_a_block = SHAPE["num_hidden_layers"] * 2 * 2 * 16 * 16 * 4
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
        "tight": {"kv_cache_memory": 6 * bytes_a_block},
    }[way]
    engine = start(tmp_path / "tp1", **settings)
    lengths = dict.fromkeys(prompts, 20 if way == "tight" else 4)
    if way == "paced":
        lengths["0"] = 12  # worth waiting for
    requests = [
        Request(id, ids, SamplingParams(max_tokens=lengths[id], ignore_eos=True)) for id, ids in prompts.items()
    ]
    found: dict[str, list[int]] = {id: [] for id in prompts}
    engine.apply(Add(requests))
    finish(engine, found)
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
        assert len(found[id]) == lengths[id]
    decodes = {key for key in replayed if key[0] != "mixed"}  # type: ignore[index]
    assert (len(decodes) > 0) == (way != "eager")
    assert decodes <= {(size, False, False, DIRECT) for size in (1, 2, 4, 6)}
    assert any(key[0] == "mixed" for key in replayed) == (way == "paced")  # type: ignore[index]
    stats = engine.scheduler.stats
    assert (stats.preemptions > 0) == (way == "tight")
    assert (stats.paced_steps > 0) == (way == "paced")


def test_slots_are_taken_over(tmp_path: Path, replayed: list[Hashable]) -> None:
    """Requests come and go, one is aborted while a step of its runs, and each has its own seed and temperature."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(5, 20, 33, 4, 18)
    greedy = SamplingParams(max_tokens=3, ignore_eos=True)
    warm = SamplingParams(max_tokens=5, temperature=0.8, seed=11, ignore_eos=True)
    alone: dict[str, list[int]] = {"warm": []}
    engine = start(tmp_path / "tp1", max_num_seqs=2)
    engine.apply(Add([Request("warm", prompts["1"], warm)]))
    finish(engine, alone)
    found: dict[str, list[int]] = {**{id: [] for id in prompts}, "warm": [], "gone": []}
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    engine.apply(Add([Request("gone", prompts["2"], long), Request("warm", prompts["1"], warm)]))
    for _ in range(4):
        for output in engine.step():
            found[output.id] += output.token_ids
    for output in engine.apply(Abort(["gone"])):
        assert output.finish_reason == "abort"
    engine.apply(Add([Request(id, ids, greedy) for id, ids in prompts.items()]))
    finish(engine, found)
    assert found["warm"] == alone["warm"]
    assert found["warm"] != best(model, prompts["1"], found["warm"])  # it was not greedy
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id]), id
    assert 0 < len(found["gone"]) < 40


@pytest.mark.always
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_log_probabilities_are_sampled_on_the_host(
    settings: dict[str, Any], tmp_path: Path, replayed: list[Hashable]
) -> None:
    """Beside requests that the device samples alone, and behind a step whose tokens are not back yet."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(5, 20)
    engine = start(tmp_path / "tp1", **settings)
    plain = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.apply(Add([Request("0", prompts["0"], plain)]))
    found: dict[str, list[int]] = {id: [] for id in prompts}
    logprobs: list[TokenLogprob] = []
    for step in range(40):
        if step == 3:
            wanted = SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True)
            engine.apply(Add([Request("1", prompts["1"], wanted)]))
        for output in engine.step():
            found[output.id] += output.token_ids
            logprobs += output.logprobs or []
    assert not engine.has_work
    for id, ids in prompts.items():
        assert found[id] == best(model, ids, found[id])
    with torch.no_grad():
        logits = model(torch.tensor([prompts["1"] + found["1"]])).logits[0, len(prompts["1"]) - 1 : -1]
    expected = logits.log_softmax(-1).amax(-1)
    assert len(logprobs) == 3
    assert ((2, False, False, HOST) in replayed) == ("enforce_eager" not in settings)  # up to the logits it is captured
    for (chosen, top), want, token in zip(logprobs, expected.tolist(), found["1"], strict=True):
        assert chosen == pytest.approx(want, abs=1e-4)
        assert top[0] == (token, chosen)
        assert len(top) == 2


FILTERED = {
    "0": SamplingParams(max_tokens=10, ignore_eos=True, top_p=0.5),
    "1": SamplingParams(temperature=1.5, top_k=9, seed=2, max_tokens=4, ignore_eos=True),
    "2": SamplingParams(temperature=1.2, top_k=30, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True),
    "3": SamplingParams(temperature=2.0, min_p=0.3, seed=4, max_tokens=4, ignore_eos=True),
    "4": SamplingParams(temperature=0.9, top_p=0.7, seed=1, max_tokens=4, ignore_eos=True),
    "5": SamplingParams(temperature=0.8, seed=5, max_tokens=4, ignore_eos=True),
}


@pytest.mark.always
@pytest.mark.parametrize("way", ["graphs", "paced"])
def test_the_device_samples_within_filters(way: str, tmp_path: Path, replayed: list[Hashable]) -> None:
    """The tokens that the CPU's sampler chooses, one request at a time, from whole logits."""
    model = make_checkpoint("qwen3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(3, 17, 36, 9, 50, 9)
    engine = start(tmp_path / "tp1", scheduling_policy="makespan" if way == "paced" else "fcfs")
    engine.runner.sampler.sample = None  # nothing asks it
    found: dict[str, list[int]] = {id: [] for id in prompts}
    engine.apply(Add([Request(id, ids, FILTERED[id]) for id, ids in prompts.items()]))
    finish(engine, found)
    vocab = engine.runner.loaded.config.vocab_size
    sampler = Sampler(TPGroup(), [Range(0, vocab)], vocab)
    for id, ids in prompts.items():
        with torch.no_grad():
            logits = model(torch.tensor([ids + found[id]])).logits[0, len(ids) - 1 : -1]
        rows = [SamplingRow(FILTERED[id], len(ids) + at) for at in range(len(found[id]))]
        assert found[id] == sampler.sample(logits, rows)[0], id
        assert len(found[id]) == FILTERED[id].max_tokens
    assert any(key[0] == "mixed" and key[-1] is TWO for key in replayed) == (way == "paced")  # type: ignore[index]
    assert {TWO} <= {key[-1] for key in replayed} <= {DIRECT, ONE, TWO}  # type: ignore[index]


BROKEN = 100


@pytest.mark.daily(2)
@pytest.mark.parametrize("way,helped", [("graphs", False), ("eager", True), ("paced", True)])
def test_rows_that_are_not_finite_end_and_others_go_on(
    way: str, helped: bool, tmp_path: Path, replayed: list[Hashable]
) -> None:
    """In every kind of step; the one after, which is under way already, is wasted on them. test_engine has all ways to
    sample in each."""
    make_broken("qwen3", tmp_path / "hf", BROKEN, **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = {
        id: [token if token != BROKEN else 3 for token in ids] for id, ids in prompts_of(3, 17, 36, 9, 50, 9).items()
    }
    more = {"logprobs": 2, "presence_penalty": 0.1, "min_tokens": 2} if helped else {}
    params = {id: replace(FILTERED[id], **more) for id in prompts}
    settings: dict[str, Any] = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "paced": {"scheduling_policy": "makespan"},
    }[way]
    clean = [Request(id, ids, params[id]) for id, ids in prompts.items()]
    want: dict[str, list[int]] = {id: [] for id in prompts}
    engine = start(tmp_path / "tp1", **settings)
    engine.apply(Add(clean))
    finish(engine, want)
    assert all(len(want[id]) == FILTERED[id].max_tokens for id in prompts)
    engine = start(tmp_path / "tp1", **settings)
    if not helped:
        engine.runner.sampler.sample = None  # nothing asks it
    broken = [
        Request("broken 0", [*prompts["2"][:34], BROKEN], params["0"]),
        Request("broken 2", [*prompts["2"], BROKEN, 7], params["2"]),
        Request("broken 5", [BROKEN], params["5"]),
    ]
    engine.apply(Add([broken[0], *clean[:3], broken[1], *clean[3:], broken[2]]))
    found: dict[str, list[int]] = {id: [] for id in [*prompts, "broken 0", "broken 2", "broken 5"]}
    errors: dict[str, str | None] = {}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.token_ids
            if output.finish_reason == "error":
                errors[output.id] = output.message
    engine.scheduler.check_integrity()
    assert {id: found[id] for id in prompts} == want
    assert sorted(errors) == ["broken 0", "broken 2", "broken 5"]
    for request in broken:
        assert found[request.id] == []
        assert f"not finite at position {len(request.token_ids)}: " in (errors[request.id] or "")


@pytest.mark.parametrize("way", ["graphs", "paced"])
def test_long_rope_changes_its_table_between_steps_that_overlap(
    way: str, tmp_path: Path, replayed: list[Hashable]
) -> None:
    shape = {**SHAPE, "rope_parameters": LONG_ROPES[8]}
    model = make_checkpoint("phi3-long-rope", tmp_path / "hf", **{k: v for k, v in shape.items() if k != "head_dim"})
    model.generation_config.eos_token_id = None
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    prompts = prompts_of(20, 22, 23, 24, 25, 40)
    prompts["1"] = prompts["5"][:22]
    engine = start(tmp_path / "tp1", scheduling_policy="makespan" if way == "paced" else "fcfs")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.apply(Add([Request(id, ids, params) for id, ids in prompts.items()]))
    found: dict[str, list[int]] = {id: [] for id in prompts}
    finish(engine, found)
    for id, prompt in prompts.items():
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert found[id] == answer[0, len(prompt) :].tolist(), id


def test_a_decode_step_can_be_read_through(tmp_path: Path, replayed: list[Hashable]) -> None:
    """All that runs in one step of decodes, from the scheduler to its tokens: docs/a-decode-step.md in lines.

    Counted are the functions whole, docstrings included; of kernels what launches them, not what a GPU runs.
    """
    make_checkpoint("llama3", tmp_path / "hf", **SHAPE)
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    made = start(tmp_path / "tp1")
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    made.apply(Add([Request(id, ids, params) for id, ids in prompts_of(5, 20).items()]))
    for _ in range(3):
        made.step()
    spans: dict[tuple[str, int], int] = {}

    def trace(frame: FrameType, event: str, given: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            owner = frame.f_globals.get(code.co_name)
            if owner is None or inspect.isfunction(owner):  # and none that Triton has compiled
                spans[code.co_filename, code.co_firstlineno] = len(inspect.getsource(code).splitlines())

    before = len(replayed)
    sys.setprofile(trace)
    try:
        made.step()
    finally:
        sys.setprofile(None)
    assert len(replayed) == before + 1
    files: dict[str, int] = {}
    for (file, _), lines in spans.items():
        name = str(Path(file).relative_to(PACKAGE))
        files[name] = files.get(name, 0) + lines
    print(*(f"{lines:5} {name}" for name, lines in sorted(files.items(), key=lambda item: -item[1])), sep="\n")
    assert {"engine/scheduling/scheduler.py", "models/decoder.py", "layers/stream_cuda.py"} <= files.keys()
    assert sum(files.values()) <= 1200
    page = (PACKAGE.parent / "docs" / "a-decode-step.md").read_text(encoding="utf-8")
    assert not [name for name in files if f"`{name}`" not in page]
