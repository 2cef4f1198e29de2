"""Grammars of calls: what templates write is in them, and what they let a model write are calls that validate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.unit.tool_answers import USER, model
from tests.unit.tool_models import MODELS
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tool_grammar import formed, grammar
from tpctl.client.tools.asked import Tools, ToolsError, read_tools, with_tools
from tpctl.client.tools.lark import named
from tpctl.engine.guiding.grammars import Grammars
from tpctl.errors import RequestError
from tpctl.wire.guide import of_schema
from tpctl.wire.messages import Output
from tpctl.wire.sampling import SamplingParams

llguidance = pytest.importorskip("llguidance")

SCHEMAS: dict[str, dict[str, Any]] = {
    "set_light": {
        "type": "object",
        "properties": {"room": {"enum": ["hall", "attic"]}, "level": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["room", "level"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
FORMS = [name for name in MODELS if name != "gemma"]


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": schema}}
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}


CALLS = [("set_light", {"room": "attic", "level": 7}), ("now", {})]


def matcher(tokenizer: Tokenizer, name: str, folder: Path, form: dict[str, Any] | None = None, **more: Any) -> Any:
    """Of a grammar for calls, its tools, and the token that ends an answer; ``form``: what else an answer may be."""
    asked = read_tools({"tools": TOOLS, **more})
    assert asked is not None
    MODELS[name].tokenizer(folder)
    grammars = Grammars(folder)
    ends = [tokenizer.backend.token_to_id("<|call|>" if name == "gpt-oss" else "</s>")]
    grammars.suit(tokenizer.backend.get_vocab_size(), ends)
    other = SamplingParams.from_dict(form or {}).guide
    guide = SamplingParams(grammar=grammar(tokenizer, asked, tokenizer.reasoning, other)).guide
    assert guide is not None
    return grammars.matcher(guide), asked, ends[0]


def all_taken(found: Any, ids: Sequence[int]) -> bool:
    """Whether tokens, of which the last ends an answer, are one; a grammar may be over before that."""
    one = found.deep_copy()
    taken = one.try_consume_tokens(list(ids))
    return taken == len(ids) or (taken == len(ids) - 1 and one.is_stopped())


def written(tokenizer: Tokenizer, name: str, count: int) -> str:
    """A turn with calls, as the template has it."""
    calls = [
        {
            "id": f"functions.{function}:{at}" if name == "kimi" else f"call0000{at}",
            "type": "function",
            "function": {"name": function, "arguments": json.dumps(arguments)},
        }
        for at, (function, arguments) in enumerate(CALLS[:count])
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    asked = read_tools({"tools": TOOLS})
    prompt = tokenizer.template.render([USER], variables=with_tools({}, asked))
    text = tokenizer.template.render([USER, turn], variables=with_tools({}, asked), add_generation_prompt=False)
    return text[len(prompt) :].removesuffix("\n").removesuffix("<|im_end|>").removesuffix("<|call|>").lstrip("\n")


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("gpt-oss", "mistral, a list")])
def test_what_templates_write_is_in_the_grammar(name: str, tmp_path: Path) -> None:
    tokenizer = model(name)
    found, _, end = matcher(tokenizer, name, tmp_path, tool_choice="required")
    ids = tokenizer.encode_rendered(written(tokenizer, name, 1 if name == "llama" else 2))
    assert all_taken(found, [*ids, end])


def walked(tokenizer: Tokenizer, found: Any, asked: Tools, end: int, rng: random.Random) -> TextStream:
    """An answer of a model that writes anything that is allowed."""
    size = tokenizer.backend.get_vocab_size()
    stream = TextStream(tokenizer, (), tokenizer.encode_chat([USER]), form=tokenizer.reasoning, tools=asked)
    for _ in range(600):
        words = np.frombuffer(found.compute_bitmask(), dtype=np.uint32)
        allowed = [id for id in range(size) if words[id // 32] >> (id % 32) & 1]
        assert allowed
        # Ends of texts are likely, so that thoughts and white space come to an end.
        marks = [id for id in allowed if id >= 256]
        id = rng.choice(marks if marks and rng.random() < 0.3 else allowed)
        assert found.try_consume_tokens([id]) == 1 or (id == end and found.is_stopped())
        stream.push(Output("a", [id], "stop" if id == end else None))
        if stream.finish_reason is not None:
            break
    return stream


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_model_prefers_its_calls_validate(name: str, seed: int, tmp_path: Path) -> None:
    tokenizer, rng = model(name), random.Random(seed)
    more: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    if seed == 1:
        more["tool_choice"] = {"type": "function", "function": {"name": "set_light"}}
    found, asked, end = matcher(tokenizer, name, tmp_path, **more)
    stream = walked(tokenizer, found, asked, end, rng)
    assert stream.finish_reason == "tool_calls" and stream.text == ""
    (call,) = stream.calls
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert seed != 1 or call.name == "set_light"


def test_strict_tools_are_held_to_where_they_are_called(tmp_path: Path) -> None:
    tokenizer = model("hermes")
    found, _, end = matcher(tokenizer, "hermes", tmp_path, tools=STRICT)
    encode = tokenizer.encode_rendered
    text = [*encode("No <b> call, {}."), end]
    assert found.deep_copy().try_consume_tokens(text) == len(text)
    whole = [*encode(f"Well. {written(tokenizer, 'hermes', 2)} Done."), end]
    assert found.deep_copy().try_consume_tokens(whole) == len(whole)
    opened = encode('<tool_call>\n{"name": "set_light", "arguments": {"room": "')
    assert found.deep_copy().try_consume_tokens([*opened, *encode("cellar")]) < len(opened) + 2
    spelled = tokenizer.backend.encode("<tool_").ids + tokenizer.backend.encode("call>").ids
    assert found.deep_copy().try_consume_tokens(spelled) < len(spelled)  # the mark is its token, and no text
    one, _, _ = matcher(tokenizer, "hermes", tmp_path / "one", tools=STRICT, parallel_tool_calls=False)
    assert one.try_consume_tokens(encode(written(tokenizer, "hermes", 2))) < len(
        encode(written(tokenizer, "hermes", 2))
    )


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "qwen-xml",
            {"tools": [_strict({"type": "string", "pattern": "a+"})], "tool_choice": "required"},
            'tool_choice: f: "a" has pattern, which cannot be enforced in texts between tags',
        ),
        ("gemma", {"tool_choice": "required"}, "tool_choice: the arguments in calls of this model are no JSON (gemma)"),
    ],
)
def test_what_cannot_be_enforced_is_refused(name: str, fields: dict[str, Any], said: str) -> None:
    tokenizer, asked = model(name), read_tools({"tools": TOOLS, **fields})
    with pytest.raises(ToolsError) as error:
        formed(SamplingParams(), tokenizer, [1], tokenizer.reasoning, asked)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["llama", "hermes by text", "qwen-xml by text", "glm by text"])
def test_strict_tools_whose_calls_begin_with_no_token(name: str, tmp_path: Path) -> None:
    tokenizer = model(name)
    found, _, end = matcher(tokenizer, name, tmp_path, tools=STRICT)
    call, encode = written(tokenizer, name, 1), tokenizer.encode_rendered

    def takes(text: str) -> bool:
        return all_taken(found, [*(encode(text) if text else ()), end])

    assert takes("No { call, <b>.") and takes("") and takes(call)
    wrong = call.replace("attic", "cellar")
    assert wrong != call and not takes(wrong)
    if name == "llama":
        assert takes(f"<|python_tag|>{call}") and takes(f"Well. <|python_tag|>{call}")
        assert not takes(f"<|python_tag|>{wrong}") and not takes(' {"a": 1}')
    else:
        assert takes(f"Well. {call} Done.") and not takes(f"Well. {wrong}") and not takes(f"Well. {call} {call[:12]}")


def test_strict_tools_are_let_be_where_nothing_tells_what_a_call_is() -> None:
    tokenizer, asked = model("gemma"), read_tools({"tools": STRICT})
    assert formed(SamplingParams(), tokenizer, [1], tokenizer.reasoning, asked) == SamplingParams()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "room": {"enum": ["hall"]}},
    "required": ["name", "room"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", [name for name in FORMS if name != "mistral, a list"])
def test_an_answer_calls_or_has_its_form(name: str, tmp_path: Path) -> None:
    tokenizer = model(name)
    form = {"response_format": of_schema(PERSON)}
    found, _, end = matcher(tokenizer, name, tmp_path, form=form)
    final = "<|channel|>final<|message|>" if name == "gpt-oss" else ""

    def takes(text: str) -> bool:
        return all_taken(found, [*tokenizer.encode_rendered(text), end])

    person = json.dumps({"name": "set_", "room": "hall"})
    assert takes(final + person)
    if name != "gpt-oss":  # whose template writes calls as no answer begins
        assert takes(written(tokenizer, name, 1)) and not takes(written(tokenizer, name, 1).replace("attic", "hall "))
    for wrong in ("Well.", person.replace("hall", "attic"), person.replace("set_", "set_light"), f"{person} {person}"):
        assert not takes(final + wrong)


@pytest.mark.parametrize("name", ["hermes", "hermes by text", "llama", "gpt-oss"])
def test_whatever_a_model_prefers_it_calls_or_has_its_form(name: str, tmp_path: Path) -> None:
    tokenizer, kinds = model(name), set()
    form = {"response_format": of_schema(PERSON)}
    found, asked, end = matcher(tokenizer, name, tmp_path, form=form, parallel_tool_calls=False)
    for seed in range(8):
        stream = walked(tokenizer, found.deep_copy(), asked, end, random.Random(seed))
        if stream.finish_reason == "tool_calls":
            (call,) = stream.calls
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        else:
            assert stream.finish_reason == "stop"
            jsonschema.validate(json.loads(stream.text), PERSON)
        kinds.add(stream.finish_reason)
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("gemma", {"choice": ["a"]}, "choice beside tools: the arguments in calls of this model are no JSON (gemma)"),
        ("llama", {"choice": ["a"]}, "choice beside tools: calls of this model begin with no mark"),
        (
            "hermes",
            {"response_format": of_schema({"type": "object", "if": {}})},
            "response_format beside tools: if cannot be enforced",
        ),
        ("hermes", {"regex": "(a"}, "regex beside tools: "),
    ],
)
def test_a_form_that_cannot_be_had_beside_tools(name: str, fields: dict[str, Any], said: str) -> None:
    tokenizer, asked = model(name), read_tools({"tools": TOOLS})
    with pytest.raises(ToolsError) as error:
        formed(SamplingParams.from_dict(fields), tokenizer, [1], tokenizer.reasoning, asked)
    assert said in str(error.value)


def test_forms_of_every_kind_beside_tools(tmp_path: Path) -> None:
    tokenizer = model("hermes")
    for number, (fields, text) in enumerate(
        (
            ({"choice": ["yes", "no"]}, "no"),
            ({"regex": r"\d+"}, "42"),
            ({"grammar": 'start: "a" PAIR\nPAIR: "b" | "c"'}, "ac"),
        )
    ):
        found, _, end = matcher(tokenizer, "hermes", tmp_path / str(number), form=fields)
        for said in (text, written(tokenizer, "hermes", 2)):
            assert all_taken(found, [*tokenizer.encode_rendered(said), end])
        assert found.try_consume_tokens(tokenizer.encode_rendered("x")) == 0


def test_a_schema_with_definitions_stands_beside_a_form(tmp_path: Path) -> None:
    tokenizer = model("llama")
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/one"}},
        "$defs": {"one": {"enum": [1]}},
        "required": ["a"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    found, _, end = matcher(tokenizer, "llama", tmp_path, form={"response_format": of_schema(PERSON)}, tools=tools)
    encode, begun = tokenizer.encode_rendered, '{"name": "f", "parameters": {"a": '
    assert all_taken(found, [*encode(begun + "1}}"), end])
    assert found.try_consume_tokens(encode(begun + "2")) == len(encode(begun))
    itself = {"type": "object", "properties": {"more": {"$ref": "#"}}}
    tools[0]["function"]["parameters"] = itself  # type: ignore[index]
    with pytest.raises(RequestError, match="f: its schema refers to itself"):
        matcher(tokenizer, "llama", tmp_path, form={"response_format": of_schema(PERSON)}, tools=tools)


def test_a_schema_that_cannot_be_enforced_is_named() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "unevaluatedProperties": False}
    tokenizer = model("hermes")
    for strict in (True, False):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}
        asked = read_tools({"tools": [tool], "tool_choice": "required"})
        if not strict:
            assert formed(SamplingParams(), tokenizer, [1], None, asked).guide is not None
            continue
        with pytest.raises(ToolsError, match=r"^tool_choice: f: unevaluatedProperties cannot"):
            formed(SamplingParams(), tokenizer, [1], None, asked)


@pytest.mark.parametrize("name", ["qwen-xml", "qwen-xml by text", "seed", "minimax", "glm", "glm by text"])
def test_texts_between_tags_end_where_their_tag_does(name: str, tmp_path: Path) -> None:
    tokenizer = model(name)
    kinds = {"text": "string", "times": "integer", "loud": "boolean"}
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in kinds.items()},
        "required": ["text"],
    }
    tools = [{"type": "function", "function": {"name": "say", "parameters": parameters}}]
    found, asked, _ = matcher(tokenizer, name, tmp_path, tools=tools, tool_choice="required")
    arguments = {"text": 'a < b\n\n</b> "c" {', "times": 3}
    call = {"id": "a", "type": "function", "function": {"name": "say", "arguments": json.dumps(arguments)}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = tokenizer.template.render([USER], variables=with_tools({}, asked))
    text = tokenizer.template.render([USER, turn], variables=with_tools({}, asked), add_generation_prompt=False)
    ids = tokenizer.encode_rendered(text[len(prompt) :].removesuffix("<|im_end|>\n").lstrip("\n"))
    assert found.deep_copy().try_consume_tokens(ids) == len(ids)
    wrong = tokenizer.encode_rendered(text[len(prompt) :].replace("3", "x").removesuffix("<|im_end|>\n").lstrip("\n"))
    assert found.deep_copy().try_consume_tokens(wrong) < len(wrong)


@pytest.mark.parametrize("name", FORMS)
def test_a_call_that_must_be_made_has_the_members_that_its_schema_names(name: str, tmp_path: Path) -> None:
    """Also without ``strict``, where JSON Schema would let others stand, as vLLM's server has it by default."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    tokenizer = model(name)
    more: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    found, asked, end = matcher(tokenizer, name, tmp_path, tools=tools, **more)
    for seed in range(6):
        stream = walked(tokenizer, found.deep_copy(), asked, end, random.Random(seed))
        (call,) = stream.calls
        assert json.loads(call.arguments) in ({"a": "x"}, {"a": "y"}), call


@pytest.mark.parametrize(
    ("more", "closed"),
    [
        ({}, True),
        ({"required": ["a"]}, True),
        ({"required": ["b"]}, False),
        ({"properties": {}}, False),
        ({"additionalProperties": True}, False),
        ({"patternProperties": {"b": {}}}, False),
        ({"anyOf": [{"properties": {"b": {}}}]}, False),
        ({"$ref": "#/$defs/c", "$defs": {"c": {"properties": {"b": {}}}}}, False),
    ],
)
def test_a_schema_that_says_of_others_has_its_way(more: dict[str, Any], closed: bool) -> None:
    schema = {"type": "object", "properties": {"a": {}}, **more}
    assert named(schema) == ({**schema, "additionalProperties": False} if closed else schema)
