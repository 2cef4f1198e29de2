"""An answer's tokens as text, what the model thought kept apart from what it answers, as they come.

Marks that are single tokens are seen by their ids, before text is made of them: what merely looks like one stays text.
Tags of several tokens are found in the text, and what may begin one is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tpctl.client.detokenizer import Detokenizer, detokenizer
from tpctl.client.overlap import overlap
from tpctl.client.reasoning import Form, Harmony, Tags
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.calls import CallPiece

if TYPE_CHECKING:
    from tpctl.client.tools.harmony import CallMessages

_TAIL = 32  # tokens at a prompt's end in which a tag, and white space behind it, are looked for
_BREAKS = "\r\n"


class Segment(NamedTuple):
    """A piece of an answer, or of what was thought before it; or of a ``call``, which has no text."""

    text: str
    reasoning: bool = False
    call: CallPiece | None = None


class Splitter(Protocol):
    """Takes ids one at a time and gives the text they complete."""

    def push(self, id: int) -> list[Segment]: ...

    def finish(self) -> list[Segment]:
        """What was held back."""
        ...


def splitter(
    tokenizer: Tokenizer, prompt: Sequence[int], form: Form | None, calls: CallMessages | None = None
) -> TextSplitter:
    """For the answer that follows the tokens ``prompt``; without a ``form`` all of it is answer.

    ``calls`` reads the messages that are calls of tools, where an answer is several messages.
    """
    text = detokenizer(tokenizer, prompt)
    if form is None:
        return Whole(text)
    if isinstance(form, Harmony):
        return _HarmonySplitter(text, form, calls)
    return _TagSplitter(text, form, _place(tokenizer, prompt, form))


def begins_in_thought(tokenizer: Tokenizer, prompt: Sequence[int], form: Tags) -> bool:
    """Whether the answer that follows ``prompt`` begins in a thought, which its template has opened."""
    return _place(tokenizer, prompt, form) is _Place.reasoning


def _place(tokenizer: Tokenizer, prompt: Sequence[int], form: Tags) -> _Place:
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip()
    if tail.endswith((form.open + form.label).rstrip()):
        return _Place.reasoning
    return _Place.answer if tail.endswith(form.close) else _Place.opening


class TextSplitter(Splitter, Protocol):
    """One whose answers may hold marks that are no text."""

    @property
    def thinking(self) -> bool:
        """Whether the next token stands in a thought."""
        ...

    def cut(self) -> list[Segment]:
        """What was held back, before a token that is no text; what comes behind it is the answer."""
        ...


class Whole:
    """Where a model has no thoughts of its own: all that its ``detokenizer`` makes is answer."""

    thinking = False

    def __init__(self, text: Detokenizer) -> None:
        self.detokenizer = text

    def push(self, id: int) -> list[Segment]:
        text = self.detokenizer.push(id)
        return [Segment(text)] if text else []

    def finish(self) -> list[Segment]:
        return _segments(self.detokenizer.finish())

    cut = finish


class _Place(Enum):
    """Where in an answer the next token stands."""

    opening = auto()  # at its beginning: thoughts may come
    reasoning = auto()
    answer = auto()


class _TagSplitter:
    """Thoughts between two tags.

    The opening one counts at the beginning only, where nothing but white space stands before it: an answer may speak of
    tags. Line breaks beside the tags are the template's and belong to neither side.
    """

    def __init__(self, text: Detokenizer, tags: Tags, place: _Place) -> None:
        self._detokenizer = text
        self._tags = tags
        self._by_text = tags.ids is None
        self._marks = tags.around_ids | set(tags.ids or ())
        self._place = place
        self._held = ""  # what may be, or begin, a tag
        self._thoughts = _Trimmed(tags.label, both=True)
        self._answer = _Trimmed()

    def push(self, id: int) -> list[Segment]:
        if id not in self._marks:
            text = self._detokenizer.push(id)
            return self._take(text) if text else []
        if id in self._tags.around_ids:
            return self._pass_mark()
        if id != self._awaited():
            return self._take(self._detokenizer.push(id))
        found = self._take(self._detokenizer.finish())
        if id == self._awaited():
            return found + self._pass_tag()
        return found + self._take(self._detokenizer.push(id))  # behind broken bytes it is no opening tag

    def finish(self) -> list[Segment]:
        found = self._take(self._detokenizer.finish())
        held, self._held = self._held, ""
        if self._place is _Place.reasoning:
            return found + _segments(self._thoughts.push(held) + self._thoughts.finish(), reasoning=True)
        return found + _segments(held)

    @property
    def thinking(self) -> bool:
        return self._place is _Place.reasoning

    def cut(self) -> list[Segment]:
        found = self._take(self._detokenizer.finish())
        held, self._held = self._held, ""
        if self._place is _Place.opening:
            self._place = _Place.answer
        return found + _segments(held)

    def _awaited(self) -> int | None:
        """The id of the tag that would be one where the next token stands."""
        if self._tags.ids is None or self._place is _Place.answer:
            return None
        return self._tags.ids[0 if self._place is _Place.opening else 1]

    def _pass_tag(self) -> list[Segment]:
        """Go on behind a tag, before which nothing is held back any more but white space before an opening one."""
        self._held = ""
        if self._place is _Place.opening:
            self._place = _Place.reasoning
            return []
        self._place = _Place.answer
        return _segments(self._thoughts.finish(), reasoning=True)

    def _pass_mark(self) -> list[Segment]:
        """Go on behind a mark that the answer begins or ends with: what is thought ends there, too."""
        found = self._take(self._detokenizer.finish())
        if self._place is _Place.reasoning:
            return found + self._pass_tag()
        held, self._held, self._place = self._held.strip(), "", _Place.answer
        return found + _segments(held)

    def _take(self, text: str) -> list[Segment]:
        if not text:
            return []
        match self._place:
            case _Place.opening:
                return self._open(self._held + text)
            case _Place.reasoning:
                return self._think(text)
        return _segments(self._answer.push(text))

    def _open(self, text: str) -> list[Segment]:
        """Text at the beginning, where only an opening tag may stand."""
        bare, tag = text.lstrip(), self._tags.open
        if self._by_text and bare.startswith(tag):
            return self._pass_tag() + self._take(bare[len(tag) :])
        if not bare or (self._by_text and tag.startswith(bare)):
            self._held = text
            return []
        self._held, self._place = "", _Place.answer
        self._answer.begun = True  # no tag, so its white space is its own
        return _segments(text)

    def _think(self, text: str) -> list[Segment]:
        tag = self._tags.close
        if not self._held and not (self._by_text and tag[0] in text):  # as nearly all
            return _segments(self._thoughts.push(text), reasoning=True)
        text = self._held + text
        if self._by_text and (at := text.find(tag)) >= 0:
            before = _segments(self._thoughts.push(text[:at]), reasoning=True)
            return before + self._pass_tag() + self._take(text[at + len(tag) :])
        keep = overlap(text, tag) if self._by_text else 0
        self._held = text[len(text) - keep :]
        return _segments(self._thoughts.push(text[: len(text) - keep]), reasoning=True)


class _Trimmed:
    """Text as it comes, without line breaks and a label before it, and with ``both`` without line breaks behind it.

    Attributes:
        begun: whether there has been text.
    """

    def __init__(self, label: str = "", *, both: bool = False) -> None:
        self._label = label
        self._both = both
        self._held = ""  # a part of the label, or line breaks that may be the last
        self.begun = False

    def push(self, piece: str) -> str:
        if self.begun and not self._held and not (self._both and piece.endswith(("\r", "\n"))):  # as nearly all
            return piece
        text = self._held + piece
        if not self.begun:
            text = text.lstrip(_BREAKS)
            if self._label and self._label.startswith(text) and text != self._label:
                self._held = text
                return ""
            if text.startswith(self._label):
                text, self._label = text[len(self._label) :].lstrip(_BREAKS), ""
            self.begun = bool(text)
        shown = text.rstrip(_BREAKS) if self._both else text
        self._held = text[len(shown) :]
        return shown

    def finish(self) -> str:
        """What was held back and is neither label nor line breaks."""
        held, self._held = self._held, ""
        return "" if self.begun or held == self._label.rstrip() else held


class _HarmonySplitter:
    """Messages on channels: what is on ``analysis`` was thought, all else is answer.

    A call of a tool, which is addressed to somebody, is part of the answer, its header included, as the model wrote it,
    unless ``calls`` reads it. Messages of one kind are a blank line apart.
    """

    def __init__(self, text: Detokenizer, marks: Harmony, calls: CallMessages | None = None) -> None:
        self._detokenizer = text
        self._calls = calls
        self._calling = False
        self._marks = marks
        self._header: list[str] | None = [""]  # before the channel's mark and behind it; None within a message
        self._marked = False  # whether there has been a mark: what comes without any is answer
        self._reasoning = False
        self._said = {False: False, True: False}
        self._between = ""  # goes before the next text of this message

    def push(self, id: int) -> list[Segment]:
        marks = self._marks
        if id not in (marks.start, marks.channel, marks.message, marks.end):
            return self._take(self._detokenizer.push(id))
        found = self.cut()
        self._marked = True
        if id == marks.message and self._header is not None:
            return found + self._begin(self._header)
        if id == marks.channel and self._header is not None:
            self._header.append("")
        elif id in (marks.start, marks.end):
            found += self._end_call()
            self._header = [""]
        return found

    def finish(self) -> list[Segment]:
        found = self.cut() + self._end_call()
        return found if self._marked or self._header is None else found + _segments("".join(self._header))

    @property
    def thinking(self) -> bool:
        return self._header is None and self._reasoning

    def cut(self) -> list[Segment]:
        return self._take(self._detokenizer.finish())

    def _end_call(self) -> list[Segment]:
        if self._calls is None or not self._calling:
            return []
        self._calling = False
        return self._told(self._calls.end())

    def _begin(self, header: list[str]) -> list[Segment]:
        """The text of a message begins."""
        self._header = None
        words = [word for word in " ".join(header).split() if word != "assistant"]
        call = any(word.startswith("to=") for word in words)
        self._reasoning = not call and words[:1] == ["analysis"]
        self._between = "\n\n" if self._said[self._reasoning] else ""
        if call and self._calls is not None and self._calls.begin(" ".join(words)):
            self._calling = True
            return self._told(self._calls.push(""))
        return self._take(" ".join(words) + "\n") if call else []

    def _take(self, text: str) -> list[Segment]:
        if not text:
            return []
        if self._header is not None:
            self._header[-1] += text
            return []
        if self._calling and self._calls is not None:
            return self._told(self._calls.push(text))
        return self._say(text)

    def _told(self, told: Sequence[str | CallPiece]) -> list[Segment]:
        found = []
        for piece in told:
            found += self._say(piece) if isinstance(piece, str) else [Segment("", call=piece)]
        return found

    def _say(self, text: str) -> list[Segment]:
        text, self._between = self._between + text, ""
        self._said[self._reasoning] = True
        return _segments(text, reasoning=self._reasoning)


def _segments(text: str, *, reasoning: bool = False) -> list[Segment]:
    return [Segment(text, reasoning)] if text else []
