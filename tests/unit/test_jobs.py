"""A batch's lines: each becomes a job, or one sentence that says why it is none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_runs import numbered
from tests.unit.fake_client import job_parser as parser
from tests.unit.fake_client import write_tokenizer
from tpctl.batch.formats.jsonl import JsonlReader, JsonlSource
from tpctl.client import jobs
from tpctl.client.forms import SAMPLING_FIELDS
from tpctl.client.jobs import BadLine, Job, Line, bounded_lines
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import SourceError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def parse(tokenizer: Tokenizer, entry: object, **sampling: Any) -> Job | BadLine:
    raw = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return parser(tokenizer, **sampling).parse(Line(0, 7, raw))


def test_a_prompt_line(tokenizer: Tokenizer) -> None:
    job = parse(tokenizer, {"prompt": "hi"}, temperature=0.5)
    assert isinstance(job, Job)
    assert (job.id, tokenizer.decode(job.token_ids), job.stop) == (7, "hi", ("default",))
    assert (job.sampling.max_tokens, job.sampling.temperature, job.sampling.seed) == (30, 0.5, 6)


def test_a_line_of_token_ids(tokenizer: Tokenizer) -> None:
    job = parse(tokenizer, {"prompt": [6, 5, 6]})
    assert isinstance(job, Job) and not job.chat and job.token_ids == [6, 5, 6]


def test_a_messages_line_with_its_own_sampling(tokenizer: Tokenizer) -> None:
    entry = {
        "id": "q",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 1,
        "seed": 9,
        "stop": "end",
        "stop_token_ids": [3],
    }
    job = parse(tokenizer, entry)
    assert isinstance(job, Job)
    assert (job.id, tokenizer.decode(job.token_ids), job.stop) == ("q", "[u]hi[a]", ("end",))
    assert (job.sampling.seed, job.sampling.temperature, job.sampling.stop_token_ids) == (9, 1.0, (3,))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b'{"prompt": "\xff"}', "is not UTF-8 (byte 13)"),
        (b'{"prompt": "a"\n', "is not JSON: Expecting ',' delimiter (column 15)"),
        (b"[" * 100_000, "is nested too deeply to be read"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "holds a number of too many digits"),
        ([1], "is [1], but must be a JSON object"),
        ({}, 'has neither "prompt" nor "messages"; give one of them'),
        ({"prompt": "a", "messages": []}, 'has both "prompt" and "messages"; give one of them'),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "prompt is 5, but must be a string, or a list of token ids"),
        ({"prompt": []}, "prompt is [], but must be a string, or a list of token ids"),
        ({"prompt": ["a"]}, 'prompt is ["a"], but must be a string, or a list of token ids'),
        ({"prompt": [5, True]}, "prompt has true at place 1, but begins with a token id"),
        ({"prompt": [5] * 64}, "the prompt has 64 tokens, but this engine takes at most 63"),
        ({"prompt": "a" * 64}, "the prompt has 64 tokens, but this engine takes at most 63"),
        ({"messages": []}, 'messages is [], but must be a list of {"role": "…", "content": "…"}, not empty'),
        ({"messages": "hi"}, 'messages is "hi", but must be a list of'),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}]},
            "message 1 has two different thoughts, as its reasoning_content and as its reasoning; leave one of",
        ),
        ({"messages": [{"role": "user"}]}, 'message 1 is {"role": "user"}, but must have a string as its content'),
        ({"messages": [{"role": "a", "content": "b"}, 5]}, "message 2 is 5, but must have a string as its role"),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "refuses these messages: not that"),
        (b'{"prompt": "\\ud800"}', r"not valid Unicode: it holds '\ud800', half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "a\\udfff"}]}', r"it holds '\udfff', half of a surrogate"),
        ({"prompt": "a", "colour": 1}, "unknown field 'colour'; known: chat_template_kwargs, choice, frequency_"),
        ({"prompt": "a", "colour": None}, "unknown field 'colour'; known: "),
        ({"prompt": "a", "temperature": "hot"}, 'temperature is "hot", but must be a number'),
        ({"prompt": "a", "max_tokens": "5"}, 'max_tokens is "5", but must be a whole number'),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos is 1, but must be true or false"),
        ({"prompt": None}, 'has neither "prompt" nor "messages"; give one of them'),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty is 2.5, but must be from -2 to 2"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty is -3.0, but must be from -2 to 2"),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens is -1, but must be at least 0"),
        ({"prompt": "a", "min_tokens": 31}, "min_tokens is 31, but must be at most 30, which is max_tokens"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, 'stop_token_ids is ["x"], but must be a list of whole numbers'),
        ({"prompt": "a", "top_p": 2}, "top_p is 2.0, but must be above 0 and at most 1"),
        ({"prompt": "a", "stop": ["b", ""]}, 'stop is ["b", ""], but must be a string or a list of strings'),
        ({"prompt": "a", "id": "\ud800"}, "the id is not valid Unicode"),
        ({"prompt": "a", "stop": ["b", "\ud800"]}, "the stop text is not valid Unicode"),
        (b'{"prompt": "a", "prompt": "b"}', 'is not valid: "prompt" occurs twice, as "a" and as "b"'),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', '"content" occurs twice'),
        ({"prompt": "a", "id": 1.5}, "id is 1.5, but must be a string or a whole number"),
    ],
)
def test_a_bad_line_says_what_and_where(tokenizer: Tokenizer, entry: object, message: str) -> None:
    bad = parse(tokenizer, entry)
    assert isinstance(bad, BadLine)
    assert bad.id == 7
    of_the_line = message.startswith(("is ", "has ", "holds ")) or "occurs twice" in message
    assert bad.message.startswith("line 7 " if of_the_line else "line 7: ")
    assert message in bad.message
    assert "\n" not in bad.message


def test_null_means_not_given(tokenizer: Tokenizer) -> None:
    names = ["id", "messages", "stop", *SAMPLING_FIELDS]
    job = parse(tokenizer, {"prompt": "a", **dict.fromkeys(names)}, temperature=0.5)
    plain = parse(tokenizer, {"prompt": "a"}, temperature=0.5)
    assert isinstance(job, Job)
    assert isinstance(plain, Job)
    assert (job.id, job.token_ids, job.sampling, job.stop) == (7, plain.token_ids, plain.sampling, plain.stop)
    chat = parse(tokenizer, {"messages": [{"role": "user", "content": "a"}], "prompt": None})
    assert isinstance(chat, Job)


def test_duplicate_ids(tokenizer: Tokenizer) -> None:
    lines = [
        '{"id": 2, "prompt": "a"}',
        '{"prompt": "b"}',
        '{"id": "2", "prompt": "c"}',
        '{"id": 2, "prompt": "d"}',
    ]
    read = parser(tokenizer)
    parsed = [read.parse(line) for line in numbered(io.BytesIO("\n".join(lines).encode()))]
    assert [type(item) for item in parsed] == [Job, BadLine, Job, BadLine]
    assert "id 2 was used before" in parsed[1].message  # type: ignore[union-attr]


@pytest.mark.parametrize(("first", "second"), [(-1, -2), (5, 5 + 2**61 - 1), (0, "0")])
def test_ids_that_hash_alike_are_not_duplicates(tokenizer: Tokenizer, first: object, second: object) -> None:
    read = parser(tokenizer)
    lines = [json.dumps({"id": id, "prompt": "a"}).encode() for id in (first, second, first)]
    parsed = [read.parse(Line(n, n + 1, line)) for n, line in enumerate(lines)]
    assert [type(item) for item in parsed] == [Job, Job, BadLine]


def test_blank_lines_count_as_lines_but_make_no_rows() -> None:
    lines = list(JsonlReader(io.BytesIO(b"\n  \na\n\nb"), JsonlSource(Path("x"))).lines())
    assert [(line.index, line.number) for line in lines] == [(0, 3), (1, 5)]


def test_a_line_without_an_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LONGEST_LINE", 1 << 20)
    longest = b"a" * ((1 << 20) - 1) + b"\n"
    assert list(bounded_lines(io.BytesIO(longest + b"\nb"), "x")) == [longest, b"\n", b"b"]
    with pytest.raises(SourceError, match=r"^line 2 of /dev/zero is longer than 1 MiB; a batch file has one request a"):
        list(bounded_lines(io.BytesIO(b"\n" + bytes(2 << 20)), "/dev/zero"))
