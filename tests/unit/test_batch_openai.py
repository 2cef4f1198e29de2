"""OpenAI's batch lines: files made with its client's types are answered, and what comes out is read by them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from tests.unit.batch_formats_run import answer, read_lines, write_lines
from tests.unit.batch_replicas import Died, Replicas, finish, left_over, parts_of, rows_of
from tests.unit.fake_client import FakeClient, write_tokenizer
from tests.unit.openai_lines import answers, chat, line
from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import Asked, FormatSpec, by_first_line, choose
from tpctl.batch.formats.jsonl import JsonlReader, JsonlSource
from tpctl.batch.formats.openai import OPENAI
from tpctl.batch.formats.place import Formats
from tpctl.client.batch import CHOICES_APART
from tpctl.client.jobs import Line
from tpctl.client.openai_fields import CHAT, TEXT
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError, SourceError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_file_of_the_clients_types_goes_in_and_they_read_what_comes_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompts = write_lines(
        tmp_path / "in.jsonl",
        [
            line("chat", chat("Hi", max_completion_tokens=30, logprobs=True, top_logprobs=1, temperature=0.5)),
            line("parts", ChatParams(model="gpt", messages=[{"role": "user", "content": parts}])),
            line("text", TextParams(model="gpt", prompt="Once", logprobs=1, stop="c", seed=-1), TEXT),
            line("several", chat("Yo", n=3, seed=5, temperature=1.0)),
            line("nulls", {**chat("Hi"), "n": None, "tools": None, "stop": None, "response_format": None}, more=None),
        ],
    )
    fake = FakeClient(tokenizer)
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl", fake=fake).errors == 0
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == ["chat", "parts", "text", "several", "nulls"]
    assert len({row["id"] for row in rows}) == 5
    found = answers(rows)
    assert found["chat"].choices[0].message.content == "<[u]Hi[a]>" and found["chat"].model == "echo"
    assert found["chat"].usage.total_tokens == len("[u]Hi[a]") + len("<[u]Hi[a]>") + 1
    tokens = found["chat"].choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith("<[u]") and tokens[1].bytes == [ord("[")]
    assert tokens[0].top_logprobs[0].logprob == -0.5
    assert found["parts"].choices[0].message.content == "<[u]a\nb[a]>"
    text = found["text"].choices[0]
    assert (text.text, text.finish_reason) == ("<On", "stop")
    assert text.logprobs.text_offset[:3] == [0, 1, 2] and text.logprobs.tokens[:3] == ["<", "O", "n"]
    assert [choice.index for choice in found["several"].choices] == [0, 1, 2]
    assert found["several"].usage.prompt_tokens == len("[u]Yo[a]")
    assert found["several"].usage.completion_tokens == 3 * (len("<[u]Yo[a]>") + 1)
    seeds = [request.sampling.seed for request in fake.requests if request.id.startswith("3.")]
    assert seeds == [5, 5 + CHOICES_APART, 5 + 2 * CHOICES_APART]
    assert next(request.sampling.seed for request in fake.requests if request.id == "2") == 2**63 - 1


def test_whose_fault_an_error_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = [
        line("engine", {"prompt": "refuse"}, TEXT),
        line("form", chat("a", regex="stuck", n=2)),
        line("effort", chat("a", reasoning_effort="low")),
        line("length", chat("a", max_completion_tokens=0)),
    ]
    prompts = write_lines(tmp_path / "in.jsonl", asked)
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl").errors == 4
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["response"]["status_code"] for row in rows] == [500, 400, 400, 400]
    found = answers(rows)
    assert found["engine"].type == "server_error" and found["form"].type == "invalid_request_error"
    assert "line 2: regex: the grammar has no text that could follow" in found["form"].message
    assert "line 3: reasoning_effort is given, but the model's chat template reads no" in found["effort"].message
    assert "line 4: max_completion_tokens is 0, but must be at least 1" in found["length"].message


def test_prompts_log_probabilities_are_where_vllm_has_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = [
        line("chat", chat("Hi", prompt_logprobs=1)),
        line("text", {"prompt": "abc", "prompt_logprobs": 0, "n": 2}, TEXT),
    ]
    prompts = write_lines(tmp_path / "in.jsonl", asked)
    fake = FakeClient(tokenizer)
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl", fake=fake).errors == 0
    assert [request.sampling.prompt_logprobs for request in fake.requests] == [1, 0, None]  # computed once a prompt
    chatted, completed = (row["response"]["body"] for row in read_lines(tmp_path / "out.jsonl"))
    assert len(chatted["prompt_logprobs"]) == len("[u]Hi[a]") and "prompt_logprobs" not in chatted["choices"][0]
    told = {"logprob": -0.25, "rank": None}
    _, b, c = tokenizer.encode("abc")
    expected = [None, {str(b): {**told, "decoded_token": "b"}}, {str(c): {**told, "decoded_token": "c"}}]
    assert [choice["prompt_logprobs"] for choice in completed["choices"]] == [expected, expected]


def test_a_text_may_begin_with_its_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As the server tells it, whose code this is (``tests/unit/test_serve_streamed.py``, ``test_serve_fields.py``)."""
    ids = tokenizer.encode("abc")
    asked: dict[str, dict[str, Any]] = {
        "plain": {"prompt": "abc", "echo": True},
        "of tokens": {"prompt": ids, "echo": True, "logprobs": 1},
        "several": {"prompt": [ids], "echo": True, "logprobs": 0, "prompt_logprobs": 1, "n": 2},
        "scored": {"prompt": ["abc"], "echo": True, "logprobs": 1, "max_tokens": 0},
        "empty": {"prompt": "abc", "max_tokens": 0, "echo": False},
        "without": {"prompt": ids, "prompt_logprobs": 0},
    }
    lines = [line(name, body, TEXT) for name, body in asked.items()]
    fake = FakeClient(tokenizer)
    assert answer(tokenizer, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", fake=fake).errors == 0
    assert [one.sampling.prompt_logprobs for one in fake.requests] == [None, 1, 1, None, 1, None, 0]
    assert all(one.token_ids == ids for one in fake.requests)
    # Not by the client's types: they have no place for the first token of a prompt, of which no more is known.
    found = {row["custom_id"]: row["response"]["body"] for row in read_lines(tmp_path / "out.jsonl")}
    texts = {name: [choice["text"] for choice in body["choices"]] for name, body in found.items()}
    both = "abc<abc>"
    assert texts["plain"] == texts["of tokens"] == [both] and texts["several"] == [both] * 2
    assert texts["scored"] == ["abc"] and texts["empty"] == [""] and texts["without"] == ["<abc>"]
    assert found["plain"]["choices"][0]["logprobs"] is None
    told = found["of tokens"]["choices"][0]["logprobs"]
    assert told["tokens"][:5] == ["a", "b", "c", "<", "a"] and told["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert told["token_logprobs"][:4] == [None, -0.25, -0.25, -0.5] and told["top_logprobs"][0] is None
    for choice in found["several"]["choices"]:
        assert choice["logprobs"]["tokens"][:4] == ["a", "b", "c", "<"] and len(choice["prompt_logprobs"]) == 3
    (scored,), (empty,) = found["scored"]["choices"], found["empty"]["choices"]
    assert scored["logprobs"]["tokens"] == ["a", "b", "c"] and scored["logprobs"]["text_offset"] == [0, 1, 2]
    assert scored["finish_reason"] == empty["finish_reason"] == "length" and "prompt_logprobs" not in scored
    for name in ("scored", "empty"):
        usage = found[name]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 0, 3)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (line("x", chat("a"), url="/v1/embeddings"), 'url is "/v1/embeddings", but must be /v1/chat/completions or'),
        (line("x", chat("a"), method="GET"), 'method is "GET", but must be POST'),
        ({"custom_id": "x", "method": "POST", "url": CHAT, "body": []}, "body is [], but must be a JSON object"),
        (line("x", chat("a"), priority=1), "unknown field 'priority'; known: body, custom_id, method, url"),
        (line(5, chat("a")), "custom_id is 5, but must be a string"),
        (line("x", {**chat("a"), "x" * 5000: 1}), f"unknown field '{'x' * 38}… in the body of"),
        (line("x", chat("a"), **{"x" * 5000: 1}), f"unknown field '{'x' * 38}…; known: "),
        (line("", chat("a")), 'custom_id is "", but must be a string that is not empty'),
        ({"custom_id": "x", "url": CHAT, "body": chat("a")}, "method is null, but must be POST"),
        (line(None, chat("a")), "has no custom_id"),
        (line("x", chat("a", response_format={"type": "json"})), 'response_format: type is "json", but must be "text"'),
        (line("x", chat("a", tools=[{"type": "function"}])), "tool 1: function is null, but must be a JSON object"),
        (line("x", chat("a", tool_choice="required")), 'tool_choice is "required"'),
        (line("x", chat("a", logit_bias={"a": 1})), 'logit_bias is {"a": 1}, but must be an object of numbers'),
        (line("x", chat("a", logit_bias={"5": 101})), "logit_bias: that of token 5 is 101.0, but must be from -100 to"),
        (line("x", chat("a", guided_grammar="a")), 'guided_grammar is "a", whose language depends on'),
        (line("x", {**chat("a"), "stream": True}), "stream is true, which tpctl cannot do; leave it out"),
        (line("x", chat("a", n=0)), "n is 0, but must be a whole number from 1 to 128"),
        (line("x", chat("a", max_tokens=3, max_completion_tokens=4)), "max_tokens is 3, and max_completion_tokens 4"),
        (line("x", chat("a", max_tokens=0)), "max_tokens is 0, but must be at least 1"),
        (line("x", chat("a", top_logprobs=2)), "top_logprobs is 2, but logprobs is not true"),
        (line("x", chat("a", logprobs=3)), "logprobs is 3, but must be true or false"),
        (line("x", chat("a", temperature=-1)), "temperature is -1.0, but must be"),
        (line("x", {**chat("a"), "colour": 1}), "unknown field 'colour' in the body of a request to /v1/chat/compl"),
        (line("x", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "has a part of type"),
        (line("x", {"model": "m"}), "the body has no messages"),
        (line("x", {"model": "m"}, TEXT), "the body has no prompt"),
        (line("x", {"prompt": ["a", "b"]}, TEXT), 'prompt is ["a", "b"], but must be one string'),
        (line("x", {"prompt": "a", "best_of": 4}, TEXT), "best_of is 4 with n 1"),
        (line("x", {"prompt": "a", "echo": 1}, TEXT), "echo is 1, but must be true or false"),
        (line("x", {**chat("a"), "echo": True}), "unknown field 'echo' in the body of a request to /v1/chat/compl"),
        (line("x", {"prompt": "a", "max_tokens": -1}, TEXT), "max_tokens is -1, but must be at least 0"),
        (line("x", {"prompt": [[5], [6]]}, TEXT), "prompt is [[5], [6]], but must be one string, or the token ids of"),
        (line("x", {"prompt": []}, TEXT), "or the token ids of one prompt, not empty; give"),
        (line("x", {"prompt": [5, "a"]}, TEXT), 'prompt has "a" at place 1, but begins with a token id'),
        (line("x", {"prompt": [5, 300]}, TEXT), "prompt holds token 300, but the model knows ids 0 to"),
        (line("x", {"prompt": [5] * 65}, TEXT), "the prompt has 65 tokens"),
        (line("x", {"input": "a"}, "/v1/responses"), "url is /v1/responses, which only a server answers; ask for it"),
    ],
)
def test_what_cannot_be_run_is_that_lines_error_alone(
    tokenizer: Tokenizer, tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    prompts = write_lines(tmp_path / "in.jsonl", [line("good", chat("a")), entry, line("too", chat("b"))])
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl").errors == 1
    good, bad, too = read_lines(tmp_path / "out.jsonl")
    assert answers([good, too]).keys() == {"good", "too"}
    assert bad["response"]["status_code"] == 400 and bad["error"] is None
    error = bad["response"]["body"]["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(("line 2: ", "line 2 has no custom_id"))
    assert said in error["message"] and "\n" not in error["message"]
    assert bad["custom_id"] == (entry["custom_id"] if isinstance(entry["custom_id"], str) else None)


@pytest.mark.parametrize(
    ("body", "url", "param"),
    [
        (chat("a", max_tokens=0), CHAT, "max_tokens"),
        (chat("a", max_completion_tokens=0), CHAT, "max_completion_tokens"),
        (chat("a", temperature=-1), CHAT, "temperature"),
        (chat("a", regex="stuck"), CHAT, "regex"),
        (chat("a", tools=[{"type": "function"}]), CHAT, "tools"),
        (chat("a" * 70), CHAT, "messages"),
        ({"messages": []}, CHAT, "messages"),
        ({"model": "m"}, CHAT, "messages"),
        ({"model": "m"}, TEXT, "prompt"),
        ({"prompt": ""}, TEXT, "prompt"),
        ({"prompt": []}, TEXT, "prompt"),
        ({"prompt": [5, 300]}, TEXT, "prompt"),
        ({"prompt": [5] * 65}, TEXT, "prompt"),
        ({"prompt": "a", "colour": 1}, TEXT, "colour"),
        ({"prompt": "a", "stop": [1]}, TEXT, "stop"),
        ({"prompt": "refuse"}, TEXT, None),
    ],
)
def test_errors_name_the_field_as_the_server_does(
    tokenizer: Tokenizer, tmp_path: Path, body: dict[str, Any], url: str, param: str | None
) -> None:
    prompts = write_lines(tmp_path / "in.jsonl", [line("x", body, url)])
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl").errors == 1
    (found,) = answers(read_lines(tmp_path / "out.jsonl")).values()
    assert found.param == param, found


def test_tokens_that_are_not_told_are_not_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = [line("none", {"prompt": "abc", "max_tokens": 0}, TEXT), line("some", {"prompt": "abc"}, TEXT)]
    done = answer(tokenizer, write_lines(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl")
    counted = [row["response"]["body"]["usage"]["completion_tokens"] for row in read_lines(tmp_path / "out.jsonl")]
    assert counted[0] == 0 and done.completion_tokens == counted[1] > 0


def test_what_asks_for_nothing_more_is_taken(tokenizer: Tokenizer, tmp_path: Path) -> None:
    harmless: Any = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "stream": False}
    body = {**chat("a", user="u", metadata={"a": "b"}, **harmless), "top_k": 5, "chat_template_kwargs": {}}
    prompts = write_lines(tmp_path / "in.jsonl", [line("x", body), line("y", {"prompt": ["a"]}, TEXT)])
    assert answer(tokenizer, prompts, tmp_path / "out.jsonl").errors == 0


def test_an_answer_of_several_that_fails_fails_its_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [line("bad", {"prompt": "refuse", "n": 3}, TEXT), line("twice", chat("a")), line("twice", chat("a"))]
    fake = FakeClient(tokenizer)
    assert answer(tokenizer, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", fake=fake).errors == 2
    bad, once, twice = read_lines(tmp_path / "out.jsonl")
    assert bad["response"]["status_code"] == 500 and "the engine refuses" in bad["response"]["body"]["error"]["message"]
    assert not fake._open
    assert once["response"]["status_code"] == 200
    said = "line 3: custom_id 'twice' was used before; ids must differ"
    assert twice["response"]["body"]["error"]["message"] == said


def test_lines_of_two_forms_are_refused_by_number(tokenizer: Tokenizer, tmp_path: Path) -> None:
    own, openai = {"prompt": "a"}, line("x", chat("a"))
    many = [own] * 100
    prompts = write_lines(tmp_path / "in.jsonl", ["", "no json", own, *many, openai])
    with pytest.raises(SourceError, match=r"line 104 of .*in\.jsonl is an OpenAI batch line, where lines are tpctl's"):
        answer(tokenizer, prompts, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.partial").unlink(missing_ok=True)
    write_lines(prompts, [openai, own])
    with pytest.raises(SourceError, match=r"line 2 of .*in\.jsonl is tpctl's own, where lines are OpenAI's"):
        answer(tokenizer, prompts, tmp_path / "out.jsonl")
    write_lines(prompts, [own])
    with pytest.raises(SourceError, match=r"line 1 of .*in\.jsonl is tpctl's own, where lines are OpenAI's"):
        answer(tokenizer, prompts, tmp_path / "out.jsonl", input_format="openai")
    (tmp_path / "out.jsonl.partial").unlink(missing_ok=True)
    write_lines(prompts, ["no json", {"custom_id": "x", "prompt": 'of "custom_id" and "body"'}])
    answer(tokenizer, prompts, tmp_path / "out.jsonl")
    assert "unknown field 'custom_id'" in read_lines(tmp_path / "out.jsonl")[1]["error"]


def test_parts_find_a_mixture_while_they_are_planned(tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}] * 100 + [line("x", chat("a"))])
    with pytest.raises(SourceError, match="line 101 of"):
        parts_of(JobFolder(tmp_path / "out"), prompts, 10)


def test_a_stream_is_recognised_by_its_first_line_that_tells(tmp_path: Path) -> None:
    text = "\n".join(["", "no json", json.dumps(line("x", chat("a")))]).encode()
    source = JsonlSource(Path("-"), name="standard input")
    sink = by_first_line(source, Asked(), "echo")
    found = list(JsonlReader(io.BytesIO(text), source, again=False).lines())
    assert [one.number for one in found] == [2, 3] and source.form is OPENAI
    out = io.BytesIO()
    sink.encode(out, 0, [b'{"id": null, "error": "line 2: no", "status": 400}\n'])
    assert json.loads(out.getvalue())["response"]["status_code"] == 400


def formats_of(tmp_path: Path, prompts: Path) -> Formats:
    spec = choose(str(prompts), f"{tmp_path / 'out'}/", Asked(), "echo")
    assert spec is not None and (spec.read, spec.write) == ("openai", "openai")
    return FormatSpec.from_json(json.loads(json.dumps(spec, default=vars))).formats()


def test_over_parts_with_deaths_a_deadly_line_and_errors_that_are_tried_again(tmp_path: Path) -> None:
    prompts = write_lines(
        tmp_path / "in.jsonl", [line(f"c{number % 18}", chat(f"line {number}")) for number in range(20)]
    )
    formats, folder = formats_of(tmp_path, prompts), JobFolder(tmp_path / "out")
    wrong = {7}

    def reply(one: Line) -> dict[str, Any]:
        id = json.loads(one.raw)["custom_id"]
        if one.number == 13:
            raise Died
        if one.number in wrong:
            return {"id": id, "error": "no", "chat": True, "created": 1, "status": 400}
        more = {"prompt_tokens": 2, "completion_tokens": 1, "chat": True, "created": 5}
        return {"id": id, "text": f"<{one.number}>", "finish_reason": "stop", **more}

    parts = parts_of(folder, formats, 10)
    assert [part.repeated for part in parts] == [(), (8, 9)]
    replicas = Replicas(folder, formats, reply)
    board = finish(folder, formats, parts, replicas)
    assert (board.sums.rows, board.sums.errors, board.sums.prompt_tokens) == (20, 2, 36)
    rows = rows_of(folder)
    assert [row["custom_id"] for row in rows] == [f"c{number % 18}" for number in range(20)]
    found = answers(rows)
    assert (
        "engines died or hung while they answered it" in found["c12"].message
        and rows[12]["response"]["status_code"] == 500
    )
    assert found["c6"].message == "no" and rows[6]["response"]["status_code"] == 400
    assert len({row["id"] for row in rows}) == 20

    before = rows_of(folder)
    wrong.clear()
    folder.log.unlink()  # sums are read from the parts
    again = Board(folder, formats)
    assert replace(again.sums, cached_tokens=board.sums.cached_tokens) == board.sums  # of which rows say nothing
    again.reopen(parts[0])
    replicas.work()
    again.collect()
    assert again.sums.errors == 1 and not left_over(folder)
    after = rows_of(folder)
    assert after[6]["response"]["body"]["choices"][0]["message"]["content"] == "<7>"
    assert after[:6] + after[7:] == before[:6] + before[7:]


def test_columns_and_parquet_are_not_for_such_lines(tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "in.jsonl", [line("x", chat("a"))])
    with pytest.raises(UsageError, match="--keep-columns is for rows of data sets"):
        choose(str(prompts), "out.jsonl", Asked(keep_columns=("a",)), "m")
    with pytest.raises(UsageError, match="whose answers are lines, too"):
        choose(str(prompts), "out.parquet", Asked(), "m")
    with pytest.raises(SourceError, match=r'has a field "text"; they have "custom_id", "method", "url", "body"'):
        choose(str(prompts), "out.jsonl", Asked(prompt_column="text"), "m")


def test_a_line_without_what_it_must_have_is_read_ahead_without_harm() -> None:
    with pytest.raises(RequestError, match="custom_id is null"):
        OPENAI.wanted({"url": CHAT, "body": {}})
