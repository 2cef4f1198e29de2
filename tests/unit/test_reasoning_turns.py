"""Thoughts in conversations, batch rows, completions and on the screen, with an engine that says what it is told to."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.batch_runs import numbered
from tests.unit.fake_client import FakeClient, ScriptedPrompt, write_tokenizer
from tests.unit.thinking import MODELS, Model
from tpctl.chat.repl import Repl
from tpctl.chat.saved import SavedChat
from tpctl.chat.screen import Screen
from tpctl.chat.thoughts import ThoughtStream
from tpctl.cli import chat as chat_command
from tpctl.client.batch import Batch
from tpctl.client.conversation import Conversation
from tpctl.client.jobs import JobParser
from tpctl.client.llm import LLM
from tpctl.client.results import Results
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError
from tpctl.wire.sampling import SamplingParams

ANSWERS = {
    "qwen3": ("<think>\nhm\n</think>\n\nYes", "<think>\nso\n</think>\n\nNo"),
    "opens": ("hm\n</think>\n\nYes", "so\n</think>\n\nNo"),
    "glm4_moe": ("\n<think>hm</think>\nYes", "\n<think>so</think>\nNo"),
    "minimax_m2": ("hm\n</think>\n\nYes", "so\n</think>\n\nNo"),
    "mistral": ("[THINK]hm[/THINK]Yes", "[THINK]so[/THINK]No"),
    "gpt_oss": tuple(
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{text}"
        for thought, text in (("hm", "Yes"), ("so", "No"))
    ),
    "gemma4": ("<|channel>thought\nhm\n<channel|>Yes", "<|channel>thought\nso\n<channel|>No"),
    "r1": ("hm\n</think>\n\nYes", "so\n</think>\n\nNo"),
    "command": tuple(
        f"<|START_THINKING|>{thought}<|END_THINKING|><|START_RESPONSE|>{text}<|END_RESPONSE|>"
        for thought, text in (("hm", "Yes"), ("so", "No"))
    ),
    "no thoughts": ("Yes", "No"),
}
KEPT = {  # how an answer with a thought stands in the prompt of the next turn
    "qwen3": "<|im_start|>assistant\nYes<|im_end|>\n",
    "opens": "<|im_start|>assistant\nYes<|im_end|>\n",
    "glm4_moe": "<|assistant|>\n<think></think>\nYes",
    "minimax_m2": "]~b]ai\n<think>\nhm\n</think>\n\nYes[e~[\n",
    "mistral": "[THINK]hm[/THINK]Yes</s>",
    "gpt_oss": "<|start|>assistant<|channel|>final<|message|>Yes<|end|>",
    "gemma4": "<|turn>model\nYes<turn|>\n",
    "r1": "<｜Assistant｜>Yes<｜end▁of▁sentence｜>",
    "command": "<|CHATBOT_TOKEN|><|START_RESPONSE|>Yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "no thoughts": "<|im_start|>assistant\nYes<|im_end|>\n",
}


def client_of(tokenizer: Tokenizer, *answers: str) -> Any:
    client = FakeClient(tokenizer, max_model_len=2000)
    client.answers = list(answers)
    return client


@pytest.fixture
def qwen(tmp_path: Path) -> Tokenizer:
    return MODELS["qwen3"].tokenizer(tmp_path / "qwen")


@pytest.mark.parametrize("name", list(ANSWERS))
def test_what_was_thought_goes_again_as_the_template_has_it(name: str, tmp_path: Path) -> None:
    tokenizer = MODELS[name].tokenizer(tmp_path)
    client, shown, thought = client_of(tokenizer, *ANSWERS[name]), [], []
    conversation = Conversation(client, tokenizer)
    answer = conversation.ask("Is it?", shown.append, think=thought.append)
    thinks = name != "no thoughts"
    assert (answer.text, answer.reasoning) == ("Yes", "hm" if thinks else None)
    assert ("".join(shown), "".join(thought)) == ("Yes", "hm" if thinks else "")
    conversation.ask("Sure?", shown.append)
    first, second = (tokenizer.decode(request.token_ids, skip_special=False) for request in client.requests)
    assert KEPT[name] in second
    assert second.startswith(first.partition("Is it?")[0] + "Is it?")
    assert conversation.turns[-1]["content"] == "No"
    kept = {**conversation.turns[1], "role": "-"}
    conversation.restore(None, conversation.turns, {}, ())
    assert {**conversation.turns[1], "role": "-"} == kept


def test_a_saved_chat_keeps_thoughts(qwen: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(qwen, *ANSWERS["qwen3"])
    file = tmp_path / "chat.json"
    conversation = Conversation(client, qwen)
    Repl(client, conversation, Screen(), ScriptedPrompt("hi", f"/save {file}", "/reset", f"/load {file}"), "m").run()
    assert conversation.turns == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "hm"},
    ]
    saved = json.loads(file.read_text())
    for message, said in (
        ({"role": "user", "content": "a", "reasoning_content": "b"}, "message 1 must have the role user"),
        ({"role": "user", "content": "a"}, 'message 2 has 5 as its "reasoning_content"'),
    ):
        saved["messages"] = [message, {"role": "assistant", "content": "c", "reasoning_content": 5}]
        file.write_text(json.dumps(saved))
        with pytest.raises(RequestError, match=said):
            SavedChat.load(file)


def test_an_answer_stopped_while_it_thinks_keeps_the_thought(qwen: Tokenizer) -> None:
    thought: list[str] = []
    conversation = Conversation(client_of(qwen, "<think>\nlong thoughts"), qwen)
    answer = conversation.ask("hi", lambda piece: None, lambda: "".join(thought) == "long", thought.append)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "long", "abort")
    assert conversation.turns[-1] == {"role": "assistant", "content": "", "reasoning_content": "long"}


def rows_of(tokenizer: Tokenizer, client: Any, *lines: dict[str, Any], **sampling: Any) -> list[dict[str, Any]]:
    parser = JobParser(tokenizer, sampling={"max_tokens": 99, **sampling}, stop=[], max_model_len=2000)
    out = io.BytesIO()
    with Results(None, {}) as results:
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        Batch(client, tokenizer, results, 1).run(numbered(io.BytesIO(text)), parser)
        results.emit(out, gaps=True)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_batch_rows_have_reasoning_where_there_is_a_conversation(qwen: Tokenizer, tmp_path: Path) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Is it?"}]}
    thoughtless = {**chat, "chat_template_kwargs": {"enable_thinking": False}}
    answer = ANSWERS["qwen3"][0]
    client = client_of(qwen, answer, "Yes", "Yes", answer)
    lines = (chat, chat, thoughtless, {"prompt": "Is it?"})
    rows = rows_of(qwen, client, *lines, logprobs=1)
    assert [(row["text"], row.get("reasoning")) for row in rows] == [
        ("Yes", "hm"),
        ("Yes", ""),
        ("Yes", ""),
        (answer, None),
    ]
    assert ["reasoning" in row for row in rows] == [True, True, True, False]
    assert [len(row["logprobs"]) for row in rows] == [row["completion_tokens"] for row in rows]
    assert "".join(token["token"] for token in rows[0]["logprobs"]) == answer + "</s>"
    assert qwen.decode(client.requests[2].token_ids).endswith("<think>\n\n</think>\n\n")
    plain = MODELS["no thoughts"].tokenizer(tmp_path)
    assert "reasoning" not in rows_of(plain, client_of(plain, answer), chat)[0]


def test_reasoning_effort_reaches_the_template(tmp_path: Path) -> None:
    tokenizer = MODELS["gpt_oss"].tokenizer(tmp_path)
    client = client_of(tokenizer, *ANSWERS["gpt_oss"])
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Is it?"}]}
    rows_of(tokenizer, client, {**chat, "chat_template_kwargs": {"reasoning_effort": "high"}}, chat)
    high, medium = (tokenizer.decode(request.token_ids) for request in client.requests)
    assert ("Reasoning: high" in high, "Reasoning: medium" in medium) == (True, True)


def test_completions_of_the_library(qwen: Tokenizer) -> None:
    model = LLM.__new__(LLM)
    client = client_of(qwen, *ANSWERS["qwen3"])
    model._client, model.tokenizer, model.info = client, qwen, client.wait_ready()
    answer = model.chat([{"role": "user", "content": "Is it?"}], SamplingParams(max_tokens=99), variables={})
    assert (answer.reasoning, answer.text) == ("hm", "Yes")
    (raw,) = model.generate("Is it?", SamplingParams(max_tokens=99))
    assert (raw.reasoning, raw.text) == (None, ANSWERS["qwen3"][1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def undimmed(text: str) -> str:
    return text.replace("\x1b[2m", "").replace("\x1b[0m", "")


def shown_on(stream: io.StringIO, *, plain: bool) -> str:
    thoughts = ThoughtStream(stream, plain=plain)
    for piece in ("so it\x1b[31m is", " or not", "\nhm"):
        thoughts.push(piece)
    thoughts.close()
    return stream.getvalue()


def test_thoughts_are_dimmed_on_a_terminal_and_marked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    dimmed = shown_on(Terminal(), plain=False)
    assert undimmed(dimmed) == "so it[31m is or not\nhm\n\n"
    assert all(part.endswith("\x1b[0m") for part in dimmed.removesuffix("\n").split("\x1b[2m")[1:])
    assert shown_on(Terminal(), plain=True) == "(thinking)\nso it[31m is or not\nhm\n(end of thinking)\n"
    assert shown_on(io.StringIO(), plain=False) == "(thinking)\nso it\x1b[31m is or not\nhm\n(end of thinking)\n"
    monkeypatch.setenv("TERM", "dumb")
    assert shown_on(Terminal(), plain=False) == "(thinking)\nso it[31m is or not\nhm\n(end of thinking)\n"


@pytest.mark.parametrize(("terminal", "plain"), [(True, False), (True, True), (False, False)])
def test_a_chat_shows_thoughts_before_the_answer(
    terminal: bool, plain: bool, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, err = (Terminal() if terminal else io.StringIO()), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    client = client_of(qwen, "<think>\n1 < 2\n</think>\n\n*Yes*", "<think>\nnothing\n</think>\n\n")
    Repl(client, Conversation(client, qwen), Screen(plain=plain), ScriptedPrompt("hi", "hm"), "m").run()
    marked = "(thinking)\n1 < 2\n(end of thinking)\n"
    if not terminal:
        assert (out.getvalue(), err.getvalue()) == (
            "*Yes*\n",
            f"{marked}(thinking)\nnothing\n(end of thinking)\n(the answer is empty)\n",
        )
    elif plain:
        assert out.getvalue().startswith(f"{marked}*Yes*\n(thinking)")
    else:
        assert out.getvalue().startswith("\x1b[2m1 ")
        assert undimmed(out.getvalue()).startswith("1 < 2\n\n\x1b[3mYes")  # the answer is Markdown


def test_one_message_prints_the_answer_alone_to_stdout(qwen: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(client_of(qwen, *ANSWERS["qwen3"][:1], "Yes"), qwen)
    chat_command._answer_once(conversation, "hi")
    assert tuple(capsys.readouterr()) == ("Yes\n", "(thinking)\nhm\n(end of thinking)\n")
    chat_command._answer_once(conversation, "hi")
    assert tuple(capsys.readouterr()) == ("Yes\n", "")


def test_thoughts_as_a_part_of_the_content_are_kept_or_left_out(tmp_path: Path) -> None:
    mistral = MODELS["mistral"].tokenizer(tmp_path / "mistral")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "c"},
        {"role": "user", "content": "d"},
    ]
    assert mistral.template.render(messages) == "<s>[INST]a[/INST][THINK]c[/THINK]b</s>[INST]d[/INST]"
    reads_none = Tokenizer(write_tokenizer(tmp_path / "other", template=MODELS["no thoughts"].template))
    assert "<|im_start|>assistant\nb<|im_end|>" in reads_none.template.render(messages)
    cut_off = [messages[0], {"role": "assistant", "content": None, "reasoning_content": "c"}, messages[2]]
    assert "<|im_start|>assistant\n<|im_end|>" in reads_none.template.render(cut_off)
    with pytest.raises(RequestError, match='message 1 has the field "reasoning", which the model'):
        reads_none.template.render([{**messages[0], "reasoning": "c"}])


def test_a_developer_is_the_system_where_the_template_knows_none(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert "<|im_start|>system\nBe brief." in MODELS["qwen3"].tokenizer(tmp_path / "a").template.render(messages)
    knows = Model("{% for m in messages %}{{ 'd' if m.role == 'developer' else m.role }}:{{ m.content }} {% endfor %}")
    assert knows.tokenizer(tmp_path / "b").template.render(messages) == "d:Be brief. user:a "
