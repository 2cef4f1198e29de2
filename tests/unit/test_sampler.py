"""Sampling over ranks equals sampling over whole rows, and follows the distribution it should."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.ranks import run_ranks
from tpctl.distributed import TPGroup
from tpctl.engine.sampling.bias import add_bias
from tpctl.engine.sampling.noise import gumbel_noise, noise_keys
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.engine.scheduling.sequence import LATE, NOT_FINITE, REFUSED
from tpctl.engine.scheduling.token_counts import TokenCounts
from tpctl.partition.cuts import Range, Vocab
from tpctl.wire.sampling import SamplingParams

VOCAB = 300


def sample(logits: torch.Tensor, rows: list[SamplingRow], tp_size: int) -> tuple[list[int], list | None]:
    """Sample from whole rows [R, VOCAB] held by ``tp_size`` ranks; all must agree."""
    slices = Vocab().ranges(VOCAB, tp_size)
    padded = torch.nn.functional.pad(logits, (0, slices[-1].stop - VOCAB), value=100.0)  # padding must never win

    def rank(group: TPGroup) -> tuple[list[int], list | None]:
        held = slices[group.rank]
        return Sampler(group, slices, VOCAB).sample(padded[:, held.start : held.stop], rows)

    results = run_ranks(tp_size, rank)
    assert all(result == results[0] for result in results)
    return results[0]


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.3, top_k=5, seed=2),
    SamplingParams(temperature=1.0, top_p=0.6, seed=3),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=4),
    SamplingParams(temperature=1.0, min_p=0.2, seed=5),
    SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=6, logprobs=3),
    SamplingParams(repetition_penalty=1.5, logprobs=0),
    SamplingParams(temperature=5.0, top_p=0.999, seed=8),
    SamplingParams(temperature=1.0, top_k=290, seed=9),
]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_biases_are_added_to_the_logits_of_their_tokens(tp_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB)
    given = [{7: 100.0}, {299: 60.0, 7: 40.0}, {}, {7: 2.5, 150: -100.0}]
    rows = [SamplingRow(SamplingParams(logit_bias=tuple(one.items()), logprobs=1), 5) for one in given]
    tokens, logprobs = sample(logits, rows, tp_size)
    biased = logits.clone()
    for row, one in enumerate(given):
        for token, bias in one.items():
            biased[row, token] += bias
    assert tokens == biased.argmax(-1).tolist() and tokens[:2] == [7, 299]
    raw = logits.log_softmax(-1)  # what is reported is the model's own
    assert logprobs is not None and logprobs[0][0] == pytest.approx(float(raw[0, 7]), abs=1e-5)


def test_a_request_s_biases_are_read_once() -> None:
    class Once(tuple[tuple[int, float], ...]):
        read = 0

        def __iter__(self) -> Iterator[tuple[int, float]]:
            Once.read += 1
            return super().__iter__()

    params = SamplingParams(logit_bias={str(token): 1.0 for token in range(100)})  # type: ignore[arg-type]
    object.__setattr__(params, "logit_bias", Once(params.logit_bias))
    for _ in range(5):
        logits = torch.zeros(3, 60)
        add_bias(logits, [SamplingParams(), params, SamplingParams()], 50, 55)
        assert logits.sum(1).tolist() == [0, 50, 0] and logits[1, :50].eq(1).all()
    assert Once.read <= 2


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_ranks_agree_with_one(tp_size: int) -> None:
    torch.manual_seed(0)
    for position in range(20):
        logits = torch.randn(len(MIXED), VOCAB) * 3
        rows = [SamplingRow(p, position, TokenCounts(0).follow([1, 2, 3, 250, 251])) for p in MIXED]
        whole_tokens, whole_logprobs = sample(logits, rows, 1)
        tokens, logprobs = sample(logits, rows, tp_size)
        assert tokens == whole_tokens
        for mine, theirs in zip(logprobs or [], whole_logprobs or [], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert mine[0] == pytest.approx(theirs[0], abs=1e-5)
                assert [pair[0] for pair in mine[1]] == [pair[0] for pair in theirs[1]]


def test_a_row_is_sampled_the_same_alone() -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(MIXED), VOCAB) * 3
    rows = [SamplingRow(p, 17, TokenCounts(0).follow([4, 5])) for p in MIXED]
    together, _ = sample(logits, rows, 1)
    separate = [sample(logits[i : i + 1], rows[i : i + 1], 1)[0][0] for i in range(len(rows))]
    assert together == separate


def reference_kept(logits: torch.Tensor, p: SamplingParams) -> set[int]:
    """The tokens that may be sampled, by the definitions of top-k, top-p and min-p on whole sorted rows."""
    probs = (logits / p.temperature).double().softmax(-1)
    order = probs.argsort(descending=True).tolist()
    if p.top_k:
        order = order[: p.top_k]
    mass = sum(float(probs[t]) for t in order)
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += float(probs[token]) / mass
        if reached >= p.top_p:
            break
    largest = float(probs.max())
    return {t for t in kept if float(probs[t]) >= p.min_p * largest}


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("params", [p for p in MIXED if p.temperature and p.repetition_penalty == 1.0])
def test_only_and_all_kept_tokens_are_sampled(params: SamplingParams, tp_size: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(VOCAB) * 2
    kept = reference_kept(logits, params)
    rows = [SamplingRow(params, position) for position in range(4000)]
    tokens, _ = sample(logits.expand(len(rows), -1), rows, tp_size)
    assert set(tokens) <= kept
    probs = (logits / params.temperature).softmax(-1)
    expected = probs / probs[list(kept)].sum()
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / len(tokens)
    for token in kept:
        p = float(expected[token])
        assert abs(float(counts[token]) - p) < 5 * (p * (1 - p) / len(tokens)) ** 0.5 + 1e-3


def test_noise_is_gumbel_and_a_function_of_seed_and_position() -> None:
    keys = torch.tensor([noise_keys(3, position) for position in range(200)])
    noise = gumbel_noise(keys, torch.arange(2000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert torch.isfinite(noise).all()
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[5:6, 100:200], gumbel_noise(keys[5:6], torch.arange(100, 200)))
    assert noise_keys(3, 1) != noise_keys(4, 1)
    # Neighbouring positions and tokens must not be correlated.
    flat = noise - noise.mean()
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.02
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.02


def test_repetition_penalty_and_logprobs() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20], logits[0, 30] = 3.0, 2.5, -1.0
    row = SamplingRow(SamplingParams(repetition_penalty=1.5, logprobs=2), 0, TokenCounts(0).follow([10, 10]))
    tokens, logprobs = sample(logits, [row], 2)
    assert tokens == [20]  # 3.0 / 1.5 falls below 2.5
    assert logprobs is not None
    expected = logits[0].log_softmax(-1)
    assert logprobs[0].logprob == pytest.approx(float(expected[20]), abs=1e-5)
    assert [pair[0] for pair in logprobs[0].top] == [10, 20]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_log_probabilities_are_exact_to_their_own_rounding(tp_size: int) -> None:
    """Of likely tokens of large logits as well: summed over a text, roundings to one side add up."""
    torch.manual_seed(5)
    logits = torch.randn(40, VOCAB) * 4 + 20
    logits[:20, 7] += 25  # all but certain
    _, logprobs = sample(logits, [SamplingRow(SamplingParams(logprobs=3), 0)] * 40, tp_size)
    exact = logits.double().log_softmax(-1)
    assert logprobs is not None
    for row, found in enumerate(logprobs):
        assert found is not None
        best = int(exact[row].argmax())
        assert found[0] == pytest.approx(float(exact[row, best]), rel=1e-7, abs=2e-7)
        for token, value in found.top:
            assert value == pytest.approx(float(exact[row, token]), rel=1e-7, abs=2e-7)


@pytest.mark.parametrize("tp_size", [1, 3])
def test_presence_and_frequency_penalties_count_what_was_generated(tp_size: int) -> None:
    """logit - count * frequency - (count > 0) * presence, of the answer's tokens, after the repetition penalty."""
    prompt, answer = [10, 20, 20], [30, 30, 30, 20, 299]
    logits = torch.zeros(1, VOCAB)
    for token, value in ((10, 3.0), (20, 3.2), (30, 4.0), (299, 3.5), (50, 2.9)):
        logits[0, token] = value

    def best(**way: float) -> int:
        counts = TokenCounts(len(prompt)).follow([*prompt, *answer])
        row = SamplingRow(SamplingParams(**way), 8, counts)  # type: ignore[arg-type]
        return sample(logits, [row], tp_size)[0][0]

    assert best() == 30
    assert best(frequency_penalty=0.2) == 30  # 3.4 against 299's 3.3
    assert best(frequency_penalty=0.3) == 299  # 3.1 against 3.2
    assert best(presence_penalty=0.6) == 30  # all of the answer alike
    assert best(presence_penalty=1.2) == 10  # 30 falls to 2.8
    assert best(presence_penalty=0.4, frequency_penalty=0.3) == 10
    assert best(repetition_penalty=1.3, presence_penalty=0.1) == 30  # 2.98 against 2.9, of 50
    assert best(repetition_penalty=1.3, presence_penalty=0.2) == 50
    assert best(frequency_penalty=-2.0) == 30


def test_penalties_equal_their_definition_by_ranks() -> None:
    torch.manual_seed(3)
    params = SamplingParams(1.1, seed=4, repetition_penalty=1.2, presence_penalty=-0.7, frequency_penalty=0.3)
    history = torch.randint(0, VOCAB, (90,)).tolist()
    rows = [SamplingRow(params, position, TokenCounts(30).follow(history)) for position in range(40)]
    logits = torch.randn(40, VOCAB)
    changed = logits.clone()
    for token in set(history):
        seen = changed[:, token]
        changed[:, token] = torch.where(seen > 0, seen / 1.2, seen * 1.2)
        count = history[30:].count(token)
        changed[:, token] -= 0.3 * count - 0.7 * (count > 0)
    plain = [SamplingRow(SamplingParams(1.1, seed=4), position) for position in range(40)]
    want, _ = sample(changed, plain, 1)
    assert sample(logits, rows, 1)[0] == want == sample(logits, rows, 3)[0]


@pytest.mark.parametrize("params", [p for p in MIXED if p.top_k != 290], ids=str)
def test_banned_tokens_are_never_sampled(params: SamplingParams) -> None:
    logits = torch.randn(50, VOCAB)
    banned = logits.topk(3).indices.tolist()
    rows = [
        SamplingRow(params, position, TokenCounts(1).follow([1, 2]), banned=frozenset(banned[position]))
        for position in range(50)
    ]
    tokens, logprobs = sample(logits, rows, 3)
    assert all(token not in never for token, never in zip(tokens, banned, strict=True))
    if params.logprobs:  # what the model says, whatever may come
        assert logprobs is not None
        assert all([id for id, _ in entry.top] == never for entry, never in zip(logprobs, banned, strict=True))


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 40] = logits[1, 200] = 1.0
    assert sample(logits, [SamplingRow(SamplingParams(), 0)] * 2, 3)[0] == [0, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 255, 256, 511, 512, 513, 700, 1024, 3000])
def test_greedy_takes_the_lowest_of_equal_logits(columns: int, dtype: torch.dtype) -> None:
    logits = torch.randint(-9, 9, (40, columns)).to(dtype)  # many ties
    logits[0] = 3.0
    logits[1] = float("-inf")
    logits[1, -1] = -5.0
    rows = [SamplingRow(SamplingParams(temperature=0.0), 5)] * 40
    tokens, _ = Sampler(TPGroup(), [Range(0, columns)], columns).sample(logits, rows)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert tokens == expected


def allowing(ids: list[int], refused: bool = False) -> torch.Tensor:
    """A row's ``allowed``, of these tokens."""
    bits = torch.zeros(-(-VOCAB // 32) * 32, dtype=torch.int64)
    bits[ids] = 1
    words = (bits.view(-1, 32) << torch.arange(32)).sum(-1)
    return torch.cat([words, torch.tensor([int(refused)])]).to(torch.int32)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5, 7])
def test_only_what_a_mask_allows_is_chosen_on_any_rank(tp_size: int) -> None:
    """Rows without one are chosen as if there were none; each mask leaves the distribution over what it allows."""
    torch.manual_seed(1)
    for position in range(10):
        logits = torch.randn(len(MIXED), VOCAB) * 3
        sets = [torch.randperm(VOCAB)[: 1 + 7 * row].tolist() for row in range(len(MIXED))]
        free = [SamplingRow(p, position, TokenCounts(0).follow([1, 2, 3, 250, 251])) for p in MIXED]
        rows = [
            replace(row, allowed=allowing(ids)) if at % 3 else row
            for at, (row, ids) in enumerate(zip(free, sets, strict=True))
        ]
        tokens, logprobs = sample(logits, rows, tp_size)
        without, raw = sample(logits, free, 1)
        for at, ids in enumerate(sets):
            assert tokens[at] in ids if at % 3 else tokens[at] == without[at]
        kept = torch.full_like(logits, float("-inf"))
        for at, ids in enumerate(sets):
            kept[at, ids if at % 3 else slice(None)] = logits[at, ids if at % 3 else slice(None)]
        assert tokens == sample(kept, free, 1)[0]
        for mine, theirs in zip(logprobs or [], raw or [], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:  # of the model's own distribution
                assert [pair[0] for pair in mine[1]] == [pair[0] for pair in theirs[1]]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_masked_rows_may_be_broken_refused_or_late(tp_size: int) -> None:
    logits = torch.randn(5, VOCAB)
    logits[1, 250] = float("nan")
    logits[2] = float("-inf")
    ways = [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=3)]
    for params in ways:
        masks = [allowing([5, 6], refused=True), allowing([7]), allowing([8]), allowing([299]), allowing([9])]
        masks[4][-1] = 2
        rows = [SamplingRow(params, 3, allowed=mask) for mask in masks]
        assert sample(logits, rows, tp_size)[0] == [REFUSED, NOT_FINITE, NOT_FINITE, 299, LATE]
