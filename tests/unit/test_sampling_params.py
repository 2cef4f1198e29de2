"""Which settings a captured step serves by itself, and what finding their tokens takes."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.cli.options import DistributionOptions, SamplingOptions
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.errors import RequestError, UsageError
from tpctl.wire.sampling import SamplingParams

DIRECT, ONE, TWO, HOST = SamplingPath.DIRECT, SamplingPath.ONE_FLOOR, SamplingPath.TWO_FLOORS, SamplingPath.HOST


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({}, DIRECT),
        ({"temperature": 0.7}, DIRECT),
        ({"temperature": 0.7, "seed": 5, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": (1,)}, DIRECT),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, DIRECT),  # greedy: the likeliest is always kept
        ({"temperature": 0.7, "top_k": 5}, ONE),
        ({"temperature": 0.7, "top_p": 0.5}, ONE),
        ({"temperature": 0.7, "min_p": 0.1}, ONE),
        ({"temperature": 0.7, "top_k": 5, "min_p": 0.1}, ONE),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.5}, TWO),
        ({"repetition_penalty": 1.1}, HOST),
        ({"presence_penalty": -1.0}, HOST),
        ({"frequency_penalty": 0.1}, HOST),
        ({"logprobs": 0}, HOST),
        ({"logit_bias": {"5": 1}}, HOST),
        ({"temperature": 0.7, "top_p": 0.5, "logprobs": 3}, HOST),
    ],
)
def test_what_samples_a_row(settings: dict[str, Any], path: SamplingPath) -> None:
    assert SamplingPath.of(batch_of(settings)) is path


def test_what_samples_rows_together() -> None:
    top_k, both = {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5}
    assert SamplingPath.of(batch_of({}, top_k)) is ONE
    assert SamplingPath.of(batch_of(both, top_k, {})) is TWO
    assert SamplingPath.of(batch_of({}, both, {"logprobs": 1})) is HOST
    assert SamplingPath.of(ScheduledBatch([], 0)) is DIRECT


def batch_of(*settings: dict[str, Any]) -> ScheduledBatch:
    rows = [Sequence(str(i), [5, 6], SamplingParams(**given), 99) for i, given in enumerate(settings)]
    return ScheduledBatch([ScheduledSequence(sequence, 1, 1, True) for sequence in rows], len(rows))


@pytest.mark.parametrize("top_k", [-1, 2**31, 2**63])
def test_a_top_k_that_no_tensor_holds_is_refused(top_k: int) -> None:
    with pytest.raises(RequestError, match=f"top_k is {top_k}, but must be between 0 and 2.31 - 1"):
        SamplingParams.from_dict({"top_k": top_k})


def test_tokens_that_may_not_end_an_answer_yet_need_the_host() -> None:
    sequence = Sequence("a", [5, 6], SamplingParams(min_tokens=2, temperature=0.7, top_k=3), 99)
    found = [SamplingPath.of(ScheduledBatch([ScheduledSequence(sequence, at, 1, True)], 1)) for at in range(1, 5)]
    assert found == [HOST, HOST, ONE, ONE]


def test_options_are_checked_together() -> None:
    SamplingOptions(min_tokens=300).check()
    SamplingOptions(min_tokens=300, max_tokens=300).check({"max_tokens": 256})
    for options, most in ((SamplingOptions(min_tokens=300), 256), (SamplingOptions(min_tokens=300, max_tokens=99), 99)):
        with pytest.raises(UsageError, match=f"--min-tokens is 300, but must be at most {most}, which is max_tokens"):
            options.check({"max_tokens": 256})
    with pytest.raises(UsageError, match=r"--presence-penalty is 2\.1, but must be from -2 to 2"):
        DistributionOptions(presence_penalty=2.1).check()


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1.5},
        {"stop_token_ids": 3},
        {"stop_token_ids": ["a"]},
        {"temperature": True},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"seed": 1.5},
        {"ignore_eos": "no"},
        {"logprobs": True},
    ],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused_before_they_reach_an_engine(values: dict[str, Any]) -> None:
    for made in (lambda: SamplingParams(**values), lambda: SamplingParams.from_dict(values)):
        with pytest.raises(RequestError, match=f"{next(iter(values))} is .*, but must be"):
            made()
    others: Any = {"temperature": 1, "stop_token_ids": [4, 5]}
    assert SamplingParams(**others) == SamplingParams(temperature=1.0, stop_token_ids=(4, 5))
