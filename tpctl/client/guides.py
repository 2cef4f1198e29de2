"""What llguidance makes of a grammar, and whether it takes it: for the front, which refuses early, and for rank 0.

https://github.com/guidance-ai/llguidance. Its own limits bound what a grammar costs: fuel for regular expressions,
items and states of the parser.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from tpctl.client.deep_threads import deep_thread, said
from tpctl.client.reasoning import Form, Tags
from tpctl.client.reasoning_stream import begins_in_thought
from tpctl.client.schema_words import named, unenforced
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.harmony import messages
from tpctl.client.tools.lark import Lark, digits
from tpctl.errors import RequestError
from tpctl.wire.guide import BESIDE_TOOLS, Guide
from tpctl.wire.sampling import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLParserLimits

WHITESPACE = r"( |\n[ \t]{0,40})"
"""Between the parts of JSON, none or this. Small models that may go on with it for ever do."""


_KEPT = 1024
_known: OrderedDict[bytes, str | None] = OrderedDict()
"""Why grammars are not taken, by a digest: their texts have up to 256 KiB each."""
_lock = threading.Lock()


def check_guide(guide: Guide | None) -> None:
    """Refuse a grammar that cannot be used, before an engine is asked.

    Raises:
        RequestError: llguidance is not installed, or does not take it.
    """
    if guide is not None and (problem := _problem(guide)) is not None:
        raise RequestError(f"{guide.name}: {problem}")


def guided(sampling: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int], form: Form | None) -> SamplingParams:
    """Sampling for the answer to a conversation, whose form begins where a thought ends that the template has opened.

    Where none is open the answer has no thoughts, which are no part of its form.

    Raises:
        RequestError: as ``check_guide``; or it is not known where a thought ends.
    """
    check_guide(sampling.guide)
    if sampling.guide is None or form is None:
        return sampling
    name = sampling.guide.name
    if not isinstance(form, Tags):
        lark = Lark(tokenizer.added_ids, WHITESPACE, {}, frozenset())
        return with_grammar(sampling, lark.grammar(messages(lark, None, form, lark.form(sampling.guide))), name)
    if not begins_in_thought(tokenizer, prompt, form):
        return sampling
    if form.ids is None:
        raise RequestError(f"{name}: the model thinks before it answers, and {form.close} is no token of its own")
    return replace(sampling, guide_after=form.ids[1])


def with_grammar(sampling: SamplingParams, grammar: str, name: str) -> SamplingParams:
    """Sampling with a grammar in the place of what was asked for, of which it is made and which messages call ``name``,
    the engine's, too.

    Raises:
        RequestError: it is not taken.
    """
    made = replace(sampling, response_format=None, regex=None, choice=None, grammar=grammar, guide_name=name)
    check_guide(made.guide)
    return made


def called(sampling: SamplingParams, names: Mapping[str, str]) -> SamplingParams:
    """Sampling whose form messages call as a request does, which has ``names`` of its own for some fields."""
    guide = sampling.guide
    if guide is None:
        return sampling
    field, beside, _ = guide.name.partition(BESIDE_TOOLS)
    return sampling if field not in names else replace(sampling, guide_name=names[field] + beside)


def grammar_text(guide: Guide) -> str:
    """A grammar in the form that llguidance's classes take.

    Raises:
        RequestError: it is not installed, or takes no such schema.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise RequestError(
            f"{guide.name} needs the llguidance package; install it: pip install 'tpctl[guided]'"
        ) from None
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
    """What a grammar may take: some 100 MB and, at a step, some tens of milliseconds, at most."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _problem(guide: Guide) -> str | None:
    """Why a grammar is not taken; ``None``: it is. Lines of a batch mostly have the same."""
    key = blake2b(f"{guide.kind} {guide.lenient} {guide.text}".encode(), digest_size=16).digest()
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    problem = _tried(guide)
    with _lock:
        _known[key] = problem
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return problem


def _unenforced(guide: Guide) -> str | None:
    """What of a strict schema would not be held to."""
    if guide.kind != "json" or guide.lenient:
        return None
    try:
        return unenforced(json.loads(guide.text))
    except RecursionError:
        return None  # llguidance says how deep it may be


def _tried(guide: Guide) -> str | None:
    from_thread: Future[str | None] = Future()

    def work() -> None:
        try:
            if (problem := _unenforced(guide)) is None:
                from llguidance import LLMatcher

                failed, messages = LLMatcher.validate_grammar_with_warnings(grammar_text(guide), limits=parser_limits())
                problem = said(messages[0] if guide.kind == "regex" else named(messages[0])) if failed else None
            from_thread.set_result(problem)
        except RequestError as error:  # told as it is
            from_thread.set_exception(error)
        except BaseException as error:  # a panic of the library is no Exception
            from_thread.set_result(said(f"{type(error).__name__}: {error}"))

    deep_thread(work, "tpctl-grammar")
    return from_thread.result()
