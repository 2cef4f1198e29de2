"""Tools in OpenAI's batch lines: calls in the answers, and what is wrong with a line's tools is that line's error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.batch_formats_run import read_lines, write_lines
from tests.unit.fake_client import FakeClient
from tests.unit.openai_lines import answers, chat, line
from tests.unit.tool_models import MODELS
from tpctl.batch.formats.choose import Asked, choose
from tpctl.client.batch import Batch
from tpctl.client.jobs import JobParser
from tpctl.client.results import Results
from tpctl.client.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'


def run(tokenizer: Tokenizer, fake: FakeClient, prompts: Path, out: Path) -> dict[str, Any]:
    spec = choose(str(prompts), str(out), Asked(), "echo")
    assert spec is not None
    formats = spec.formats()
    with formats.source.open() as reader, Results(out, {}, resume=False, encode=formats.sink.encode) as results:
        parser = JobParser(
            tokenizer, sampling={"max_tokens": 400}, stop=[], max_model_len=2048, form=lambda: formats.source.form
        )
        batch: Any = Batch(fake, tokenizer, results, 1)  # type: ignore[arg-type]
        tally = batch.run(reader.lines(), parser, together=4)
        results.publish(tally.lines)
    return answers(read_lines(out))


def test_lines_with_tools(tmp_path: Path) -> None:
    tokenizer = MODELS["hermes"].tokenizer(tmp_path / "model")
    prompts = write_lines(
        tmp_path / "in.jsonl",
        [
            line("auto", chat("a", tools=[TOOL])),
            line("must", chat("b", tools=[TOOL], tool_choice="required", n=2)),
            line("none", chat("c", tools=[TOOL], tool_choice="none")),
            line("wrong", chat("d", tools=[TOOL], tool_choice="x")),
            line("plain", chat("e")),
            line("twice", chat("f", tools=[TOOL], chat_template_kwargs={"tools": []})),
        ],
    )
    fake = FakeClient(tokenizer, max_model_len=2048)
    fake.answers = [f"Well. {CALL}\n{CALL}", CALL, "no call", CALL, CALL]
    found = run(tokenizer, fake, prompts, tmp_path / "out.jsonl")
    auto = found["auto"].choices[0]
    assert (auto.message.content, auto.finish_reason) == ("Well.", "tool_calls")
    assert [(call.function.name, json.loads(call.function.arguments)) for call in auto.message.tool_calls] == [
        ("now", {"a": 1})
    ] * 2
    assert [choice.finish_reason for choice in found["must"].choices] == ["tool_calls", "stop"]
    assert found["must"].choices[0].message.content is None
    for name in ("none", "plain"):
        assert found[name].choices[0].message.content == CALL and found[name].choices[0].finish_reason == "stop"
    assert 'tool_choice is "x"' in found["wrong"].message
    assert "chat_template_kwargs has tools, but the request has tools of its own" in found["twice"].message
    texts = [tokenizer.decode(request.token_ids) for request in fake.requests]
    assert ['"name": "now"' in text for text in texts] == [True, True, True, False, False]
    assert [request.sampling.grammar is not None for request in fake.requests] == [False, True, True, False, False]
