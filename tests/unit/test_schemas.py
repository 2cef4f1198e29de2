"""Schemas of every kind, without a model: what is taken holds whatever one prefers, and the rest is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema.validators import (
    Draft3Validator,
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)

from tests.schemas import all_schemas
from tests.schemas_kinds import REFUSED, keywords, kind_of, problem_of, table
from tests.schemas_parts import Schema
from tests.unit.walking import Walks
from tpctl.client import schema_words
from tpctl.client.guides import check_guide
from tpctl.errors import RequestError
from tpctl.wire.guide import of_schema
from tpctl.wire.sampling import SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "structured-output.md"
DRAFTS = (
    Draft3Validator,
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Walks:
    return Walks(tmp_path_factory.mktemp("walks"))


def test_no_two_are_of_one_kind_and_every_keyword_is_there() -> None:
    found: dict[object, str] = {}
    for name, schema in all_schemas():
        kind = kind_of(schema)
        assert kind not in found, (name, found[kind])
        found[kind] = name
    assert len(found) > 200
    words = {word for _, schema in all_schemas() for word in keywords(schema)}
    assert words >= schema_words.ENFORCED
    assert {word for _, schema in REFUSED for word in keywords(schema)} >= schema_words.REFUSED - {
        "$dynamicAnchor",
        "$recursiveAnchor",
    }


def test_what_only_words_tell_apart_is_of_one_kind() -> None:
    """A test of the test before."""
    one: Schema = {"type": "object", "properties": {"a": {"enum": ["x"]}, "b": {"type": "string", "pattern": "^a{2}$"}}}
    other: Schema = {
        "type": "object",
        "properties": {"c": {"enum": ["y"]}, "d": {"type": "string", "pattern": "^b{3}$"}},
    }
    assert kind_of(one) == kind_of(other) != kind_of({**one, "required": ["a"]})


def test_every_keyword_of_every_draft_is_held_to_or_refused() -> None:
    for draft in DRAFTS:
        assert draft.VALIDATORS.keys() <= schema_words.ENFORCED | schema_words.REFUSED


def test_the_page_has_the_table() -> None:
    """``python -m tests.schemas_kinds`` prints it."""
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")


def test_whatever_a_model_prefers_its_answers_are_valid(walks: Walks) -> None:
    ended = 0
    for name, schema in all_schemas():
        for seed in range(2):
            text = walks.answer(schema, seed)
            if text is not None:
                assert (problem := problem_of(schema, text)) is None, (name, text, problem)
                ended += 1
    assert ended > len(all_schemas()) * 2 * 0.9


def test_what_formats_let_through(walks: Walks) -> None:
    """More than they should: the page says so. If llguidance comes to know better, leave it out there."""
    for form, texts in {
        "date": ["2021-02-29", "2024-02-29"],
        "time": ["10:10:60Z"],
        "date-time": ["2021-02-29T10:10:60Z"],
    }.items():
        for text in texts:
            assert walks.takes({"type": "string", "format": form}, f'"{text}"')
    assert not walks.takes({"type": "string", "format": "date"}, '"2021-02-30"')


def test_patterns_that_python_does_not_know(walks: Walks) -> None:
    schema: Schema = {"type": "string", "pattern": r"^\p{Greek}+$"}
    assert walks.takes(schema, '"αβγ"') and not walks.takes(schema, '"abc"')


@pytest.mark.parametrize(("word", "schema"), REFUSED)
def test_what_does_not_hold_is_refused_by_name(word: str, schema: Schema) -> None:
    with pytest.raises(RequestError) as caught:
        check_guide(SamplingParams(response_format=of_schema(schema)).guide)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_where_a_keyword_is_is_said() -> None:
    schema = {"properties": {"a": {"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}}}
    with pytest.raises(RequestError) as caught:
        check_guide(SamplingParams(response_format=of_schema(schema)).guide)
    said = 'uniqueItems cannot be enforced; leave out, or say "strict": false beside the schema'
    assert str(caught.value) == f'response_format: {said} (at "#/properties/a/anyOf/1")'
    lenient = {"type": "json_schema", "json_schema": {"schema": schema, "strict": False}}
    check_guide(SamplingParams(response_format=lenient).guide)


@pytest.mark.parametrize("more", [{}, {"name": "x", "strict": True}])
def test_a_schema_within_another_object_is_refused(more: Schema) -> None:
    """By itself that one would ask for nothing."""
    with pytest.raises(RequestError, match="give what is under schema alone"):
        check_guide(SamplingParams(response_format=of_schema({**more, "schema": {"type": "array"}})).guide)
    check_guide(SamplingParams(response_format=of_schema({"type": "object", "schema": {}})).guide)


def test_names_of_fields_and_values_are_no_keywords(walks: Walks) -> None:
    """Nor are words that a draft leaves to others, nor definitions that nothing refers to."""
    schema: Schema = {
        "type": "object",
        "properties": {"not": {"enum": [{"if": 1}]}, "uniqueItems": {"const": {"disallow": 2}}},
        "default": {"extends": 3},
        "x-order": ["not"],
        "nullable": True,
        "discriminator": {"propertyName": "not"},
        "$defs": {"unused": {"not": {}}},
        "required": ["not", "uniqueItems"],
        "additionalProperties": False,
    }
    assert walks.takes(schema, '{"not": {"if": 1}, "uniqueItems": {"disallow": 2}}')
    assert not walks.takes(schema, '{"not": {"if": 2}, "uniqueItems": {"disallow": 2}}')


def test_a_schema_of_many_parts_is_looked_through_quickly() -> None:
    """Each once, however often it is referred to."""
    names = [f"d{at}" for at in range(400)]
    refers = [{"$ref": f"#/$defs/{name}"} for name in names]
    schema = {"$ref": "#/$defs/d0", "$defs": {name: {"anyOf": refers} for name in names}}
    assert schema_words.unenforced(schema) is None
    schema["$defs"]["d399"]["not"] = {}  # type: ignore[index]
    assert schema_words.unenforced(schema) == (
        'not cannot be enforced; leave out, or say "strict": false beside the schema (at "#/$defs/d399")'
    )
