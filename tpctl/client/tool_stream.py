"""An answer's tokens as text, thoughts and calls, as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpctl.client.reasoning import Form
from tpctl.client.reasoning_stream import Segment, TextSplitter, splitter
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.asked import Tools, ToolsError
from tpctl.client.tools.calls import CallPiece
from tpctl.client.tools.find import KNOWN
from tpctl.client.tools.forms import ToolForm
from tpctl.client.tools.harmony import CallMessages, HarmonyCalls
from tpctl.client.tools.reader import Symbols
from tpctl.client.tools.reading import CallParser
from tpctl.errors import RequestError


class CallSplitter:
    """Finds calls in what another splitter tells of an answer. What is thought is left as it is."""

    def __init__(
        self,
        inner: TextSplitter,
        form: ToolForm,
        names: Mapping[str, Any],
        added: Mapping[str, int],
        *,
        single: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            names: of the tools, with the JSON schemas of their arguments.
            added: ids of the tokens that the tokenizer adds, by their text.
            single: the first call ends the answer.
        """
        symbols = Symbols(form.marks, added)
        self._inner = inner
        self._by_id = symbols.by_id
        self._parser = CallParser(form, symbols, names, single=single)

    @property
    def over(self) -> bool:
        """Whether there is a call, and there may be one only."""
        return self._parser.over

    @property
    def thinking(self) -> bool:
        """Whether the next token stands in a thought."""
        return self._inner.thinking

    def push(self, id: int) -> list[Segment]:
        symbol = self._by_id.get(id)
        if symbol is None or self._inner.thinking:
            return self._read(self._inner.push(id))
        return self._read(self._inner.cut()) + segments(self._parser.push(symbol))

    def cut(self) -> None:
        """The answer ends here for it may have no more tokens; ``finish`` is next."""
        self._parser.cut()

    def finish(self) -> list[Segment]:
        return self._read(self._inner.finish()) + segments(self._parser.finish())

    def _read(self, told: list[Segment]) -> list[Segment]:
        found: list[Segment] = []
        for segment in told:
            found += [segment] if segment.reasoning else segments(self._parser.push(segment.text))
        return found


def segments(told: Iterable[str | CallPiece]) -> list[Segment]:
    """What a parser told, with the arguments of a call that came together in one piece."""
    found: list[Segment] = []
    for piece in told:
        if isinstance(piece, str):
            found.append(Segment(piece))
            continue
        before = found[-1].call if found else None
        if before is not None and piece.at == before.at and piece.id is None and not (piece.taken_back or piece.cut):
            found[-1] = Segment("", call=before._replace(arguments=before.arguments + piece.arguments))
        else:
            found.append(Segment("", call=piece))
    return found


class _Messages:
    """Where the splitter of thoughts reads calls itself (harmony)."""

    def __init__(self, inner: TextSplitter, calls: CallMessages) -> None:
        self._calls = calls
        self._inner = inner
        self.push, self.finish, self.cut = inner.push, inner.finish, calls.cut

    @property
    def thinking(self) -> bool:
        """Whether the next token stands in a thought."""
        return self._inner.thinking

    @property
    def over(self) -> bool:
        return self._calls.over


def call_splitter(
    tokenizer: Tokenizer, prompt: Sequence[int], form: Form | None, tools: Tools
) -> CallSplitter | _Messages:
    """For the answer that follows the tokens ``prompt``, in which ``tools`` may be called.

    Raises:
        RequestError: the model's template marks no calls that are known.
    """
    marked = tokenizer.tool_form
    if marked is None:
        raise RequestError(no_tools(tokenizer))
    if isinstance(marked, HarmonyCalls):
        calls = CallMessages(tools.callable, single=tools.single)
        return _Messages(splitter(tokenizer, prompt, form, calls), calls)
    inner = splitter(tokenizer, prompt, form)
    return CallSplitter(inner, marked, tools.callable, tokenizer.added_ids, single=tools.single)


def check_tools(tokenizer: Tokenizer) -> None:
    """Refuse tools where the model's template has none. Raises ``ToolsError``, or ``CheckpointError``: no template."""
    if "tools" not in tokenizer.template.uses.variables or tokenizer.tool_form is None:
        raise ToolsError(no_tools(tokenizer), "tools")


def no_tools(tokenizer: Tokenizer) -> str:
    """Why a model cannot be given tools."""
    if "tools" not in tokenizer.template.uses.variables:
        what = "does not read them"
    else:
        what = f"marks calls in no form that is known: {KNOWN}"
    return (
        f"tools are given, but the model's chat template {what}; leave them out, or have another (--chat-template FILE)"
    )
