"""Which settings a captured step serves by itself, and what finding their tokens takes."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.engine.sampling_params import SamplingParams
from tpctl.errors import RequestError


@pytest.mark.parametrize(
    "settings,needs_host,searches",
    [
        ({}, False, 0),
        ({"temperature": 0.7}, False, 0),
        ({"temperature": 0.7, "seed": 5, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": (1,)}, False, 0),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, False, 0),  # greedy: the likeliest is always kept
        ({"temperature": 0.7, "top_k": 5}, False, 1),
        ({"temperature": 0.7, "top_p": 0.5}, False, 1),
        ({"temperature": 0.7, "min_p": 0.1}, False, 1),
        ({"temperature": 0.7, "top_k": 5, "min_p": 0.1}, False, 1),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.5}, False, 2),
        ({"repetition_penalty": 1.1}, True, 0),
        ({"logprobs": 0}, True, 0),
        ({"temperature": 0.7, "top_p": 0.5, "logprobs": 3}, True, 1),
    ],
)
def test_what_samples_a_row(settings: dict[str, Any], needs_host: bool, searches: int) -> None:
    params = SamplingParams(**settings)
    assert (params.needs_host, params.searches) == (needs_host, searches)


@pytest.mark.parametrize("top_k", [-1, 2**31, 2**63])
def test_a_top_k_that_no_tensor_holds_is_refused(top_k: int) -> None:
    with pytest.raises(RequestError, match=f"top_k is {top_k}, but must be between 0 and 2.31 - 1"):
        SamplingParams.from_dict({"top_k": top_k})
