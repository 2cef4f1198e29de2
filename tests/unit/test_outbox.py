"""The log-probabilities of a long prompt keep no other request's tokens waiting, and come whole and in order."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.engine.outbox import TOGETHER, Outbox
from tpctl.engine.worker import serve
from tpctl.serve.generation import Generation
from tpctl.wire.messages import Abort, Message, Output, Outputs, Stop, to_wire
from tpctl.wire.report import TokenLogprob

LIKELIEST = 20
LONG = [TokenLogprob(-0.5 - at, [(at + n, -0.123456789 * n) for n in range(LIKELIEST)]) for at in range(20_000)]
"""Of a prompt of 20,001 tokens: 10 MB of JSON."""


def rows(outputs: list[Output], id: str) -> list[TokenLogprob]:
    return [row for one in outputs if one.id == id for row in one.prompt_logprobs or ()]


class Steps:
    """An engine in whose second step a long prompt's log-probabilities come, beside another request's tokens."""

    def __init__(self, steps: int) -> None:
        self.outputs = deque([[Output("b", [number])] for number in range(steps)])
        self.outputs[1] += [Output("a", [5], prompt_logprobs=LONG)]
        self.outputs[2] += [Output("a", [6], "length")]
        self.runner = SimpleNamespace(rest=lambda: False)

    @property
    def has_work(self) -> bool:
        return bool(self.outputs)

    def patience(self) -> float:
        return 0.0

    def apply(self, message: Message) -> list[Output]:
        return []

    def step(self) -> list[Output]:
        return self.outputs.popleft() if self.outputs else []


class Feed:
    """Notes what is sent, and stops once there is nothing left to wait for but messages. ``late``: some that come."""

    def __init__(self, late: dict[int, Message] | None = None) -> None:
        self.sent: list[list[Output]] = []
        self._late = late or {}

    def next(self, wait: bool, patience: float = 0.0) -> list[Message]:
        return [Stop()] if wait else [self._late.pop(len(self.sent))] if len(self.sent) in self._late else []

    def send(self, message: Message) -> None:
        assert isinstance(message, Outputs)
        self.sent.append(message.outputs)


def test_a_token_waits_for_a_message_of_pieces_and_not_for_all() -> None:
    feed = Feed()
    serve(Steps(200), feed)  # type: ignore[arg-type]
    assert len(json.dumps(to_wire(Outputs([Output("a", [], prompt_logprobs=LONG)])))) > 9_000_000
    assert max(len(json.dumps(to_wire(Outputs(one)))) for one in feed.sent) < 150_000
    tokens = [[token for output in one if output.id == "b" for token in output.token_ids] for one in feed.sent]
    assert tokens == [[number] for number in range(200)]
    told = [output for one in feed.sent for output in one]
    assert rows(told, "a") == LONG
    assert [one.token_ids for one in told if one.id == "a" and one.token_ids] == [[5], [6]]
    assert [one.finish_reason for one in told if one.id == "a"][-1] == "length"


def test_what_is_left_is_told_when_nothing_else_is_computed() -> None:
    feed = Feed()
    serve(Steps(3), feed)  # type: ignore[arg-type]
    told = [output for one in feed.sent for output in one]
    assert rows(told, "a") == LONG and told[-1] == Output("a", [6], "length")


def test_what_nobody_wants_any_more_is_not_told() -> None:
    feed = Feed({6: Abort(["a", "c"])})
    serve(Steps(3), feed)  # type: ignore[arg-type]
    assert feed.sent[6:] == [[Output("a", [], "abort")]]  # which had ended


def test_an_abort_of_what_goes_on_is_the_engine_s_to_tell() -> None:
    outbox = Outbox()
    outbox.told([Output("a", [5], prompt_logprobs=LONG)])
    assert outbox and outbox.abort(["a"]) == [] and not outbox


def test_several_go_one_after_the_other_and_short_ones_at_once() -> None:
    outbox = Outbox()
    few = LONG[: TOGETHER // (1 + LIKELIEST) // 2]
    outputs = [Output(id, [1], "length", prompt_logprobs=which) for id, which in (("a", LONG), ("b", few), ("c", []))]
    told = outbox.told(outputs)
    assert [one.id for one in told] == ["c", "a"]
    sizes = []
    while outbox:
        more = outbox.told([])
        sizes.append(sum(len(one.prompt_logprobs or ()) * (1 + LIKELIEST) for one in more))
        told += more
    assert max(sizes) <= TOGETHER and min(sizes[:-1]) > TOGETHER - 1 - LIKELIEST
    assert rows(told, "a") == LONG and rows(told, "b") == few and not outbox.told([])
    assert outbox.told([Output("d", [1], prompt_logprobs=few)]) == [Output("d", [1], prompt_logprobs=few)]


def test_pieces_are_put_together_where_they_come(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    outbox, stream = Outbox(), TextStream(tokenizer)
    generation = Generation([stream], lambda: None)
    left: list[Any] = [Output("a", tokenizer.encode("x"), prompt_logprobs=LONG)]
    while left or outbox:
        for output in outbox.told(left):
            assert not generation.push(0, output)
            assert bool(generation._pieces) == bool(output.token_ids)  # what is of the prompt alone is no news
        left = []
    assert stream.prompt_logprobs == LONG and stream.text == "x"


@pytest.mark.parametrize("top", [0, 20])
def test_one_is_told_even_if_it_is_more_than_a_message_has_room_for(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpctl.engine.outbox.TOGETHER", 3)
    outbox = Outbox()
    told = outbox.told([Output("a", [1], prompt_logprobs=[TokenLogprob(-1.0, [(1, -1.0)] * top)] * 7)])
    while outbox:
        told += outbox.told([])
    assert len(rows(told, "a")) == 7 and told[-1].token_ids == [1]
