"""/v1/completions of which the prompt is told again (``echo``), or alone: a server's requests and lines of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tpctl.client.fields import FieldError
from tpctl.client.forms import Wanted
from tpctl.errors import shown


class PromptLogprobs(NamedTuple):
    """How many likeliest tokens are told beside each of a prompt's; ``None``: nothing is told of it.

    ``asked``: by that name. ``echoed``: since answers with log-probabilities begin with their prompts.
    """

    asked: int | None
    echoed: int | None

    @property
    def most(self) -> int | None:
        """What the engine is to find."""
        return max((count for count in self if count is not None), default=None)


@dataclass(frozen=True)
class Echo:
    """How the answers to one prompt are told.

    Attributes:
        text: of the prompt, which they begin with; ``None``: they do not.
        scored: they have no tokens, whatever the engine makes.
    """

    text: str | None
    told: PromptLogprobs
    scored: bool

    def choice(
        self, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None, silent: Collection[int]
    ) -> dict[str, Any]:
        """An answer as it is told.

        Args:
            found: as ``client.openai_answers`` has choices.
            rows: of the prompt's tokens, with all likeliest ones that were found.
            silent: ids of control tokens.
        """
        found = dict(found)
        if self.scored:
            found |= {"text": "", "finish_reason": "length", **({"logprobs": []} if "logprobs" in found else {})}
        before, begun, offsets = self.text or "", list[dict[str, Any]](), list[int]()
        found["text"] = before + found["text"]
        if self.text is not None and self.told.echoed is not None:
            begun = likeliest(rows or (), self.told.echoed)
            offsets = places(begun, 0, silent, before)[:-1]
        if "logprobs" in found:
            found["text_offset"] = [*offsets, *places(found["logprobs"], len(before), silent)[:-1]]
            found["logprobs"] = [*begun, *found["logprobs"]]
        return found


def likeliest(rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Tokens with so many likeliest ones each, at most."""
    return [{**row, "top": row["top"][:most]} for row in rows]


def places(tokens: Sequence[Mapping[str, Any]], place: int, silent: Collection[int], text: str = "") -> list[int]:
    """Where tokens begin in the text that is returned, the first at ``place``, and where the last one ends.

    A control token, one of ``silent``, which an answer's text leaves out and which the tokenizer puts before a prompt,
    takes no room there, unless it stands in ``text``, the prompt as it was given.
    """
    found = [place]
    for token in tokens:
        said: str = token["token"]
        if token["id"] not in silent or text.startswith(said, place):
            place += len(said)
        found.append(place)
    return found


def scored(wanted: Wanted) -> tuple[Wanted, bool]:
    """What is asked of an engine, and whether that is about prompts alone: no tokens are to follow, but it makes one.

    Raises:
        FieldError: there must be more than none, or there are less.
    """
    fields = dict(wanted.fields)
    most = fields.get("max_tokens")
    if type(most) is int and most < 0:
        name = wanted.names.get("max_tokens", "max_tokens")
        raise FieldError(f"{name} is {shown(most)}, but must be at least 0", name)
    if type(most) is not int or most > 0:
        return wanted, False
    if fields.pop("min_tokens", 0):
        raise FieldError("min_tokens is set, and max_tokens is 0; leave one of them out", "min_tokens")
    return replace(wanted, fields={**fields, "max_tokens": 1}), True
