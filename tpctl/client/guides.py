"""What llguidance makes of a grammar, and whether it takes it: for the front, which refuses early, and for rank 0.

https://github.com/guidance-ai/llguidance. Its own limits bound what a grammar costs: fuel for regular expressions,
items and states of the parser.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeVar

from tpctl.client.grammar_process import GrammarProcesses
from tpctl.client.grammar_text import WHITESPACE, check_installed
from tpctl.client.reasoning import Form, Tags
from tpctl.client.reasoning_stream import begins_in_thought
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.harmony import messages
from tpctl.client.tools.lark import Lark
from tpctl.errors import RequestError, TpctlError, again
from tpctl.wire.guide import BESIDE_TOOLS, Guide
from tpctl.wire.sampling import SamplingParams

T = TypeVar("T")

_KEPT = 1024
_known: OrderedDict[bytes, str | None] = OrderedDict()
"""Why grammars are not taken, by a digest: their texts have up to 256 KiB each."""
_lock = threading.Lock()
_processes = GrammarProcesses()

Tried = str | TpctlError | None
"""Why a grammar is not taken, or could not be tried; ``None``: it is taken."""

_found: ContextVar[Mapping[Guide, Tried] | None] = ContextVar("tpctl_found", default=None)


class Untried(Exception):
    """A grammar that would have to be tried first."""

    def __init__(self, guide: Guide) -> None:
        super().__init__(guide.name)
        self.guide = guide


def without_trials(found: Mapping[Guide, Tried], work: Callable[..., T], *arguments: Any) -> T:
    """What ``work`` returns, which tries no grammar: that takes no time, and can be done elsewhere.

    Args:
        found: what was found out for it.

    Raises:
        Untried: it needs one that is neither known nor among those.
    """
    token = _found.set(found)
    try:
        return work(*arguments)
    finally:
        _found.reset(token)


def interrupt() -> None:
    """End what other threads have tried, and what they wait for; they get a ``BusyError``."""
    _processes.interrupt()


def tried(guide: Guide) -> Tried:
    """Try a grammar, which is known then, unless that could not be."""
    try:
        return _problem(guide)
    except TpctlError as error:
        return error


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


def _problem(guide: Guide) -> str | None:
    """Why a grammar is not taken; ``None``: it is. Lines of a batch mostly have the same."""
    key = blake2b(f"{guide.kind} {guide.lenient} {guide.text}".encode(), digest_size=16).digest()
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    if (found := _found.get()) is not None:
        if guide not in found:
            raise Untried(guide)
        if isinstance(problem := found[guide], TpctlError):
            raise again(problem)  # it is told to all who wait for the guide
        return problem
    problem = _tried(guide)
    with _lock:
        _known[key] = problem
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return problem


def _tried(guide: Guide) -> str | None:
    """By a process, which its grammar may end."""
    check_installed(guide)
    return _processes.problem(guide)
