"""What streams of an answer come to is the answer, whatever was asked for: options are drawn, a fake engine answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response
from starlette.testclient import TestClient

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.made_tokenizers import NAMED, make
from tests.unit.running import until
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, HELLO, TEXT, events
from tests.unit.test_serve_responses import PATH as RESPONSES
from tests.unit.test_serve_responses import events as response_events
from tests.unit.test_serve_tools import CALL, FLAT, NOW, TOOLS
from tests.unit.tool_models import MODELS
from tpctl.client.tokenizer import Tokenizer

SAID = "Só: a<b, 🙂 ab.\nEnd"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def drawn(draw: random.Random, path: str, *limits: int) -> dict[str, Any]:
    """A body without its prompt; ``limits``: of tokens."""
    most = draw.choice(limits)
    if path == RESPONSES:
        told = {"include": ["message.output_text.logprobs"], "top_logprobs": draw.choice([0, 2])}
        body = {"max_output_tokens": most, **draw.choice([{}, told])}
    else:
        told = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": draw.choice([0, 2])}
        body = {"max_tokens": most, "n": draw.choice([1, 2]), **draw.choice([{}, told])}
    if draw.random() < 0.5:
        body["stop"] = draw.choice(["a", "b,", ["ó", "E"], "🙂", "S", ["zz", "\nE"], "End"])
    if draw.random() < 0.2:
        body["min_tokens"] = draw.choice([1, most])
    if path == TEXT and draw.random() < 0.5:
        body["echo"] = True
    return body


def calls_of(deltas: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Names and arguments of a chat's calls, put together of a stream's."""
    found: list[list[str]] = []
    for piece in chain.from_iterable(delta.get("tool_calls", ()) for delta in deltas):
        if "id" in piece:
            found.append([piece["function"]["name"], ""])
        found[piece["index"]][1] += piece["function"]["arguments"]
    return found


def joined(chunks: Iterable[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Choices as the whole answer has them, made of a stream's."""
    texts: defaultdict[int, list[str]] = defaultdict(list)
    logprobs: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    deltas: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for choice in chain.from_iterable(chunk["choices"] for chunk in chunks):
        at = choice["index"]
        assert at not in reasons, "something came behind the end"
        texts[at].append(choice["delta"].get("content", "") if path == CHAT else choice["text"])
        deltas[at].append(choice.get("delta", {}))
        logprobs[at] += [choice["logprobs"]] if choice["logprobs"] else []
        if choice["finish_reason"]:
            reasons[at] = choice["finish_reason"]
    each = [
        {name: list(chain.from_iterable(one[name] or () for one in logprobs[at])) for name in logprobs[at][0]}
        if logprobs[at]
        else None
        for at in sorted(reasons)
    ]
    return [
        {"text": "".join(texts[at]), "finish_reason": reasons[at], "logprobs": told, "calls": calls_of(deltas[at])}
        for at, told in zip(sorted(reasons), each, strict=True)
    ]


def plain(choice: dict[str, Any], path: str) -> dict[str, Any]:
    """A whole answer's choice in the form of ``joined``."""
    told = choice["logprobs"]
    if told is not None:
        told = {name: value or [] for name, value in told.items()}
    message = choice.get("message", {})
    calls = [list(call["function"].values()) for call in message.get("tool_calls", ())]
    text = message["content"] or "" if path == CHAT else choice["text"]
    return {"text": text, "finish_reason": choice["finish_reason"], "logprobs": told, "calls": calls}


def told_of(item: Any) -> dict[str, Any]:
    """An item of a response without the names that each answer has of its own."""
    found: dict[str, Any] = item.model_dump(exclude={"id", "call_id"})
    return found


def compare(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if path == RESPONSES:
        whole, found = Response.model_validate(answer.json(), strict=True), response_events(client, body)
        last = found[-1].response
        assert (last.status, last.usage) == (whole.status, whole.usage)
        assert list(map(told_of, last.output)) == list(map(told_of, whole.output))
        assert "".join(one.delta for one in found if one.type == "response.output_text.delta") == whole.output_text
        return
    asked = {**body, "stream_options": {"include_usage": True}}
    *chunks, usage = events(client, path, asked)
    choices = answer.json()["choices"]
    assert joined(chunks, path) == [plain(choice, path) for choice in choices]
    assert usage["usage"] == answer.json()["usage"] and usage["choices"] == []


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_a_stream_comes_to_the_whole_answer(tokenizer: Tokenizer, path: str, interval: int) -> None:
    draw = random.Random(interval)
    prompts = {CHAT: {"messages": HELLO}, TEXT: {"prompt": ["Once", "ü"]}, RESPONSES: {"input": "Hi"}}
    with served(tokenizer, FakeEngine(tokenizer, say=lambda *_: SAID), interval=interval) as (client, server):
        for _ in range(60):
            compare(client, path, {**prompts[path], **drawn(draw, path, 1, 2, 5, 9, 100)})
        until(lambda: not server.engines[0].open)
        assert not server.notes


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return MODELS["hermes"].tokenizer(tmp_path_factory.mktemp("calling"))


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_stream_with_calls_comes_to_the_whole_answer(calling: Tokenizer, path: str, interval: int) -> None:
    """Texts before, between and behind calls, ended by a stop text or by the limit of tokens anywhere."""
    draw = random.Random(interval)
    prompts = {CHAT: {"messages": HELLO, "tools": TOOLS}, RESPONSES: {"input": "Hi", "tools": FLAT}}
    said = [""]
    with served(calling, FakeEngine(calling, say=lambda *_: said[0], max_model_len=4096), interval=interval) as (
        client,
        server,
    ):
        for _ in range(60):
            told = [draw.choice(["", "ab", "Só: a", "zb\n", "b, <t", "E\n\nn"]) for _ in range(3)]
            said[0] = f"{told[0]}{CALL}{told[1]}{draw.choice([NOW, ''])}{told[2]}"
            part = calling.encode_rendered(said[0][: draw.randrange(1, len(said[0]))])
            compare(client, path, {**prompts[path], **drawn(draw, path, 400, len(part))})
        until(lambda: not server.engines[0].open)
        assert not server.notes


def test_offsets_are_those_of_the_text_that_is_returned(tmp_path: Path) -> None:
    """Whatever control tokens there are that it does not hold: before a prompt, or in the midst of an answer."""
    tokenizer = Tokenizer(make(tmp_path / "model", NAMED, adds_bos=True))
    prompts: list[Any] = ["abé", "<s>a</s>b", tokenizer.encode("</s>cd"), tokenizer.encode_rendered("e")]
    with served(tokenizer, FakeEngine(tokenizer, say=lambda *_: "x</s>y<|im_end|>é!")) as (client, _):
        for body in ({"echo": True}, {"echo": True, "n": 2, "stop": "é"}, {}, {"echo": True, "max_tokens": 0}):
            asked = {"prompt": prompts, "logprobs": 0, "max_tokens": 20, **body}
            compare(client, TEXT, asked)
            for choice in client.post(TEXT, json=asked).json()["choices"]:
                text, told = choice["text"], choice["logprobs"]
                assert not told["tokens"] or told["tokens"][0] in ("<s>", "e", "x")
                for token, at in zip(told["tokens"], told["text_offset"], strict=True):
                    left_out = token in tokenizer.special_tokens.values() or token == "<|im_end|>"
                    assert text[at:].startswith(token) or left_out or at >= len(text), (token, at, text)
                assert told["text_offset"] == sorted(told["text_offset"])
