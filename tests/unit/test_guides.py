"""Answers that follow grammars, from an engine of real layers: whatever else happens to their requests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from tests.ranks import run_ranks
from tests.schemas_parts import SHORT, SMALL, Schema, closed, listed
from tests.tiny import make_checkpoint
from tests.unit.fake_client import write_tokenizer
from tpctl.client.tokenizer import Tokenizer
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.guides import Guides
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.guide import of_schema
from tpctl.wire.messages import Add, Output, Request
from tpctl.wire.report import EngineStats
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

END = 256  # of the tokenizer that ``write_tokenizer`` makes: each other token is a byte
RANKS = [1, 2, 3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A model that answers at random, by rank count."""
    folder = tmp_path_factory.mktemp("guides")
    make_checkpoint("llama3", folder / "model", vocab_size=300, eos_token_id=END, bos_token_id=298)
    write_tokenizer(folder / "model")
    for ranks in RANKS:
        shard_checkpoint(folder / "model", folder / f"tp{ranks}", ranks)
    return {ranks: folder / f"tp{ranks}" for ranks in RANKS}


@pytest.fixture(scope="module")
def tokenizer(shards: dict[int, Path]) -> Tokenizer:
    return Tokenizer(shards[1])


def serve(
    shards: dict[int, Path], ranks: int, requests: Sequence[Request], **settings: Any
) -> tuple[dict[str, list[Output]], EngineStats]:
    """What becomes of requests, some of which rank 0 has made matchers for."""
    values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, **settings}

    def rank(group: TPGroup) -> tuple[dict[str, list[Output]], EngineStats]:
        guides = Guides(Grammars(shards[ranks])) if group.rank == 0 else None
        outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
        with torch.inference_mode():
            engine = Engine(EngineConfig(shards[ranks], ranks, **values), group, guides)
            for request in requests:
                if guides is not None and request.sampling.guide:
                    guides.open(request, guides.grammars.matcher(request.sampling.guide))
            found = engine.apply(Add(list(requests)))
            while engine.has_work:
                found += engine.step()
            assert guides is None or not guides._walks
            for output in found:
                outputs[output.id].append(output)
            return outputs, engine.stats()

    results = run_ranks(ranks, rank)
    plain = [{id: [output.token_ids for output in all] for id, all in outputs.items()} for outputs, _ in results]
    assert all(tokens == plain[0] for tokens in plain)
    return results[0]


def text_of(tokenizer: Tokenizer, outputs: list[Output]) -> str:
    return tokenizer.decode([id for output in outputs for id in output.token_ids])


def prompt_of(number: int) -> list[int]:
    return [(7 * at + number // 3) % 200 + 20 for at in range(9 + number % 4)]


SCHEMAS: list[Schema] = [
    closed({"name": SHORT, "age": SMALL}),
    closed({"flags": listed({"type": "boolean"}, 1, 3)}),
    {"enum": ["red", "naïve", 'quo"ted', 17, None]},
    closed({"day": {"type": "string", "format": "date"}, "ö": {"type": "null"}}, ["day"]),
]
REGEXES = [r"\d{3}-[a-f]{2,4}", "(ab|c)+d", "[äöü]{2}x?", r"[^a-z]{5}"]
CHOICES = [("yes", "no"), ("a", "ab", "abc"), ("ein Wort", "zwei\nZeilen", "日本")]
GRAMMARS = ['start: NUMBER ("," NUMBER)~2\nNUMBER: /[0-9]{1,3}/', 'start: "(" start ")" | /[xyz]/']
FORMS: list[dict[str, Any]] = [
    *({"response_format": of_schema(schema)} for schema in SCHEMAS),
    *({"regex": regex} for regex in REGEXES),
    *({"choice": choice} for choice in CHOICES),
    *({"grammar": grammar} for grammar in GRAMMARS),
]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.2, "min_tokens": 3},
]


def follows(form: dict[str, Any], text: str) -> bool:
    if "response_format" in form:
        schema = form["response_format"]["json_schema"]["schema"]
        return Draft202012Validator(schema).is_valid(json.loads(text))
    if "choice" in form:
        return text in form["choice"]
    pattern = form.get("regex") or {GRAMMARS[0]: r"\d{1,3}(,\d{1,3}){2}", GRAMMARS[1]: r"\(*[xyz]\)*"}[form["grammar"]]
    balanced = "regex" in form or text.count("(") == text.count(")")
    return re.fullmatch(pattern, text) is not None and balanced


def everything(most: int = 80) -> list[Request]:
    """Each form in each way, and requests of no form beside them."""
    pairs = [(form, way) for form in FORMS for way in WAYS]
    found = [
        Request(str(number), prompt_of(number), SamplingParams(max_tokens=most, seed=number, **form, **way))
        for number, (form, way) in enumerate(pairs)
    ]
    plain = [Request(f"plain {number}", prompt_of(number), SamplingParams(max_tokens=12)) for number in range(5)]
    return [*plain[:2], *found, *plain[2:]]


@pytest.fixture(scope="module")
def plain(shards: dict[int, Path]) -> list[list[int]]:
    """What the requests without a form are answered where nothing is beside them."""
    requests = [Request(str(at), prompt_of(at), SamplingParams(max_tokens=12)) for at in range(5)]
    outputs, _ = serve(shards, 1, requests)
    return [[id for output in outputs[str(at)] for id in output.token_ids] for at in range(5)]


@pytest.mark.parametrize(("ranks", "crowded"), [(1, True), (2, False), (3, True)])
def test_answers_have_the_form_asked_for(
    shards: dict[int, Path], tokenizer: Tokenizer, plain: list[list[int]], ranks: int, crowded: bool
) -> None:
    """Also in chunks, from the prefix cache, and of sequences that had to give up their blocks."""
    requests = everything()
    settings = {"kv_cache_memory": 1 << 17, "max_num_batched_tokens": 10, "max_num_seqs": 8} if crowded else {}
    outputs, stats = serve(shards, ranks, requests, **settings)
    assert stats.free_blocks == stats.num_blocks and stats.prefix_cache_hit_tokens > 0
    assert (stats.preemptions > 0) == crowded
    ended = 0
    for request in requests:
        reason = outputs[request.id][-1].finish_reason
        assert reason in ("stop", "length")
        form = {name: getattr(request.sampling, name) for name in ("response_format", "regex", "choice", "grammar")}
        form = {name: value for name, value in form.items() if value is not None}
        if form and reason == "stop":
            text = text_of(tokenizer, outputs[request.id])
            assert follows(form, text), (form, text)
            ended += 1
    assert ended > len(requests) // 2
    for number in range(5):  # what has no form is not touched by those beside it
        assert plain[number] == [id for output in outputs[f"plain {number}"] for id in output.token_ids]


def test_ranks_choose_the_same(shards: dict[int, Path]) -> None:
    found = []
    for ranks in RANKS:
        outputs, _ = serve(shards, ranks, everything(30))
        found.append({id: [token for output in all for token in output.token_ids] for id, all in outputs.items()})
    assert found[0] == found[1] == found[2]


def test_log_probabilities_are_of_the_model_and_not_of_the_mask(shards: dict[int, Path]) -> None:
    free = SamplingParams(max_tokens=1, logprobs=20)
    bound = SamplingParams(max_tokens=1, logprobs=20, choice=("yes", "no"))
    outputs, _ = serve(shards, 2, [Request("free", prompt_of(1), free), Request("bound", prompt_of(1), bound)])
    (one,), (other,) = (outputs[id][0].logprobs for id in ("free", "bound"))
    assert [id for id, _ in one.top] == [id for id, _ in other.top]
    assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)
    assert other.logprob < one.logprob and outputs["bound"][0].token_ids != outputs["free"][0].token_ids


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_go_on_ends_alone(shards: dict[int, Path], tokenizer: Tokenizer, ranks: int) -> None:
    endless = ['start: "a" start', "start: start", 'start: "a" stop\nstop: "b" stop']
    asked = [SamplingParams(max_tokens=40, grammar=grammar) for grammar in endless]
    good = SamplingParams(max_tokens=40, regex="ab{3}c")
    params = [good, *asked, good, SamplingParams(max_tokens=5)]
    requests = [Request(str(number), prompt_of(number), one) for number, one in enumerate(params)]
    outputs, stats = serve(shards, ranks, requests)
    for number in range(1, 1 + len(endless)):
        last = outputs[str(number)][-1]
        assert last.finish_reason == "error" and last.message is not None and last.message.startswith("grammar: the g")
    for number in (0, len(endless) + 1):
        assert outputs[str(number)][-1].finish_reason == "stop"
        assert text_of(tokenizer, outputs[str(number)]) == "abbbc"
    assert outputs[str(len(params) - 1)][-1].finish_reason == "length"
    assert stats.free_blocks == stats.num_blocks


def test_an_answer_ends_where_its_form_does_and_not_before(shards: dict[int, Path], tokenizer: Tokenizer) -> None:
    """Whatever the model prefers; a stop token that is text ends it where it comes, as a stop text does."""
    byte = {char: tokenizer.encode(char)[0] for char in "ab;"}
    params = [
        SamplingParams(max_tokens=30, regex="a{20}"),
        SamplingParams(max_tokens=30, regex="a{2,20}", min_tokens=12, temperature=1.0),
        SamplingParams(max_tokens=30, regex="a{4}", min_tokens=12),
        SamplingParams(max_tokens=30, regex="a{2}b{9}", stop_token_ids=(byte["b"],)),
        SamplingParams(max_tokens=30, regex="a{3,}", stop_token_ids=(byte[";"],), temperature=1.0),
        SamplingParams(max_tokens=7, regex="a{20}"),
        SamplingParams(max_tokens=60, regex="a{3}", guide_after=byte[";"], temperature=1.0, top_k=200),
    ]
    outputs, _ = serve(shards, 1, [Request(str(at), prompt_of(at), one) for at, one in enumerate(params)])
    tokens = [[id for output in outputs[str(at)] for id in output.token_ids] for at in range(len(params))]
    assert tokens[0] == [byte["a"]] * 20 + [END]
    assert tokens[1][:12] == [byte["a"]] * 12
    assert tokens[2] == [byte["a"]] * 4 + [END]  # there is no more
    assert tokens[3] == [byte["a"]] * 2 + [byte["b"]] and outputs["3"][-1].finish_reason == "stop"
    assert set(tokens[4][:3]) == {byte["a"]} and byte[";"] not in tokens[4][:3]
    assert tokens[5] == [byte["a"]] * 7 and outputs["5"][-1].finish_reason == "length"
    if byte[";"] in tokens[6]:
        behind = tokens[6][tokens[6].index(byte[";"]) + 1 :]
        assert behind == ([byte["a"]] * 3 + [END])[: len(behind)]
    assert END not in tokens[6][:-1]
