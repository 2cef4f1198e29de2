"""Answers that must call tools, or call them as their schemas say: what grammar that comes to."""

from __future__ import annotations

from collections.abc import Sequence

from tpctl.client.grammar_text import WHITESPACE
from tpctl.client.guides import check_guide, guided, with_grammar
from tpctl.client.reasoning import Form, Harmony
from tpctl.client.schema_words import unenforced
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.asked import Tools, ToolsError
from tpctl.client.tools.forms import ToolForm
from tpctl.client.tools.harmony import HarmonyCalls, messages
from tpctl.client.tools.lark import Lark, NoGrammar
from tpctl.client.tools.llama import Llama
from tpctl.errors import RequestError
from tpctl.wire.guide import BESIDE_TOOLS, STRICT, TOOL_CHOICE, Guide
from tpctl.wire.sampling import SamplingParams


def formed(
    sampling: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int], form: Form | None, tools: Tools | None
) -> SamplingParams:
    """Sampling for an answer that keeps to the form that was asked for, and to what is asked of tools.

    Where it may have a form or call tools, it does one of the two. Arguments of calls that the model need not make are
    not enforced where no grammar tells what a call is.

    Raises:
        RequestError: that cannot be had.
    """
    guide = sampling.guide
    if tools is None or not (tools.must or tools.strict or guide):
        return guided(sampling, tokenizer, prompt, form) if tools is None else sampling
    what = TOOL_CHOICE if tools.must else f"{guide.name}{BESIDE_TOOLS}" if guide else STRICT
    try:
        check_guide(guide)
        sampling = with_grammar(sampling, grammar(tokenizer, tools, form, guide), what)
        return sampling if isinstance(form, Harmony) else guided(sampling, tokenizer, prompt, form)
    except NoGrammar as error:
        if not tools.must and guide is None:
            return sampling
        said = str(error)
    except RequestError as error:
        said = str(error).removeprefix(f"{guide.name}: " if guide else "")
    said = said if said.startswith(what) else f"{what}: {said}"
    raise ToolsError(said, "tool_choice" if tools.must else "tools")


def grammar(tokenizer: Tokenizer, tools: Tools, form: Form | None, guide: Guide | None = None) -> str:
    """The grammar of answers, in Lark's language; what of them is no call is of the form ``guide``.

    Raises:
        RequestError: there is none.
    """
    calls = tokenizer.tool_form
    if calls is None:
        raise RequestError("the model's chat template marks calls in no form that is known")
    lark = Lark(tokenizer.added_ids, WHITESPACE, tools.callable, tools.strict)
    try:
        said = calls.grammar(lark, single=tools.single)
    except NoGrammar:
        raise
    except RequestError:
        for name, schema in tools.callable.items():
            if name in tools.strict and (problem := unenforced(schema)) is not None:
                raise RequestError(f"{name}: {problem}") from None
        raise
    if isinstance(calls, HarmonyCalls):
        text = None if guide is None or tools.must else lark.form(guide)
        return lark.grammar(messages(lark, said, form, text, must=tools.must))
    if tools.must:
        return lark.grammar(said)
    return lark.grammar(_text_or(lark, calls, said) if guide is None else _form_or(lark, calls, said, guide))


def _text_or(lark: Lark, calls: ToolForm, said: str) -> str:
    """Text, in which there may be calls: ``said`` is what they are."""
    mark = calls.opens[0]
    text = lark.without(*calls.opens, begins=calls.bare)
    if calls.bare:
        behind = f"({lark.mark(mark)} {said})?" if lark.single(mark) else ""
        return f"{said} | {text} {behind}"
    if lark.single(mark):
        return f"{text} ({said} {text})?"
    return f"{text} | {lark.ending(text, mark)} {said.removeprefix(lark.mark(mark))} {text}"


def _form_or(lark: Lark, calls: ToolForm, said: str, guide: Guide) -> str:
    """Calls, or what has a form."""
    if not isinstance(calls, Llama):
        return f"{said} | {lark.form(guide)}"
    if guide.kind != "json":
        raise NoGrammar("calls of this model begin with no mark, and are told from JSON alone")
    marked = f"{lark.mark(calls.opens[0])} {said} | " if lark.single(calls.opens[0]) else ""
    return f"{marked}{calls.objects(lark)} | {lark.form(guide)}"
