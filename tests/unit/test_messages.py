"""Messages survive the wire, and what is none is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.client.prepare import EngineArgs
from tpctl.wire.messages import (
    Abort,
    Add,
    Fatal,
    Found,
    GetStats,
    Message,
    Output,
    Outputs,
    Ready,
    Request,
    Stats,
    Stop,
    from_wire,
    to_wire,
)
from tpctl.wire.report import EngineInfo, EngineStats, TokenLogprob
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring, TokenScore
from tpctl.wire.settings import EngineChoices, EngineConfig

ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
sampling = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(1e-4, 5),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.1, 1),
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
outputs = st.builds(
    Output,
    id=st.text(),
    token_ids=ids,
    finish_reason=st.none() | st.sampled_from(["stop", "length", "abort", "error"]),
    message=st.none() | st.text(),
    logprobs=st.none() | st.just([TokenLogprob(-0.5, [(7, -0.5), (9, -1.25)])]),
    num_cached_tokens=st.integers(0, 9),
    scores=st.none() | st.just([TokenScore(-0.5), TokenScore(-2.0, 0.25, True)]),
    prompt_logprobs=st.none() | st.just([TokenLogprob(-0.5, [(7, -0.5)])]),  # made of its type, one may be NaN
)
scoring = st.none() | st.builds(Scoring, st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.none() | st.text())
infos = st.builds(EngineInfo, timings=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3))
messages = st.one_of(
    st.builds(Add, st.lists(st.builds(Request, st.text(), ids, sampling, scoring), max_size=3)),
    st.builds(Abort, st.lists(st.text(), max_size=3)),
    st.builds(Found, st.text(), st.none() | st.text()),
    st.sampled_from([GetStats(), Stop()]),
    st.builds(Ready, infos),
    st.builds(Outputs, st.lists(outputs, max_size=3)),
    st.builds(Stats, st.from_type(EngineStats)),
    st.builds(Fatal, st.text()),
)


@given(messages)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert from_wire(json.loads(json.dumps(to_wire(message)))) == message


def test_an_output_that_says_tokens_alone_is_short() -> None:
    """As hundreds of every step are; the time in which they are read counts."""
    outputs = [Output("0:1", [5, 6]), Output("0:2", [7], "stop"), Output("0:3", [8], num_cached_tokens=16)]
    wire = json.dumps(to_wire(Outputs(outputs)))
    assert wire.startswith('["Outputs", [["0:1", [5, 6]], ["0:2", [7], "stop", ')
    assert from_wire(json.loads(wire)) == Outputs(outputs)


def test_ids_that_are_not_packed_are_refused() -> None:
    name, ((id, _, sampling, scoring),) = to_wire(Add([Request("a", [5], SamplingParams())]))
    for wrong in ("!!!!", "AAAA"):
        with pytest.raises(ValueError):
            from_wire([name, [[id, wrong, sampling, scoring]]])


def test_an_unknown_message_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown message 'Dance'"):
        from_wire(["Dance", {}])


def test_what_is_asked_for_of_an_engine_reaches_its_ranks(tmp_path: Path) -> None:
    """Each choice, also one that is added later."""
    other = {"dtype": "float32", "kv_cache_dtype": "fp8", "attention_backend": "sdpa", "scheduling_policy": "auto"}
    chosen = {
        choice.name: other.get(choice.name, {"str": "ngram", "float": 0.5, "bool": True}.get(str(choice.type), 7))
        for choice in fields(EngineChoices)
    }
    assert all(chosen[choice.name] != choice.default for choice in fields(EngineChoices))
    settings = EngineArgs(device="cpu", **chosen).settle()
    EngineConfig(tmp_path, 1, **vars(settings)).save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json").choices == chosen
