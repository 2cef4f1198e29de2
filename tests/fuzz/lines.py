"""Batch files: lines that are right, half right, or nothing at all."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import Draw, broken_bytes, json_bytes, json_values

RIGHT: list[dict[str, Any]] = [
    {"prompt": "Once upon"},
    {"id": "a", "prompt": "x"},
    {"id": 7, "prompt": "café", "max_tokens": 2},
    {"id": "chat", "messages": [{"role": "user", "content": "Why?"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "temperature": 0.7},
    {"prompt": "p", "stop": ["z"], "logprobs": 2, "seed": 3, "top_k": 2, "top_p": 0.5, "min_p": 0.1},
    {"prompt": "p", "repetition_penalty": 1.1, "stop_token_ids": [5], "ignore_eos": True},
]
_MESSAGES: list[Any] = [
    None,
    [],
    {},
    "hi",
    [None],
    ["hi"],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": 5, "content": "x"}],
    [{"role": "tool", "content": "x"}],
    [{"role": "\x1b[31m", "content": "\x1b[31m\x00"}],
    [{"role": "user", "content": "x" * 100_000}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": "{"}}], "reasoning": "r"}],
    [{"role": "user", "content": "x"}] * 2000,
    [{"role": "system", "content": "x"}],
]
_SCHEMAS: list[dict[str, Any]] = [
    {"type": "x"},
    {"$ref": "#"},
    {"$ref": "file:///etc/passwd"},
    {"enum": []},
    {"allOf": [{"type": "null"}, {"type": "integer"}]},
    {"type": "string", "pattern": "("},
    {"minItems": -1, "type": "array"},
    {"minimum": 1e308, "type": "integer"},
    {"const": "x" * 100_000},
]
_FIELDS: dict[str, list[Any]] = {
    "id": [None, "", "a", 0, -1, 2**64, 1.5, True, [], {}, "\x1b[31m", "x" * 10_000, "\n"],
    "prompt": [
        None,
        "",
        " ",
        5,
        [],
        ["a"],
        [1, 2],
        "\x00",
        "\ufeff",
        "x" * 64,
        "x" * 63,
        "x" * 62,
        "x" * 1_000_000,
        "</s>",
        "<s>a",
    ],
    "messages": _MESSAGES,
    "stop": [None, "", [], [""], "a", ["a", "b"], [None], 5, {}, ["x" * 100_000], ["a"] * 10_000, "\n"],
    "stop_token_ids": [None, [], [0], [-1], [264], [10**9], [2**63], ["a"], [True], 5, [1.0], list(range(5000))],
    "max_tokens": [None, 0, 1, 2, 64, 10**9, -1, 1.0, 1.5, "1", True],
    "min_tokens": [None, 0, 1, 5, 100, -1, "1"],
    "temperature": [None, 0, 0.0, -0.0, 1, 1e-300, 1e300, -1, "1", True],
    "top_p": [None, 0, 1e-9, 1, 1.1, -0.1, "1"],
    "top_k": [None, 0, 1, -1, 264, 10**9, 2**63, 1.0, "1"],
    "min_p": [None, 0, 1, 1.1, -1],
    "repetition_penalty": [None, 0, 1, 1e-300, 1e300, -1, 2],
    "presence_penalty": [None, 0, 2, -2, 3, "1"],
    "frequency_penalty": [None, 0, 2, -2, 1e300],
    "seed": [None, 0, -1, 2**63 - 1, 2**63, 2**64, 1.5, "1"],
    "logprobs": [None, 0, 1, 5, 20, 21, -1, 10**9, True, "1"],
    "prompt_logprobs": [None, 0, 1, 20, 21, -1, True],
    "response_format": [
        *(None, {}, [], "json", {"type": "text"}, {"type": "json_object"}, {"type": ["x"]}, {"type": "json_schema"}),
        *({"type": "json_schema", "json_schema": asked} for asked in (None, {}, {"schema": 5}, {"schema": {}})),
        *({"type": "json_schema", "json_schema": {"schema": schema}} for schema in _SCHEMAS),
    ],
    "regex": [None, "", "a+", "(", "[", "\\", "a{1000000000}", "(" * 2000, "(?i)(?<x>a)", "\x00", 5, "\ud800", "/"],
    "choice": [None, [], [""], ["a"], "a", [5], ["a"] * 3000, ["\n", '"', "\\", "\x00"], {}],
    "grammar": [None, "", "start: start", 'start: "a"', "start:", "start: " + "(" * 5000, "a: b", "%import x", 5],
    "ignore_eos": [None, True, False, 1, "true"],
    "chat_template_kwargs": [None, {}, {"a": 1}, {"messages": []}, {"enable_thinking": False}, [], "x"],
    "max_completion_tokens": [5],
    "model": ["x"],
    "__class__": [1],
    "": [1],
}
_GARBAGE = [
    *(
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"nul",
        b"{}",
        b"NaN",
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b"\xef\xbb\xbf{}",
    ),
    *(
        b'{"prompt": "a"} {"prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "prompt": ""}',
        b"\x00",
        b"\x1b[31m",
    ),
    *(b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "seed": 1e999}', b'{"id": 9' + b"9" * 5000 + b"}"),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt":"a\rb"}',
        b'{"prompt": "a\\u2028b"}',
        b'{"prompt": "a"}\r',
        b"  ",
        b"\t",
    ),
    *(
        b'{"prompt": "\xe2\x80\xa8"}',
        b"'{}'",
        b'{"id": "\\ud800", "prompt": "a"}',
        b"\x0b{}\x0c",
        b'{"prompt": "a"}' + b" " * 100_000,
    ),
]


@st.composite
def _line(draw: Draw) -> tuple[bytes, str]:
    way = draw(st.integers(0, 9))
    right = draw(st.sampled_from(RIGHT))
    if way <= 2:
        return json.dumps(right, ensure_ascii=draw(st.booleans())).encode(), "right"
    if way == 3:
        return draw(st.sampled_from(_GARBAGE)), "garbage"
    if way == 4:
        content, why = draw(broken_bytes(json.dumps(right).encode()))
        return content.replace(b"\n", b" "), why
    value, why = draw(json_values(right, _FIELDS))
    return draw(json_bytes(value)).replace(b"\n", b" "), why


@st.composite
def line_files(draw: Draw) -> tuple[bytes, str]:
    """The bytes of a batch file, and what is wrong with each line."""
    lines = draw(st.lists(_line(), max_size=6))
    end = draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\n"]))
    content = end.join(content for content, _ in lines) + draw(st.sampled_from([b"", end]))
    return content, " | ".join(why for _, why in lines)
