"""Which settings a captured step serves by itself, and what finding their tokens takes."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.cli.options import DistributionOptions, SamplingOptions
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.errors import RequestError, UsageError
from tpctl.wire.sampling import SamplingParams


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
        ({"presence_penalty": -1.0}, True, 0),
        ({"frequency_penalty": 0.1}, True, 0),
        ({"min_tokens": 3}, False, 0),  # the first three tokens only: ScheduledBatch.searches
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


def test_tokens_that_may_not_end_an_answer_yet_need_the_host() -> None:
    sequence = Sequence("a", [5, 6], SamplingParams(min_tokens=2, temperature=0.7, top_k=3), 99)
    found = [ScheduledBatch([ScheduledSequence(sequence, at, 1, True)], 1).searches for at in range(1, 5)]
    assert found == [None, None, 1, 1]


def test_options_are_checked_together() -> None:
    SamplingOptions(min_tokens=300).check()
    SamplingOptions(min_tokens=300, max_tokens=300).check({"max_tokens": 256})
    for options, most in ((SamplingOptions(min_tokens=300), 256), (SamplingOptions(min_tokens=300, max_tokens=99), 99)):
        with pytest.raises(UsageError, match=f"--min-tokens is 300, but must be at most {most}, which is max_tokens"):
            options.check({"max_tokens": 256})
    with pytest.raises(UsageError, match=r"--presence-penalty is 2\.1, but must be from -2 to 2"):
        DistributionOptions(presence_penalty=2.1).check()
