"""How one request wants its tokens chosen. Torch-free: the command line builds it, every rank reads it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from tpctl.errors import RequestError, shorten, shown
from tpctl.wire import guide
from tpctl.wire.guide import Guide, guide_of
from tpctl.wire.ranges import BIAS, RANGES

MOST_BIASES = 1024
"""Tokens of ``logit_bias``. Each costs every rank 12 bytes and an addition at every step."""
MOST_STOP_IDS = 256
"""Of ``stop_token_ids``, as many as a vocabulary has control tokens (Llama 3's). Where an answer may not end yet, or is
of a given form, each is looked at in every step."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    Attributes:
        temperature: 0 takes the likeliest token; from 1e-4 on the logits are divided by it.
        top_k: keep the ``top_k`` likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities first reach ``top_p``; 1 keeps all.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest; 0 keeps all.
        repetition_penalty: logits of tokens that already occur, in the prompt too, are divided (positive) or multiplied
            (negative) by it.
        presence_penalty: taken from the logits of every token that was generated before; -2 to 2.
        frequency_penalty: the same, as often as it was generated.
        min_tokens: neither end-of-sequence nor stop tokens, nor stop texts, end the answer before it has so many.
        seed: the request's randomness is a function of (seed, position) alone. 63 bits.
        max_tokens: how many tokens to generate at most.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: tokens that end the answer, besides the model's own; at most ``MOST_STOP_IDS``.
        logit_bias: pairs of a token and what is added to its logit, -100 to 100; in JSON also an object by token. At
            most ``MOST_BIASES``.
        logprobs: report the log-probability of the chosen token and of this many likeliest ones, as the model gives
            them, before grammar, temperature, penalties and filters; ``None`` reports none.
        prompt_logprobs: the same for the prompt's own tokens, but for the first, each given those before it. The prompt
            is then computed whole: no part of it is taken from the prefix cache, or left there.
        response_format: "json_object", or "json_schema" with a schema, as OpenAI's interface has it (``wire.guide``).
        regex: an expression that the whole answer matches, in the syntax of Rust's ``regex``, whose digits are ASCII.
        choice: texts, of which the answer is one.
        grammar: what the answer must be, in Lark's language, from ``start`` on. One of these four at most.
        guide_after: the token that a thought ends with, which stands open when the answer begins: the answer's form
            begins behind it; ``None``: with the first token.
        guide_name: what messages call the form, where ``grammar`` was made of what the request asks for;
            ``None``: the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = field(default=None, hash=False)
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    guide_after: int | None = None
    guide_name: str | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            object.__setattr__(self, name, _typed(name, getattr(self, name)))
        for name, values in RANGES.items():
            value = getattr(self, name)
            if value is not None and not values.holds(value):
                raise RequestError(f"{name} is {value}, but must be {values.said}")
        for token, bias in self.logit_bias:
            if not BIAS.holds(bias):
                raise RequestError(f"logit_bias: that of token {token} is {bias}, but must be {BIAS.said}")
        if self.min_tokens > (most := self.max_tokens):
            raise RequestError(f"min_tokens is {self.min_tokens}, but must be at most {most}, which is max_tokens")
        if self.guide is not None and self.ignore_eos:
            raise RequestError(f"ignore_eos is true beside {self.guide.name}, which says where the answer ends")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def _biased(self) -> tuple[array[int], array[float]]:
        """The tokens of ``logit_bias``, in order, 64 bits each, and what is added to them, in float32."""
        return array("q", (token for token, _ in self.logit_bias)), array("f", (bias for _, bias in self.logit_bias))

    def biases(self, first: int, count: int) -> tuple[array[int], array[float]]:
        """Those of ``count`` tokens from ``first`` on, as ``_biased`` has them."""
        tokens, values = self._biased
        own = slice(bisect_left(tokens, first), bisect_left(tokens, first + count))
        return tokens[own], values[own]

    @cached_property
    def guide(self) -> Guide | None:
        """The grammar that the answer must follow, if any."""
        return guide_of({name: getattr(self, name) for name in guide.NAMES}, self.guide_name)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as a JSON-ready dictionary that ``from_dict`` reads back."""
        values = ((field.name, getattr(self, field.name), field.default) for field in _FIELDS.values())
        return {name: value for name, value, default in values if value != default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from JSON values, checking names and types.

        Raises:
            RequestError: a name is unknown, or a value has the wrong type or range.
        """
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in _FIELDS:
                raise RequestError(f"unknown sampling field {shorten(repr(name))}; known: {', '.join(sorted(_FIELDS))}")
            checked[name] = value
        return cls(**checked)


_FIELDS = {field.name: field for field in fields(SamplingParams)}
_OPTIONAL = {"logprobs", "prompt_logprobs", "guide_after", "guide_name", *guide.NAMES}
_FLOATS = {name for name, values in RANGES.items() if not values.whole}


def _typed(name: str, value: Any) -> Any:
    wanted = "a whole number"
    if name == "ignore_eos":
        wanted = "true or false"
        good = isinstance(value, bool)
    elif name == "stop_token_ids":
        _check_count(name, value, MOST_STOP_IDS)
        wanted = "a list of whole numbers"
        good = isinstance(value, list | tuple) and all(_is_int(v) for v in value)
        value = tuple(value) if good else value
    elif value is None and name in _OPTIONAL:
        return None
    elif name == "response_format":
        return guide.response_format(value)
    elif name == "choice":
        wanted = "a list of texts, none of them empty"
        good = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(v, str) and v for v in value)
        value = tuple(value) if good else value
    elif name in ("regex", "grammar", "guide_name"):
        wanted = "a text that is not empty"
        good = isinstance(value, str) and value != ""
    elif name == "logit_bias":
        _check_count(name, value, MOST_BIASES)
        wanted = "an object of numbers by token id"
        pairs = _biases(value)
        good = pairs is not None
        value = value if pairs is None else pairs
    elif name in _FLOATS:
        wanted = "a number"
        good = isinstance(value, float) or _is_int(value)
        try:
            value = float(value) if good else value
        except OverflowError:  # a whole number beyond every float
            good = False
    else:
        good = _is_int(value)
    if not good:
        raise RequestError(f"{name} is {shown(value)}, but must be {wanted}")
    return value


def _check_count(name: str, value: Any, most: int) -> None:
    """Raise ``RequestError`` if a list or an object has too many tokens."""
    if isinstance(value, list | tuple | Mapping) and len(value) > most:
        raise RequestError(f"{name} has {len(value)} tokens, but at most {most} are taken; leave some out")


def _biases(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Pairs in the order of their tokens; ``None`` where ``value`` has not their form."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        found = {_token(token): float(bias) for token, bias in pairs if not isinstance(bias, bool | str)}
    except (TypeError, ValueError, OverflowError):
        return None
    return tuple(sorted(found.items())) if len(found) == len(value) else None


def _token(value: Any) -> int:
    """A token id, which keys of JSON objects write as a text."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | str)
        or (isinstance(value, str) and not (value.isascii() and value.isdigit()))
    ):
        raise TypeError
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
