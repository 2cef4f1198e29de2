"""Which settings the sampling kernel serves by itself."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "settings,plain",
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "seed": 5, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": (1,)}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, True),  # greedy: the likeliest is always kept
        ({"temperature": 0.7, "top_k": 5}, False),
        ({"temperature": 0.7, "top_p": 0.5}, False),
        ({"temperature": 0.7, "min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logprobs": 0}, False),
        ({"temperature": 0.7, "logprobs": 3}, False),
    ],
)
def test_plain(settings: dict[str, Any], plain: bool) -> None:
    assert SamplingParams(**settings).plain is plain
