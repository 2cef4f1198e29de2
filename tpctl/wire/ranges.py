"""What the numbers of ``SamplingParams`` may be: for the checks, and for what describes a server's requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_LOGPROBS = 20


class Range(NamedTuple):
    """From ``least`` to ``most``, and how a refusal says it.

    ``above``: ``least`` itself is not taken. ``zero``: 0 is taken, too. ``whole``: whole numbers only.
    """

    least: float
    most: float | None
    said: str
    whole: bool = True
    above: bool = False
    zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether it is in the range, which a NaN is not."""
        from_least = value > self.least if self.above else value >= self.least
        return (from_least and (self.most is None or value <= self.most)) or (self.zero and value == 0)

    def schema(self) -> dict[str, Any]:
        """As JSON Schema has it."""
        found: dict[str, Any] = {"exclusiveMinimum" if self.above else "minimum": self.least}
        if self.most is not None:
            found["maximum"] = self.most
        kind = {"type": "integer" if self.whole else "number"}
        return {"anyOf": [{"const": 0}, {**kind, **found}]} if self.zero else {**kind, **found}


def _number(least: float, most: float, said: str, *, above: bool = False, zero: bool = False) -> Range:
    return Range(least, most, said, False, above, zero)


RANGES: Mapping[str, Range] = {
    "temperature": _number(1e-4, 1e4, "0, or from 0.0001 to 10000", zero=True),
    "top_k": Range(0, 2**31 - 1, "between 0 and 2^31 - 1 (0 keeps every token)"),
    "top_p": _number(0, 1, "above 0 and at most 1", above=True),
    "min_p": _number(0, 1, "between 0 and 1"),
    "repetition_penalty": _number(0.01, 100, "from 0.01 to 100"),
    "presence_penalty": _number(-2, 2, "from -2 to 2"),
    "frequency_penalty": _number(-2, 2, "from -2 to 2"),
    "seed": Range(0, 2**63 - 1, "between 0 and 2^63 - 1"),
    "max_tokens": Range(1, None, "at least 1"),
    "min_tokens": Range(0, None, "at least 0"),
    "logprobs": Range(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "guide_after": Range(0, 2**31 - 1, "between 0 and 2^31 - 1"),
}
"""By field; each is checked in this order."""

BIAS = _number(-100, 100, "from -100 to 100")
"""What may be added to a token's logit."""
