"""A soak says what is left, and ends where a request failed or a block was lost; engines of real layers lose none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_client import engine_stats
from tests.unit.soaking import SHAPES, parts
from tpctl.bench.mixed import mixed_requests, soak
from tpctl.errors import EngineError
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineStats


class _Client:
    """An engine that ends two requests a call, keeps ``lost`` of its blocks, and fails request ``bad``."""

    def __init__(self, lost: int = 0, bad: str = "") -> None:
        self.lost, self.bad = lost, bad
        self.open: dict[str, Request] = {}
        self.given_up: list[str] = []

    def submit(self, requests: list[Request]) -> None:
        self.open |= {request.id: request for request in requests}

    def abort(self, ids: list[str]) -> None:
        self.given_up += ids

    def outputs(self, timeout: float) -> list[Output]:
        ended = []
        for request in list(self.open)[:2]:
            del self.open[request]
            reason = "error" if request == self.bad else "abort" if request in self.given_up else "length"
            ended.append(Output(request, [], reason, message="why" if reason == "error" else ""))
        return ended

    def stats(self) -> EngineStats:
        return engine_stats(num_blocks=8, free_blocks=8 - self.lost)


def test_every_request_ends_once_and_some_are_given_up() -> None:
    client: Any = _Client()
    parts = list(soak(client, mixed_requests(200, 500), 50))
    assert [sum(part.ended.values()) for part in parts] == [50, 100, 150, 200]
    assert set(parts[-1].ended) == {"length", "abort"}


@pytest.mark.parametrize(
    ("faults", "said"), [({"lost": 3}, "3 of 8 KV blocks were not freed"), ({"bad": "17"}, "request 17 failed: why")]
)
def test_a_fault_ends_it(faults: dict[str, Any], said: str) -> None:
    client: Any = _Client(**faults)
    with pytest.raises(EngineError, match=said):
        list(soak(client, mixed_requests(50, 500), 25))


def test_requests_are_mixed() -> None:
    requests = mixed_requests(400, 300, longest=30)
    assert all(1 <= len(request.token_ids) <= 50 and max(request.token_ids) < 300 for request in requests)
    assert len({tuple(request.token_ids[:20]) for request in requests if len(request.token_ids) > 20}) < 300
    ways = {repr((r.sampling.temperature, r.sampling.top_k, r.sampling.top_p, r.sampling.logprobs)) for r in requests}
    assert len(ways) > 5


@pytest.mark.parametrize("name", SHAPES)
def test_engines_lose_no_block_and_no_state(name: str, tmp_path: Path) -> None:
    """Of experts, of two pools, of recurrent layers: preempted, given up, found again, drafted for."""
    last, _ = parts(name, tmp_path, 60, 60)[-1]
    stats = last.stats
    assert sum(last.ended.values()) == 60 and set(last.ended) == {"length", "abort"}
    assert stats.prefix_cache_hit_tokens > 0
    assert stats.preemptions > 0 or name == "qwen3_next"  # where slots for states run out first
    assert (stats.draft_tokens > 0) == ("speculate" in SHAPES[name][1])
