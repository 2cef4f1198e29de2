"""What ``tpctl bench`` measures, and what it refuses to call a figure."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.bench import measure
from tpctl.bench.workload import make_workload
from tpctl.errors import EngineError
from tpctl.launch.messages import Output


class _Client:
    """An engine with a context of 16 tokens that is asked for nothing."""

    def __init__(self, config: Any) -> None:
        pass

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_ready(self) -> dict[str, Any]:
        return {"max_model_len": 16}


def test_time_per_token_needs_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EngineClient", _Client)
    config: Any = None
    with pytest.raises(EngineError, match="8 prompt tokens and 9 to generate are more than the 16 of --max-model-len"):
        measure.latency(config, 8, 8, 1)


def test_time_per_token_leaves_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EngineClient", _Client)
    monkeypatch.setattr(measure, "_timed", lambda client, request: 0.5 + 0.01 * (request.sampling.max_tokens - 1))
    config: Any = None
    figures, _ = measure.latency(config, 8, 5, 3)
    assert figures["tpot"].values == pytest.approx([10.0] * 3)
    assert figures["ttft"].values == pytest.approx([500.0] * 3)


def test_nano_is_the_peers_workload() -> None:
    work, shifted = make_workload("nano", 151936), make_workload("nano", 151936, shift=13)
    assert (len(work.requests), work.output_tokens) == (256, 133966)
    assert all(100 <= len(request.token_ids) <= 1024 for request in work.requests)
    assert {request.sampling.temperature for request in work.requests} == {0.6}
    assert all(a.token_ids[0] != b.token_ids[0] for a, b in zip(work.requests, shifted.requests, strict=True))
    assert len({request.id for request in [*work.requests, *shifted.requests]}) == 512


def test_an_answer_that_was_cut_short_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    work = make_workload("short", 100)

    class Short(_Client):
        def submit(self, requests: Any) -> None:
            self.left = list(requests)

        def outputs(self) -> list[Output]:
            request = self.left.pop()
            return [Output(request.id, [1] * (request.sampling.max_tokens - 1), "length")]

    monkeypatch.setattr(measure, "EngineClient", Short)
    config: Any = None
    tokens = work.output_tokens
    with pytest.raises(EngineError, match=f"produced {tokens - len(work.requests)} tokens instead of {tokens}"):
        measure.throughput(config, "short", 100, 1)
