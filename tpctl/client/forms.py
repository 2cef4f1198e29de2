"""What a line asks for, in whatever form it does: tpctl's own, a data set's row, or one that others bring.

A form only reads; what is found is checked where lines become jobs (``jobs.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from tpctl.client.tokenizer import check_text
from tpctl.errors import RequestError, shown
from tpctl.wire.sampling import SamplingParams

if TYPE_CHECKING:
    from tpctl.client.tools.asked import Tools

SAMPLING_FIELDS = frozenset(one.name for one in fields(SamplingParams)) - {"guide_after", "guide_name"}
FIELDS = frozenset({"id", "prompt", "messages", "stop", "chat_template_kwargs"}) | SAMPLING_FIELDS

MOST_STOPS, MOST_STOP_CHARACTERS = 16, 4096
"""Texts that end an answer, and characters of them together: each token's text is held against them all."""

ALL = "all"
"""In the place of the names of the fields that are kept: all of them."""

ROW_FIELDS = (
    "id",
    "text",
    "reasoning",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "logprobs",
    "prompt_logprobs",
    "note",
    "error",
)
"""What an answer's row may have, in this order."""


@dataclass(frozen=True)
class Wanted:
    """What a line asks for: ``fields`` as of a line in tpctl's own form, so many answers, and tools they may call.

    Attributes:
        names: what it calls some of the fields, and of the variables for the chat template, by tpctl's own names.
        echo: whether answers begin with their prompt; ``scored``: they are to have no tokens (``client.echoed``).
    """

    fields: Mapping[str, Any]
    choices: int = 1
    tools: Tools | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    echo: bool = False
    scored: bool = False


class Form(Protocol):
    """How the lines of an input ask.

    Attributes:
        id_field: the field that a line's id is in.
        id_needed: a line without one is refused; otherwise it has its number.
    """

    @property
    def id_field(self) -> str: ...

    @property
    def id_needed(self) -> bool: ...

    def refused(self, reason: Exception, *, chat: bool) -> Mapping[str, Any]:
        """What the row of a line has besides that cannot be run for a ``reason``; ``chat``: it has messages."""

    def beside(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What the row of a line has besides the answer."""

    def wanted(self, entry: Mapping[str, Any]) -> Wanted:
        """What it asks for. Raises ``RequestError`` if that cannot be had."""


@dataclass(frozen=True)
class OwnForm:
    """tpctl's own, or the rows of a data set, of which a field is the prompt.

    Attributes:
        prompt_field: a text, or messages; other fields are then not looked at. ``None``: fields as README.md has them.
        id_of: the field of the id; ``None``: "id", where there is one.
        keep: fields that go into the row as they are; ``ALL``: all of them.
        answer: what the answer's text is called in the row.
    """

    prompt_field: str | None = None
    id_of: str | None = None
    keep: tuple[str, ...] | str = ()
    answer: str = "text"

    @property
    def id_field(self) -> str:
        return self.id_of or "id"

    @property
    def id_needed(self) -> bool:
        return self.id_of is not None

    def refused(self, reason: Exception, *, chat: bool) -> Mapping[str, Any]:
        return {}

    @property
    def taken(self) -> frozenset[str]:
        """Names that rows have themselves."""
        return frozenset(ROW_FIELDS) - {"text"} | {self.answer}

    def keeps(self, name: str) -> bool:
        """Whether a field goes into the row as it is. That of the id is there as the row's own, if it is called so."""
        return (self.keep == ALL or name in self.keep) and not name == self.id_field == "id"

    def beside(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        if not self.keep:
            return {}
        kept = {name: value for name, value in entry.items() if self.keeps(name)}
        if self.keep != ALL:
            kept |= {name: None for name in self.keep if name not in entry}
        if taken := kept.keys() & self.taken:
            raise RequestError(refused_name(min(taken)))
        return {"kept": finite(kept)}

    def wanted(self, entry: Mapping[str, Any]) -> Wanted:
        if self.prompt_field is not None:
            return Wanted(self._prompt(entry, self.prompt_field))
        # A known field that is null is not given.
        given = {name: value for name, value in entry.items() if value is not None or name not in FIELDS}
        own = {name for name in given if name not in FIELDS and self.keeps(name)}
        if self.id_needed:
            own.add(self.id_field)
        return Wanted({name: value for name, value in given.items() if name not in own})

    def _prompt(self, entry: Mapping[str, Any], name: str) -> dict[str, Any]:
        if name not in entry:
            raise RequestError(f"has no field {shown(name)}, which --prompt-column names; it has {_names(entry)}")
        value = entry[name]
        if value is None:
            raise RequestError(f"{name}, the prompt, is null")
        if isinstance(value, list):
            return {"messages": value}
        if not isinstance(value, str):
            raise RequestError(f"{name}, the prompt, is {shown(value)}, but must be a string or a list of messages")
        return {"prompt": value}


OWN = OwnForm()


def read_variables(value: Any) -> dict[str, Any]:
    """What a chat template is given besides; null is nothing. Raises ``RequestError``."""
    if not isinstance(value, dict | None):
        raise RequestError(f"chat_template_kwargs is {shown(value)}, but must be a JSON object")
    return dict(value or {})


def read_stop(value: Any) -> tuple[str, ...]:
    """Texts that end an answer, of which one may stand alone. Raises ``RequestError``."""
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and len(values) > MOST_STOPS:
        raise RequestError(f"stop has {len(values)} texts, but at most {MOST_STOPS} are taken; leave some out")
    if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
        raise RequestError(f"stop is {shown(value)}, but must be a string or a list of strings, none empty")
    for text in values:
        check_text(text, "stop text")
    if (size := sum(map(len, values))) > MOST_STOP_CHARACTERS:
        raise RequestError(
            f"stop has {size} characters in all, but at most {MOST_STOP_CHARACTERS} are taken; shorten its texts"
        )
    return tuple(values)


def finite(value: Any) -> Any:
    """A value with null in the place of numbers that JSON has no form for, which Python's and pandas' lines have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refused_name(name: str) -> str:
    """What is said of something to be kept whose name an answer's row has itself."""
    return (
        f"{shown(name)} is kept, and what answers' rows have is called so, too; leave it out of --keep-columns, or "
        "rename the answer's text with --answer-column"
    )


def _names(entry: Mapping[str, Any]) -> str:
    return ", ".join(map(shown, entry)) or "none"
