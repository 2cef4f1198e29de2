"""Chat templates: what they may take of the machine, what they are given, and what is said when they fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jinja2 import Environment
from transformers import PreTrainedTokenizerFast

from tests.unit.made_tokenizers import CHATML, MESSAGES, NAMED, make
from tpctl.client import template_process
from tpctl.client.chat_messages import check_messages
from tpctl.client.template import ChatTemplate, TemplateRefusal
from tpctl.client.template_process import TemplateProcess
from tpctl.client.template_uses import uses
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, RequestError, UsageError

TOOLS = "{% for m in messages %}{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}{% endfor %}"
FIELDS = """{%- for message in messages %}
{{- '[' + message.role + ']' }}
{%- if message.reasoning_content is defined %}{{- '(' + message.reasoning_content + ')' }}{% endif %}
{%- if message.content %}{{- message.content | trim }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- call.function.name + (call.function.arguments | tojson) }}{% endfor %}
{%- if message.tool_call_id %}{{- '#' + message.tool_call_id }}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<no>' }}{% endif %}"""
PARTS = """{%- for message in messages %}
{%- if message.content is string %}{{- message.content }}
{%- else %}{%- for part in message.content %}{{- '<' + part.text + '>' }}{% endfor %}{% endif %}
{%- endfor %}"""
CALL = {"function": {"name": "f", "arguments": {}}}
NAME = "mine/chat_template.jinja"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    with TemplateProcess() as made:
        yield made


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def compiled(source: str, process: TemplateProcess, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"}, name=NAME, process=process, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 4000000000 }}", f"the chat template {NAME} took more than 512 MB"),
        ("{{ 'a' * 100000000 }}", f"the chat template {NAME} makes a text of 100,000,000 characters, more than 26"),
        ("{{ 'a'.ljust(9000000000) }}", f"the chat template {NAME} took more than 512 MB"),
        (
            "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
            f"the chat template {NAME} took more than 512 MB",
        ),
        ("{{ range(10000000) | list }}", f"the chat template {NAME} fails on these messages: OverflowError: Range"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on these messages: RecursionError"),
        ("{{ raise_exception('a\\nb' * 100000) }}", "refuses these messages: a ba ba b"),
        ("{{ nothing.at.all }}", "fails on these messages: 'nothing' is undefined"),
    ],
)
def test_what_takes_too_much_or_fails_is_one_line(process: TemplateProcess, source: str, message: str) -> None:
    template = compiled(source, process)
    with pytest.raises(RequestError) as raised:
        template.render(MESSAGES)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert compiled(CHATML, process).render([user("hi")]).startswith("<|im_start|>user\nhi")


def test_what_a_template_may_write_does_not_grow_with_the_template(process: TemplateProcess) -> None:
    long = "{# " + "x" * 1_000_000 + " #}"
    own = compiled(long + "{{ 'ab ' * 2_900_000 }}", process)
    with pytest.raises(RequestError, match=r"makes a text of 8,700,000 characters, more than 262,\d{3}$"):
        own.render([user("hi")])
    constant = compiled("{{ eos_token * 100 }}", process, variables={})
    constant._common["eos_token"] = "x" * 50_000  # what the model's files say gives no room either
    with pytest.raises(RequestError, match=r"makes a text of 5,000,000 characters, more than 262,\d{3}$"):
        constant.render([user("hi")])
    message = "y" * 400_000
    assert compiled(long + "{{ messages[0].content }}", process).render([user(message)]) == message


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_one_that_loops_is_stopped_and_the_next_is_not(process: TemplateProcess) -> None:
    template = compiled(
        "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}", process
    )
    begin = "import tpctl.client.template_worker as worker; worker.SECONDS = 0.3; worker.main()"
    real = template_process.subprocess.Popen
    with mock.patch.object(
        template_process.subprocess, "Popen", lambda command, **rest: real([command[0], "-c", begin], **rest)
    ):
        process.close()
        with pytest.raises(RequestError, match=rf"the chat template {NAME} took more than 10 s"):
            template.render([user("loop")])
        assert template.render([user("hi")]) == "hi"
        one_by_one = [([user(text)], {}) for text in ("a", "loop", "b")]
        assert template.render_all(one_by_one) == [None, None, None]
        assert template.render_all([one_by_one[0], one_by_one[2]]) == ["a", "b"]
    process.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_ended_while_it_waited_is_no_fault_of_the_next_messages(
    process: TemplateProcess, number: signal.Signals
) -> None:
    template = compiled(CHATML, process)
    for source in (template.source, CHATML + "{# another #}"):
        assert process._process is not None
        os.kill(process._process.pid, number)
        process._process.wait()
        assert "hi" in compiled(source, process).render([user("hi")])


def test_one_that_says_nothing_while_it_waits_is_no_fault_of_the_next_messages(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = compiled(CHATML, process)
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGSTOP)
    begun = process._start

    def other() -> Any:
        monkeypatch.undo()
        return begun()

    monkeypatch.setattr(template_process, "_PATIENCE", 0.2 - template_process.SECONDS)
    monkeypatch.setattr(process, "_start", other)
    assert "hi" in template.render([user("hi")])


def test_the_process_ends_with_its_parent() -> None:
    with TemplateProcess() as made:
        child = made._process
        assert child is not None and child.stdin is not None
        child.stdin.close()
        assert child.wait(30) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "does not compile, line 1: "),
        ("{{ x | nothing }}", "does not compile, line 1: No filter named 'nothing'"),
        ("{{" + "(" * 5000, "does not compile, RecursionError"),
    ],
)
def test_one_that_does_not_compile_names_its_file(process: TemplateProcess, source: str, message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        compiled(source, process)
    assert str(raised.value).startswith(f"the chat template {NAME} {message}")


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_what_was_thought_is_there_under_the_name_that_is_read(process: TemplateProcess, given: str, read: str) -> None:
    template = compiled(FIELDS.replace("reasoning_content", read), process)
    messages = [user("hi"), {"role": "assistant", "content": "yo", given: "hm"}]
    assert template.render(messages) == "[user]hi[assistant](hm)yo"


def test_thoughts_under_two_names_are_one_or_refused(process: TemplateProcess) -> None:
    def answered(**thoughts: object) -> str:
        messages = check_messages([user("hi"), {"role": "assistant", "content": "yo", **thoughts}])
        return compiled(FIELDS, process).render(messages)

    both = "[user]hi[assistant](hm)yo"
    assert answered(reasoning="hm", reasoning_content="hm", thinking="hm") == both
    assert answered(reasoning="hm", reasoning_content="") == answered(reasoning="", thinking="hm") == both
    assert answered(reasoning=None, reasoning_content="") == "[user]hi[assistant]()yo"
    reads_own = compiled(FIELDS.replace("reasoning_content", "reasoning"), process)
    assert reads_own.render([{"role": "assistant", "content": "yo", "reasoning": "", "thinking": "hm"}]).endswith(
        "(hm)yo"
    )
    for one, other in (("reasoning_content", "reasoning"), ("reasoning", "thinking")):
        said = f"message 2 has two different thoughts, as its {one} and as its {other}; leave one of them out"
        with pytest.raises(RequestError, match=said):
            answered(**{one: "hm", other: "so"})


def test_fields_are_those_of_transformers(process: TemplateProcess, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    messages = [
        user(" hi "),
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "7", "tool_call_id": "t1"},
    ]
    make(tmp_path, NAMED, template=FIELDS)
    text = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert text == '[user]hi[assistant](hm)f{"a": "ü"}[tool]7#t1'
    template = compiled(FIELDS, process)
    assert template.render(messages) == text
    # Services write the arguments as text, which a template that expects an object would quote once more.
    call["function"] = {"name": "f", "arguments": '{"a": "ü"}'}
    assert template.render(messages) == text
    as_text = FIELDS.replace("(call.function.arguments | tojson)", "('' if call.function.arguments is string else '!')")
    assert compiled(as_text, process).render(messages).endswith("f[tool]7#t1")


@pytest.mark.parametrize(
    ("source", "field", "refused"),
    [
        (CHATML, "tool_calls", True),
        (CHATML, "reasoning", False),  # of an answer: it is left out
        (CHATML, "weight", True),
        (FIELDS, "tool_calls", False),
        (FIELDS, "name", False),  # a field of a call, but nothing tells them apart
        (FIELDS, "weight", True),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", "weight", False),
        ("{% for m in messages[1:] %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}", "weight", False),
        (
            "{% macro show(m) %}{{ m | tojson }}{% endmacro %}{% for x in messages %}{{ show(x) }}{% endfor %}",
            "w",
            False,
        ),
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}", "weight", True),
    ],
)
def test_a_field_that_is_not_read_is_refused_by_name(
    process: TemplateProcess, source: str, field: str, refused: bool
) -> None:
    template = compiled(source, process)
    messages = [user("hi"), {"role": "assistant", "content": "a", field: [CALL] if field == "tool_calls" else "b"}]
    if refused:
        said = rf'message 2 has the field "{field}", which the model\'s chat template does not read; leave it out'
        with pytest.raises(RequestError, match=said):
            template.render(messages)
    else:
        template.render(messages)
    for empty in (None, [], ""):
        assert template.render([{**message, field: empty} for message in messages])


def test_a_role_that_nobody_names_is_refused(process: TemplateProcess) -> None:
    """A template that repeats any role would write a misspelt one into the prompt."""
    template = compiled(FIELDS, process)
    said = 'message 2 has the role "usr", which the model\'s chat template does not name; use system, user, assistant'
    with pytest.raises(RequestError, match=said):
        template.render([user("hi"), {"role": "usr", "content": "a"}])
    named = compiled("{% for m in messages %}{{ m.content if m.role == 'king' else m.role }}{% endfor %}", process)
    assert named.render([{"role": "king", "content": "a"}, {"role": "function", "content": "b"}]) == "afunction"
    whole = compiled("{% for m in messages %}{{ m | tojson }}{% endfor %}", process)
    assert '"usr"' in whole.render([{"role": "usr", "content": "a"}])


def test_parts_of_a_content(process: TemplateProcess) -> None:
    messages = [user("hi"), {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert compiled(PARTS, process).render(messages) == "hi<a><b>"
    assert compiled(FIELDS, process).render(messages) == "[user]hi[user]a\nb"


def test_fields_within_a_message_that_are_not_read_are_refused(process: TemplateProcess) -> None:
    """Of parts, which templates that take none would lose, and of calls; but for what services keep prompts by."""
    part, function = {"type": "text", "text": "a"}, {"name": "f", "arguments": "{}"}
    hints = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}, "lang": None}
    whole = compiled("{% for m in messages %}{{ m | tojson }}{% endfor %}", process)
    for template in (compiled(PARTS, process), compiled(FIELDS, process), whole):
        with pytest.raises(RequestError, match='message 2 has a part with the field "lang", which the model\'s chat'):
            template.render([user("hi"), {"role": "user", "content": [part, {**part, "lang": "de"}]}])
        asked = [user("hi"), {"role": "user", "content": [{**part, **hints}]}]
        assert template.render(asked) == template.render([user("hi"), {"role": "user", "content": [part]}])
    tools = compiled(TOOLS, process)
    for call, what in (
        ({"function": function, "note": 1}, "a call"),
        ({"function": {**function, "note": 1}}, "a call's function"),
    ):
        with pytest.raises(RequestError, match=f'message 1 has {what} with the field "note"'):
            tools.render([{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", **call}]}])
        assert '"note"' in whole.render([{"role": "assistant", "tool_calls": [call]}])
    known = {"id": "1", "type": "function", "index": 0, "function": {**function, "parsed_arguments": None}}
    assert tools.render([{"role": "assistant", "tool_calls": [known]}]) == "f"


def test_variables(process: TemplateProcess) -> None:
    assert compiled(FIELDS, process).render([user("a")]) == "[user]a"
    template = compiled(FIELDS, process, variables={"enable_thinking": False})
    assert template.render([user("a")]) == "[user]a<no>"
    assert template.render([user("a")], variables={"enable_thinking": True}) == "[user]a"
    assert template.render_all([([user("a")], {}), ([user("b")], {"enable_thinking": True})]) == [
        "[user]a<no>",
        "[user]b",
    ]
    unread = r"'think', which the chat template does not read; it reads enable_thinking"
    with pytest.raises(RequestError, match=unread):
        template.render([user("a")], variables={"think": 1})
    with pytest.raises(UsageError, match="--chat-template-kwargs: .*" + unread):
        compiled(FIELDS, process, variables={"think": 1})
    with pytest.raises(RequestError, match="may not set 'messages'"):
        template.render([user("a")], variables={"messages": []})


def test_together_they_are_what_they_are_alone(process: TemplateProcess) -> None:
    template = compiled("{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML, process)
    conversations = [([user("a")], {}), ([user("no")], {}), ([user("b", weight=1)], {}), (MESSAGES, {})]
    alone = [template.render([user("a")]), None, None, template.render(MESSAGES)]
    assert template.render_all(conversations) == alone
    with pytest.raises(TemplateRefusal, match="refuses these messages: no"):
        template.render([user("no")])


def test_names_in_a_template_are_found() -> None:
    found = uses(Environment().parse("{% set a = 1 %}{{ a }}{{ b.c }}{{ d['e'] }}{{ f(g=1) }}{{ 'h' in i }}"))
    assert found["variables"] == ["b", "d", "f", "i"]
    assert {"c", "e", "g", "h"} <= set(found["names"])
    assert not found["whole"]


def test_an_error_names_the_user_s_file(tmp_path: Path) -> None:
    folder = make(tmp_path, NAMED, template="{% for %}")
    with pytest.raises(CheckpointError, match=r"the chat template org/name/chat_template\.jinja does not compile"):
        Tokenizer(folder, shown="org/name").encode_chat(MESSAGES)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% for %}"}))
    broken = Tokenizer(folder, shown="org/name")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"the chat template org/name/tokenizer_config\.json does not compile"
        ):
            broken.encode_chat(MESSAGES)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^org/name/tokenizer\.json is not a tokenizer this version can read"):
        Tokenizer(folder, shown="org/name")
