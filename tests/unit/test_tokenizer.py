"""Tokenizing and chat templates agree with transformers, and what is missing is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit.fake_client import write_tokenizer
from tests.unit.made_tokenizers import CHATML, MESSAGES, NAMED, make
from tpctl.checkpoint.sources import resolve
from tpctl.client.template import ChatTemplate
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, RequestError

LLAMA_LIKE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- set found = namespace(system=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set found.system = true %}{% continue %}{% endif %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- generation %}
    {{- '[' + message.role + '] ' + (message | tojson) + (tools | tojson(indent=2)) + eos_token }}
    {%- endgeneration %}
{%- endfor %}
{%- if strftime_now is defined and found.system %}{{- strftime_now('%Y') }}{% endif %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{% endif %}"""


def theirs(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE])
@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_chat_equals_transformers(tmp_path: Path, template: str, where: str) -> None:
    config: dict[str, Any] = dict(NAMED)
    if where == "config":
        config["chat_template"] = template
    elif where == "list":
        entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        config["chat_template"] = entries
    folder = make(tmp_path, config, template=template if where == "file" else None, adds_bos=True)
    reference = theirs(folder)
    ours = Tokenizer(folder)
    text = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.template.render(MESSAGES) == text
    assert "Grüße" in text
    ids = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(MESSAGES) == ids
    assert len(ids) > 20


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_tokens_around_a_prompt_equal_transformers(tmp_path: Path, adds_bos: bool, extra: dict[str, bool]) -> None:
    folder = make(tmp_path, NAMED | extra, adds_bos=adds_bos)
    ours = Tokenizer(folder)
    expected = theirs(folder).encode("hello wörld")
    assert ours.encode("hello wörld") == expected
    assert ours.decode(expected) == "hello wörld"


def test_a_prompt_with_its_own_bos_gets_no_second(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make(tmp_path, NAMED, adds_bos=True))
    assert tokenizer.encode("<s>hi") == tokenizer.encode("hi")


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    listed = {"260": {"content": "<tool>", "special": False}, "261": {"content": "<secret>", "special": True}}
    folder = make(tmp_path, NAMED | {"added_tokens_decoder": listed, "pad_token": "<pad>"})
    ours = Tokenizer(folder)
    ids = ours.encode("<tool><secret><pad>a")
    assert ids[:3] == [260, 261, 262]
    assert ids == theirs(folder).encode("<tool><secret><pad>a")
    assert ours.decode(ids) == "<tool>a"


def test_special_tokens_map_is_the_fallback(tmp_path: Path) -> None:
    folder = make(tmp_path, {})
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMED))
    assert Tokenizer(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_no_tokenizer_and_no_template_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    folder = make(tmp_path / "base", NAMED)
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match=r"base has no chat template.*tpctl batch"):
        tokenizer.encode_chat(MESSAGES)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(folder)
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 300000000 bytes, but a tokenizer has at most"):
        Tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer this version can read"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "listed",
    [[1], {"x": {"content": "a"}}, {"260": {}}, {"260": 5}, {"260": {"content": 5}}],
)
def test_malformed_added_tokens_are_one_error(tmp_path: Path, listed: object) -> None:
    folder = make(tmp_path, NAMED | {"added_tokens_decoder": listed})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder (is|has) "):
        Tokenizer(folder)


def test_a_template_that_cannot_be_read_or_compiled(tmp_path: Path) -> None:
    folder = make(tmp_path, NAMED, template="x")
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(1_200_000_000)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja has 1200000000 bytes, but such a file has at"):
        Tokenizer(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read: .*utf-8"):
        Tokenizer(folder)
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{{" + "(" * 5000, {})
    with pytest.raises(RequestError, match=r"the chat template of this model fails on these messages: .*popitem"):
        ChatTemplate("{{ {}.popitem() }}", {}).render([])


def test_a_template_that_does_not_compile_keeps_nothing_of_those_who_ask(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make(tmp_path, NAMED, template="{% if %}x"))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="does not compile") as told:
            tokenizer.encode_chat([{"role": "user", "content": "a"}])
        kept = tokenizer._template_error
        assert kept is not None and str(kept) == str(told.value)
        assert kept.__traceback__ is kept.__context__ is kept.__cause__ is None


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make(tmp_path, NAMED, template=CHATML))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])):
        with pytest.raises(RequestError, match=r"not valid Unicode: it holds '\\udcff', half of a surrogate"):
            encode("a\udcff")


def test_a_template_may_refuse() -> None:
    template = ChatTemplate(LLAMA_LIKE, {"eos_token": "</s>"})
    with pytest.raises(RequestError, match="refuses these messages: unknown role tool"):
        template.render([{"role": "tool", "content": "x"}])
    with pytest.raises(CheckpointError, match="does not compile, line 1"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_reach_out(attack: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(attack, {}).render([])


@pytest.mark.slow
def test_demo_model_equals_auto_tokenizer() -> None:
    from transformers import AutoTokenizer

    folder = resolve("demo").folder
    reference, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.template.render(messages) == text
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == ids
        assert ours.decode(ids, skip_special=False) == reference.decode(ids)
    assert ours.encode("Once upon a time\n\n") == reference.encode("Once upon a time\n\n")


def test_a_long_text_has_the_same_tokens_where_others_go_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, special=["<s>"]))
    text = "a<s> bé\n" * 1000
    alone = tokenizer.encode(text)
    tokenizer.shared = True
    assert tokenizer.encode(text) == alone and len(alone) > len(text) / 2


@pytest.mark.slow
def test_a_text_far_too_long_is_known_by_its_beginning() -> None:
    """Of a tokenizer that drops what it does not know, as the demo model's, no bound is known beforehand."""
    tokenizer = Tokenizer(resolve("demo").folder)
    with pytest.raises(RequestError, match=r"5,000,000 characters, of which the first 67,136 were .* most 100"):
        tokenizer.encode("word " * 1_000_000, most=100)
    assert len(tokenizer.encode("word " * 30_000, most=40_000)) == 30_001
