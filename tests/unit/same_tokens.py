"""Prompts that engines of all kinds are asked."""

from __future__ import annotations

from tests.unit.generating import requests
from tpctl.wire.messages import Request

TOKENS = 10

SHARED = [(7 * number) % 120 + 3 for number in range(30)]

PROMPTS = [*(SHARED[:length] for length in (3, 17, 30)), [*SHARED[:20], 77, 78], [9, 8, 7], [50] * 13]


def asked(prefix: str = "", prompts: list[list[int]] = PROMPTS) -> list[Request]:
    return requests(prefix, prompts, max_tokens=TOKENS)


SMALL_STATES = {"linear_key_head_dim": 2, "linear_value_head_dim": 2}
"""So that a cache of few blocks has states for several sequences."""
