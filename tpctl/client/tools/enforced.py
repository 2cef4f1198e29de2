"""Answers that must call tools, or call them as their schemas say: what grammar that comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpctl.client.guides import WHITESPACE, check_guide, guided
from tpctl.client.reasoning import Form, Harmony
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.asked import Tools, ToolsError
from tpctl.client.tools.harmony import HarmonyCalls, messages
from tpctl.client.tools.lark import Lark
from tpctl.errors import RequestError
from tpctl.wire.sampling import SamplingParams


def formed(
    sampling: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int], form: Form | None, tools: Tools | None
) -> SamplingParams:
    """Sampling for an answer that keeps to the form that was asked for, and to what is asked of tools.

    Raises:
        RequestError: that cannot be had.
    """
    if tools is None:
        return guided(sampling, tokenizer, prompt, form)
    what = "tool_choice" if tools.must else "tools with strict"
    if sampling.guide is not None:
        raise ToolsError(f"{sampling.guide.name} is set beside tools; an answer can have one form", "tools")
    if not tools.must and not tools.strict:
        return sampling
    try:
        sampling = replace(sampling, grammar=grammar(tokenizer, tools, form))
        if isinstance(form, Harmony):
            check_guide(sampling.guide)
            return sampling
        return guided(sampling, tokenizer, prompt, form)
    except RequestError as error:
        said = str(error).removeprefix("grammar: ")
        raise ToolsError(f"{what}: {said}", "tool_choice" if tools.must else "tools") from None


def grammar(tokenizer: Tokenizer, tools: Tools, form: Form | None) -> str:
    """The grammar of answers, in Lark's language. Raises ``RequestError`` if there is none."""
    calls = tokenizer.tool_form
    if calls is None:
        raise RequestError("the model's chat template marks calls in no form that is known")
    lark = Lark(tokenizer.added_ids, WHITESPACE, tools.callable, tools.strict)
    said = calls.grammar(lark, single=tools.single)
    if isinstance(calls, HarmonyCalls):
        return lark.grammar(messages(lark, said, form, must=tools.must))
    if tools.must:
        return lark.grammar(said)
    if calls.bare or calls.opens[0] not in tokenizer.added_ids:
        raise RequestError(
            "calls of this model begin with no token of their own, so they are not told from text before"
        )
    text = lark.without(*calls.opens)
    return lark.grammar(f"{text} ({said} {text})?")
