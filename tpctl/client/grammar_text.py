"""A form as llguidance takes it, and the limits that it is given."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tpctl.client.deep_threads import said
from tpctl.client.tools.lark import digits
from tpctl.errors import RequestError
from tpctl.wire.guide import Guide

if TYPE_CHECKING:
    from llguidance import LLParserLimits

WHITESPACE = r"( |\n[ \t]{0,40})"
"""Between the parts of JSON, none or this. Small models that may go on with it for ever do."""


def check_installed(guide: Guide) -> None:
    """Raise ``RequestError`` if llguidance is not."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError(
            f"{guide.name}: this needs the llguidance package, which is not installed; pip install 'tpctl[guided]'"
        ) from None


def grammar_text(guide: Guide) -> str:
    """A grammar in the form that llguidance's classes take.

    Raises:
        RequestError: it is not installed, or takes no such schema.
    """
    check_installed(guide)
    from llguidance import LLMatcher

    if guide.kind == "json":
        options = {"whitespace_pattern": WHITESPACE, **({"lenient": True} if guide.lenient else {})}
        try:
            return LLMatcher.grammar_from_json_schema(guide.text, overrides=options)  # type: ignore[arg-type]
        except ValueError as error:  # nested too deeply
            raise RequestError(f"{guide.name}: {said(str(error))}") from None
    if guide.kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{digits(guide.text)}/")
    if guide.kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(guide.text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    return LLMatcher.grammar_from_lark(guide.text)


def parser_limits() -> LLParserLimits:
    """What a grammar may take: some 100 MB. What it takes at a step they bound loosely.

    Of a parser's items each is looked for among those of its row, and how many a row gets is not bounded while it
    is made: 50,000 items, llguidance's own limit, may take 10 s, 20,000 take 2. An object of 490 fields that may be
    absent, more than which make a row too long, needs over 10,000.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, step_max_items=20_000, verbose_errors=False)
