"""What a server has at a time of requests that are not an engine's yet, and of those that never will be."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Scope

from tests.unit.fake_client import INFO, write_tokenizer
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, TEXT, chat
from tests.unit.test_serve_pool import job
from tests.unit.test_serve_refusals import error
from tpctl.client import guides
from tpctl.client.forms import Wanted
from tpctl.client.openai_schemas import MOST_ITEMS, RESPONSES
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.asked import MOST_TOOLS
from tpctl.errors import RequestError
from tpctl.serve import answered, threads, tokens
from tpctl.serve.answered import encode
from tpctl.serve.asked import Reader, read_prompts
from tpctl.serve.bodies import read_object
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation
from tpctl.serve.memory import SMALL, Holding, Memory
from tpctl.serve.response_asked import read_response
from tpctl.serve.responses import ResponseWriter
from tpctl.serve.threads import Threads
from tpctl.serve.tokens import MOST_CHARACTERS, MOST_TOKENS
from tpctl.serve.weight import MOST_VALUES, Weight
from tpctl.wire.guide import Guide

PATIENCE = 60.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@contextmanager
def held(patch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Prompts wait to be tokenised until the block ends; the semaphore counts those that do."""
    begun, let = threading.Semaphore(0), threading.Event()
    made = Reader._texts

    def slow(self: Reader, *arguments: Any) -> Any:
        begun.release()
        assert let.wait(PATIENCE)
        return made(self, *arguments)

    patch.setattr(Reader, "_texts", slow)
    try:
        yield begun
    finally:
        let.set()


def test_what_is_being_tokenised_has_its_place_in_the_queue(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tokenizer, most=3) as (client, server), ThreadPoolExecutor(3) as clients:

        def ask(count: int) -> Any:
            return client.post(TEXT, json={"prompt": "ab", "n": count})

        with held(monkeypatch) as begun:
            first = clients.submit(ask, 2)
            assert begun.acquire(timeout=PATIENCE)
            response = clients.submit(ask, 2).result(PATIENCE)
            found = error(response, 429)
            assert response.headers["retry-after"] == "1" and found.code == "queue_full"
            assert "2 requests are under way or wait, and 2 more would be above the 3" in found.message
            second = clients.submit(ask, 1)
            assert begun.acquire(timeout=PATIENCE)
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 200
        assert ask(3).status_code == 200 and server.pool is not None and not server.pool.under_way


def read(pieces: list[bytes], holding: Holding, most: int = 1 << 30) -> Any:
    """What is made of a body that comes so."""
    left = iter(pieces)

    async def receive() -> Message:
        piece = next(left)
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    scope: Scope = {"type": "http", "headers": []}
    return asyncio.run(read_object(scope, receive, most, holding))


def body(size: int) -> list[bytes]:
    raw = json.dumps({"prompt": "x" * size}).encode()
    return [raw[at : at + 10_000] for at in range(0, len(raw), 10_000)]


class Unseen(list[Any]):
    """A list of which nobody is to look at all."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            assert number < 100
            yield self[number]


def test_a_prompt_of_millions_of_tokens_is_refused_by_their_number(tokenizer: Tokenizer) -> None:
    ids = Unseen([5] * 2_000_000)
    assert read_prompts(ids) == [ids] and read_prompts([ids]) == [ids]
    reader = Reader(tokenizer, {}, Threads())
    with pytest.raises(ApiError, match="the prompt has 2000000 tokens, but prompt and answer together may have 512"):
        asyncio.run(reader.texts([ids], Wanted({}, 1), replace(INFO, max_model_len=512)))


def test_long_bodies_together_have_no_more_than_their_part() -> None:
    memory = Memory(4_000_000)
    with Holding(memory) as first, Holding(memory) as second, Holding(memory) as third:
        read(body(900_000), first)
        with pytest.raises(ApiError, match=r"hold 99[0-9]\.[0-9] kB, and 10\.0 kB more would be above") as full:
            read(body(400_000), second)
        assert "above the 1.0 MB that --max-memory leaves for bodies of more than 64 KiB" in full.value.message
        assert (full.value.status, full.value.code, full.value.retry_after) == (429, "memory_full", 1)
        read(body(SMALL - 1000), third)  # as most are
        first.refused()
        second.refused()
        read(body(850_000), second)
    with Holding(memory) as again:
        read(body(900_000), again)
        with pytest.raises(ApiError, match="at most 950\\.0 kB are read"):
            read(body(1_900_000), again, 950_000)
        with Holding(memory) as other:  # what is too long is not kept
            read(body(900_000), other)
    with Holding(memory) as more:
        with pytest.raises(ApiError, match=r"more than 1\.0 MB in memory, .* than 64 KiB may of the 4\.0 MB") as one:
            read(body(1_100_000), more)
        assert (one.value.status, one.value.code) == (413, "body_too_large")
    assert memory.held == 0


def test_short_bodies_together_have_no_more_than_theirs() -> None:
    memory = Memory(4_000_000)
    with ExitStack() as stack:
        for _ in range(26):
            read(body(60_000), stack.enter_context(Holding(memory)))
        with pytest.raises(ApiError, match=r"above the 2\.0 MB that --max-memory leaves for bodies and prompts"):
            read(body(60_000), stack.enter_context(Holding(memory)))
    values = [b'{"user":[' + b"[]," * 20_000 + b"0]}"]  # 60 kB, which become 4 MB
    with (
        Holding(memory) as many,
        pytest.raises(ApiError, match=r"more than 2\.0 MB in memory, .* bodies and prompts may"),
    ):
        read(values, many)
    assert memory.held == 0


VALUES: list[tuple[str, int, int]] = [
    ("[],", 0, 1),
    ("[[]],", 0, 2),
    ("{},", 0, 1),
    ('{"a":1},', 1, 1),
    ('{"ab":"cd","ef":[1]},', 3, 2),
    ('"ab",', 1, 0),
    ('"' + "ab" * 500 + '",', 1, 0),
    ('"' + "ab" * 500 + "\u3042" + '",', 1, 0),
    ('"' + "ab" * 500 + "\U0001f600" + '",', 1, 0),
    ('"' + "ab" * 500 + "\\u3042" + '",', 1, 0),
    ('"' + "ab" * 500 + "\\ud83d\\ude00" + '",', 1, 0),
    ("999,", 0, 0),
    ("1.5,", 0, 0),
]
"""An item with the comma behind it, its strings, and its arrays and objects."""


@pytest.mark.parametrize(("item", "strings", "containers"), VALUES)
def test_what_a_body_takes_decoded_is_told_before_it_is_decoded(item: str, strings: int, containers: int) -> None:
    count = 200_000 // len(item.encode())
    raw = f'{{"user":[{item * count}0]}}'.encode()
    found = Weight.of(raw)
    assert (found.strings, found.containers) == (strings * count + 1, containers * count + 2)
    tracemalloc.start()
    try:
        decoded = msgspec.json.decode(raw)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(decoded["user"]) == count + 1
    assert size <= found.size <= 6 * size + 2 * len(raw)


@pytest.mark.parametrize("text", ['"[{,', "[" * 1000 + "\\", '\\"', '\\\\\n"{', "a\nb", "\\ud800"])
def test_what_stands_in_a_string_is_no_value(text: str) -> None:
    found = Weight.of(json.dumps({"prompt": [text, [text]] * 100}).encode())
    assert (found.strings, found.containers) == (201, 102)


@pytest.mark.parametrize("digits", ["7" * 65, "0." + "3" * 65, "0" * 65 + "e-300", "1e" + "0" * 65])
def test_numbers_have_so_many_digits_and_no_more(digits: str) -> None:
    """A body of long ones would hold the event loop for 0.8 s."""
    with Holding(Memory()) as share:
        with pytest.raises(ApiError, match="a number of more than 64 digits in a row; round it") as refused:
            read([b'{"prompt": "a", "seed": [1, ' + digits.encode() + b"]}"], share)
        assert refused.value.status == 400
    texts = {"prompt": ["7" * 100, '\\"' + "7" * 100, "é\\" + "0" * 1000], "seed": int("7" * 64), "top_p": 0.1}
    with Holding(Memory()) as share:
        assert read([json.dumps(texts).encode()], share) == texts


def test_a_body_has_so_many_values_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(raw: bytes) -> str:
        with Holding(Memory(1 << 40)) as share, pytest.raises(ApiError) as found:
            read([raw], share)
        assert (found.value.status, found.value.code) == (413, "body_too_large")
        return found.value.message

    with Holding(Memory(1 << 40)) as share:
        most = MOST_VALUES - 3  # beside the object, its key and the list
        assert len(read([b'{"user":[' + b"[]," * most + b"0]}"], share)["user"]) == most + 1
        assert read([json.dumps({"prompt": "[{,}]" * MOST_VALUES}).encode()], share)
        monkeypatch.setattr(msgspec.json, "decode", None)  # which is not asked
        assert "has 262145 strings, arrays and objects or more, but at" in refused(
            b'{"user":[' + b"[]," * (most + 1) + b"0]}"
        )
        assert "has 300001 strings, arrays and objects or more" in refused(b'{"user":[' + b'"a",' * 300_000 + b"0]}")
        assert "has 1000000 strings, arrays and objects or more" in refused(b"[" * 1_000_000)


def test_what_bodies_take_decoded_is_counted() -> None:
    ids = json.dumps({"prompt": [999] * 100_000}, separators=(",", ":")).encode()  # 400 kB, which become 4.4 MB
    memory = Memory(40_000_000)
    with Holding(memory) as first, Holding(memory) as second, Holding(memory) as third:
        read([ids], first)
        read([ids], second)
        with pytest.raises(ApiError, match=r"hold 9\.[0-9] MB, and 4\.[0-9] MB more would be above the 10\.0 MB"):
            read([ids], third)


def test_tools_and_items_are_refused_by_their_number() -> None:
    tools = Unseen([{"type": "function", "name": "a"}] * (MOST_TOOLS + 1))
    with pytest.raises(RequestError, match="tools has 1025 functions, but must be a list of at most 1024"):
        read_response({"input": "a", "tools": tools})
    items = Unseen([{"role": "user", "content": "a"}] * (MOST_ITEMS + 1))
    with pytest.raises(RequestError, match="input has 8193 items, but at most 8192 are taken; leave some out"):
        read_response({"input": items})


def test_a_body_has_its_room_until_it_has_become_prompts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"prompt": [5] * 60_000}
    with served(tokenizer, max_memory=60 << 20) as (client, _), ThreadPoolExecutor(32) as clients:
        with held(monkeypatch) as begun:
            waiting = [clients.submit(client.post, TEXT, json=long) for _ in range(24)]
            until(lambda: any(one.done() for one in waiting))
            refused = next(one for one in waiting if one.done()).result()
            assert error(refused, 429).code == "memory_full"
            small = clients.submit(client.post, TEXT, json={"prompt": "ab"})
            assert begun.acquire(timeout=PATIENCE)
        assert small.result(PATIENCE).status_code == 200
        assert {one.result(PATIENCE).status_code for one in waiting} == {400, 429}  # 60,000 tokens are too many
        assert error(client.post(TEXT, json=long), 400).code == "context_length_exceeded"


def test_a_response_has_room_for_what_it_repeats_until_its_end(tokenizer: Tokenizer) -> None:
    function = {"name": "a", "description": "x" * 200_000}
    long = {"tools": [{"type": "function", **function}], "tool_choice": "none"}
    of_chat = chat(tools=[{"type": "function", "function": function}], tool_choice="none")
    with served(tokenizer, max_memory=7 << 20) as (client, server), ThreadPoolExecutor(40) as clients:
        gate = server.engines[0].gate
        gate.clear()
        try:
            waiting = [clients.submit(client.post, RESPONSES, json={**long, "input": "a"}) for _ in range(24)]
            until(lambda: sum(one.done() for one in waiting) == 16)  # beside 8 times 225 kB of 1.8 MB
            assert {error(one.result(), 429).code for one in waiting if one.done()} == {"memory_full"}
            small = clients.submit(client.post, RESPONSES, json={"input": "a"})
        finally:
            gate.set()
        found = [one.result(PATIENCE) for one in waiting]
        assert sorted(one.status_code for one in found) == [200] * 8 + [429] * 16
        assert small.result(PATIENCE).status_code == 200
        assert server._app is not None and server._app.memory.held == 0
        gate.clear()
        try:  # a chat repeats nothing
            waiting = []
            while len(waiting) < 20:
                waiting.append(clients.submit(client.post, CHAT, json=of_chat))
                until(lambda: server.pool is not None and server.pool.under_way == len(waiting))
        finally:
            gate.set()
        assert {one.result(PATIENCE).status_code for one in waiting} == {200}


def test_an_answer_keeps_nothing_of_what_it_does_not_repeat(tokenizer: Tokenizer) -> None:
    body = {"input": [{"role": "user", "content": "a" * 50}], "user": ["b" * 50], "metadata": {"a": "b"}}
    asked = read_response(body)
    seen, prompt = weakref.ref(asked), job(tokenizer, "a")
    writer = ResponseWriter("demo", asked, prompt, Generation(prompt.streams, lambda: None), tokenizer)
    assert 0 < asked.size < 2000 and "bbb" not in str(asked.said)
    del asked
    assert seen() is None and writer.whole()["metadata"] == {"a": "b"}


def test_a_form_that_takes_long_to_look_at_holds_up_no_others(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, begun = threading.Event(), threading.Semaphore(0)

    def tried(guide: Guide) -> None:
        if guide.text == "known":
            return
        begun.release()
        assert let.wait(PATIENCE)

    monkeypatch.setattr(guides, "_tried", tried)
    with served(tokenizer) as (client, _), ThreadPoolExecutor(18) as clients:
        assert client.post(TEXT, json={"prompt": "ab", "regex": "known"}).status_code == 200
        asked = [clients.submit(client.post, TEXT, json={"prompt": "a", "regex": f"a{n}"}) for n in range(16)]
        try:
            assert all(begun.acquire(timeout=PATIENCE) for _ in range(2))  # half of what there is, for one client
            plain = clients.submit(client.post, TEXT, json={"prompt": "ab"}).result(PATIENCE)
            assert plain.json()["choices"][0]["text"] == "<ab>"
            known = clients.submit(client.post, TEXT, json={"prompt": "ab", "regex": "known"}).result(PATIENCE)
            assert known.json()["choices"][0]["text"] == "<ab>" and not begun.acquire(blocking=False)
        finally:
            let.set()
        assert {one.result(PATIENCE).status_code for one in asked} == {200}


def test_what_is_only_tokenised_has_bounds(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        for asked, what in (
            ({"prompt": "a" * (MOST_CHARACTERS + 1)}, "prompt"),
            ({"messages": [{"role": "user", "content": "a" * MOST_CHARACTERS}]}, "messages"),
        ):
            found = error(client.post("/tokenize", json=asked), 400)
            assert f"but at most {MOST_CHARACTERS} are tokenised at once" in found.message and found.param == what
        found = error(client.post("/detokenize", json={"tokens": [5] * (MOST_TOKENS + 1)}), 400)
        assert found.message.startswith(f"tokens has {MOST_TOKENS + 1} tokens, but at most {MOST_TOKENS} are taken")


def test_what_is_only_tokenised_waits_for_itself_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    let = threading.Event()
    monkeypatch.setattr(tokens, "encode", lambda value: encode(value) if let.wait(PATIENCE) else b"")
    monkeypatch.setattr(threads, "MOST_ASIDE", 16)
    with served(tokenizer) as (client, _), ThreadPoolExecutor(32) as clients:
        asked = [clients.submit(client.post, "/detokenize", json={"tokens": [5]}) for _ in range(20)]
        try:
            until(lambda: sum(one.done() for one in asked) == 4)
            assert client.post(TEXT, json={"prompt": "ab"}).json()["choices"][0]["text"] == "<ab>"
            refused = [error(one.result(), 429) for one in asked if one.done()]
            assert len(refused) == 4 and {one.code for one in refused} == {"queue_full"}
        finally:
            let.set()
        assert sorted(one.result(PATIENCE).status_code for one in asked) == [200] * 16 + [429] * 4


def test_answers_are_made_json_by_no_thread_that_reads_prompts(tokenizer: Tokenizer) -> None:
    """Nor by the event loop's, where they may be long."""
    with served(tokenizer) as (client, _), pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []

        def noted(value: Any) -> bytes:
            seen.append(threading.current_thread().name.rpartition("_")[0])
            return encode(value)

        patch.setattr(answered, "encode_pieces", noted)
        patch.setattr(tokens, "encode", noted)
        assert client.post(TEXT, json={"prompt": "ab"}).status_code == 200
        assert client.post("/tokenize", json={"prompt": "ab"}).json()["count"] == 2
        assert client.post("/detokenize", json={"tokens": [5]}).status_code == 200
        assert seen == ["tpctl-serve-answers", "tpctl-serve-aside", "tpctl-serve-aside"]


def until(condition: Callable[[], object]) -> None:
    event = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError
