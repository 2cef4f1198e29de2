"""Load of forms and of tools for a server, good ones, slow ones and malformed ones, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jsonschema

from tests.distributed.server_process import ServerProcess
from tests.distributed.soak_checks import Helpers, Memory, check
from tests.distributed.soak_client import Heard, answer, free, given_up, heard, idle, request
from tpctl.client.grammar_process import MOST as GRAMMARS
from tpctl.wire.guide import of_schema

TEMPLATES = 4  # processes for chat templates
AT_ONCE = 48
ROUNDS, MOST_ROUNDS = 8, 48


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

Right = Callable[[Heard], bool]


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        body: of the one of a number, so that no two are alike.
        statuses: any of which is right; ``right``: what must hold of an answer with status 200.
        share: how many there are in a round.
    """

    path: str
    body: Callable[[int], dict[str, Any]]
    statuses: tuple[int, ...] = (200,)
    right: Callable[[int, Heard], bool] = lambda number, found: bool(found.reason)
    share: int = 4


def person(number: int) -> dict[str, Any]:
    fields = {"number": {"const": number}, "name": {"type": "string", "maxLength": 4}, "kind": {"enum": ["a", "b"]}}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _matches(pattern: str, found: Heard) -> bool:
    return found.reason == "length" or re.fullmatch(pattern, found.text, re.DOTALL) is not None


def _validates(schema: Any, text: str, reason: str) -> bool:
    """Of what ended; what was cut off is the beginning of something that may be right."""
    if reason == "length":
        return True
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def slow_schema(number: int) -> dict[str, Any]:
    """Takes more than the time or the memory that a grammar may."""
    return of_schema({"type": "string", "allOf": [{"pattern": f"a{at}end{number}"} for at in range(40)]})


def slow_rules(number: int) -> str:
    """A grammar whose first mask takes a thread more than a second, for nothing."""
    size = 1600 + number % 97
    rules = [f'r{at}: r{(at + 1) % size} r{at * 7 % size}? r{at * 5 % size}? | /[a-z]/ | ""' for at in range(size)]
    return "\n".join(["start: r0 t*", "t: /[a-z]/", *rules])


def _text(number: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"{number}. Once", "max_tokens": 40, "stream": number % 2 == 0, **fields}


FORMS: Mapping[str, Kind] = {
    "regex": Kind(
        TEXT,
        lambda at: _text(at, regex=f"[a-z]{{3}}-{at}"),
        right=lambda at, found: _matches(f"[a-z]{{3}}-{at}", found),
    ),
    "choice": Kind(
        TEXT,
        lambda at: _text(at, choice=[f"yes{at}", f"no{at}"]),
        right=lambda at, found: found.reason == "stop" and found.text in (f"yes{at}", f"no{at}"),
    ),
    "json_schema": Kind(
        CHAT,
        lambda at: {
            "messages": [{"role": "user", "content": f"Who is {at}?"}],
            "response_format": of_schema(person(at)),
            "max_tokens": 60,
            "stream": at % 2 == 0,
        },
        right=lambda at, found: _validates(person(at), found.text, found.reason),
        share=8,
    ),
    "grammar": Kind(
        TEXT,
        lambda at: _text(at, grammar=f'start: "(" start ")" | /[xyz]/ "{at}"'),
        right=lambda at, found: _matches(rf"\(*[xyz]{at}\)*", found),
    ),
    "a schema that takes too long": Kind(
        TEXT, lambda at: _text(at, response_format=slow_schema(at)), (400, 503), share=1
    ),
    "rules that take too long": Kind(TEXT, lambda at: _text(at, grammar=slow_rules(at)), (400, 503), share=2),
    "a grammar without an end": Kind(TEXT, lambda at: _text(at, grammar=f'start: "{at}" start'), (400,), share=2),
    "half a grammar": Kind(TEXT, lambda at: _text(at, grammar=f"start: ({at}"), (400,)),
    "half a regex": Kind(TEXT, lambda at: _text(at, regex=f"({at}"), (400,)),
    "no choice": Kind(TEXT, lambda at: _text(at, choice=[]), (400,), share=1),
    "no schema": Kind(TEXT, lambda at: _text(at, response_format=of_schema({"type": f"kind{at}"})), (400,)),
    "an unknown keyword": Kind(
        TEXT, lambda at: _text(at, response_format=of_schema({"type": "array", "uniqueItems": True})), (400,), share=1
    ),
}


def _function(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters, **more}}


def _asked(number: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Who is {number}?"}]
    tools = [_function("find", person(number)), _function("stop", {"type": "object", "properties": {}})]
    return {"messages": messages, "tools": tools, "max_tokens": 80, "stream": number % 2 == 0, **fields}


def _called(number: int, found: Heard) -> bool:
    """One call or several, whose arguments are right; the last may be cut off."""
    *whole, (name, arguments) = found.calls or [("", "")]
    schemas = {"find": person(number), "stop": {"type": "object"}}
    right = all(_validates(schemas[one], text, "tool_calls") for one, text in whole)
    if found.reason == "length":
        return right and not found.text.strip("\n")
    return right and found.reason == "tool_calls" and _validates(schemas[name], arguments, "")


def _back(number: int) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"number": 1}'}}
    return [
        {"role": "user", "content": f"Who is {number}?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "nobody"},
    ]


FIND: Any = {"type": "function", "function": {"name": "find"}}
TOOLS: Mapping[str, Kind] = {
    "auto": Kind(CHAT, _asked, share=8),
    "auto, strict": Kind(CHAT, lambda at: _asked(at, tools=[_function("find", person(at), strict=True)])),
    "required": Kind(CHAT, lambda at: _asked(at, tool_choice="required"), right=_called, share=8),
    "one function": Kind(CHAT, lambda at: _asked(at, tool_choice=FIND), right=_called, share=8),
    "one call": Kind(
        CHAT,
        lambda at: _asked(at, tool_choice="required", parallel_tool_calls=False),
        right=lambda at, found: _called(at, found) and len(found.calls) <= 1,
    ),
    "a form beside": Kind(CHAT, lambda at: _asked(at, response_format=of_schema(person(at)))),
    "a result": Kind(CHAT, lambda at: _asked(at, messages=_back(at))),
    "an unknown function": Kind(
        CHAT,
        lambda at: _asked(at, tool_choice={"type": "function", "function": {"name": f"none{at}"}}),
        (400,),
    ),
    "a schema that takes too long": Kind(
        CHAT,
        lambda at: _asked(
            at,
            tool_choice="required",
            tools=[
                _function(
                    "find",
                    {
                        "type": "object",
                        "properties": {"a": slow_schema(at)["json_schema"]["schema"]},
                        "required": ["a"],
                        "additionalProperties": False,
                    },
                )
            ],
        ),
        (400, 503),
        share=1,
    ),
    "no schema": Kind(
        CHAT, lambda at: _asked(at, tools=[_function("find", {"type": f"kind{at}"}, strict=True)]), (400,)
    ),
    "no function": Kind(CHAT, lambda at: _asked(at, tools=[{"type": "function"}]), (400,), share=1),
    "a broken call": Kind(
        CHAT,
        lambda at: _asked(at, messages=[{"role": "assistant", "tool_calls": [{"id": at}]}]),
        (400,),
        share=1,
    ),
}


async def forms(server: ServerProcess, cache: int) -> None:
    await _soak(server, FORMS, cache)


async def tools(server: ServerProcess, cache: int) -> None:
    await _soak(server, TOOLS, cache)


async def _soak(server: ServerProcess, kinds: Mapping[str, Kind], cache: int) -> None:
    """Rounds of all kinds at once, of half as many again whose clients hang up."""
    draw = random.Random(0)
    gate = asyncio.Semaphore(AT_ONCE)
    memory, helpers = Memory(server, cache, helpers=True), Helpers(server, GRAMMARS + TEMPLATES)

    async def one(name: str, number: int) -> str:
        kind = kinds[name]
        raw = request(kind.body(number), kind.path)
        async with gate:
            found = heard(await answer(server, raw))
        right = found.status in kind.statuses and (found.status != 200 or kind.right(number, found))
        check(right, f"{name}, {number}: {found}")
        return f"{found.status} {found.reason}".strip()

    async def left(name: str, number: int) -> None:
        kind = kinds[name]
        async with gate:
            await given_up(server, request(kind.body(number), kind.path), draw.choice([0, 0.01, 0.1, 1.0]))

    for round in range(MOST_ROUNDS):
        started = time.monotonic()
        asked = [name for name, kind in kinds.items() for _ in range(kind.share)]
        draw.shuffle(asked)
        number = round * 1000
        each = [one(name, number + at) for at, name in enumerate(asked)]
        gone = [left(name, number + 500 + at) for at, name in enumerate(asked[::2])]
        answers, _ = await asyncio.gather(asyncio.gather(*each), asyncio.gather(*gone))
        free(server)
        idle(server)
        ends = ", ".join(f"{count} {end}" for end, count in sorted(Counter(answers).items()))
        seconds = time.monotonic() - started
        print(
            f"round {round + 1}: {len(answers)} answered ({ends}), {len(gone)} given up, in {seconds:.1f} s, "
            f"{memory.look()}, {helpers.look()}",
            flush=True,
        )
        if round + 1 >= ROUNDS and memory.steady():
            break
    memory.check()
    helpers.check()
