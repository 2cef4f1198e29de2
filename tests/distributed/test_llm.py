"""``LLM`` on a tiny model, with real workers: one start for each tensor-parallel size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_checkpoint
from tests.unit.fake_client import write_tokenizer
from tpctl import LLM, SamplingParams
from tpctl.errors import RequestError, SourceError, UsageError

pytestmark = pytest.mark.slow

PROMPTS = ["one prompt", "another, longer one", "a third"]
LENGTH = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    made = make_checkpoint("llama3", folder, vocab_size=300, eos_token_id=299, bos_token_id=298)
    return write_tokenizer(folder), made


@pytest.fixture(scope="module", params=[1, 2])
def llm(
    request: pytest.FixtureRequest, model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        settings = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 1 << 20, "block_size": 4}
        with LLM(model[0], request.param, **settings) as llm:
            assert (llm.info.tp_size, llm.info.device, llm.info.block_size) == (request.param, "cpu", 4)
            yield llm


def expected(model: Any, ids: list[int], length: int = LENGTH) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False)
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("prompts", "more", "said"),
    [
        (None, {}, "the prompts are null, but must be a text or a list"),
        ({"a": 1}, {}, "the prompts are "),
        ([b"hi"], {}, "prompt 1 is "),
        ("a", {"stop": ""}, 'stop is "", but must be a text that is not empty'),
        ("a", {"stop": [5]}, r"stop is \[5\]"),
        ("a", {"sampling": {"max_tokens": 3}}, "the sampling is .* but must be SamplingParams"),
    ],
)
def test_what_is_no_prompt_is_refused_and_ends_nothing(llm: LLM, prompts: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm.generate(prompts, **more)
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].finish_reason == "length"


def test_tokens_equal_those_of_transformers(llm: LLM, model: tuple[Path, Any]) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=LENGTH, logprobs=1))
    for answer, prompt in zip(answers, ids, strict=True):
        assert answer.token_ids == expected(model[1], prompt)
        assert (answer.finish_reason, answer.note, answer.prompt_tokens) == ("length", None, len(prompt))
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        for id, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert entry.top == [(id, pytest.approx(entry.logprob, abs=1e-5))]
    again = llm.generate(ids, [SamplingParams(max_tokens=n) for n in (2, 3, 4)])
    assert [answer.token_ids for answer in again] == [a.token_ids[:n] for a, n in zip(answers, (2, 3, 4), strict=True)]
    assert sum(answer.cached_tokens for answer in again) > 0
    assert llm.generate([]) == []
    (single,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=LENGTH))
    assert single.token_ids == answers[0].token_ids


def test_a_stop_text_ends_an_answer_and_the_context_another(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=LENGTH))
    stop = whole.text[3:5]
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=LENGTH), stop)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    (full,) = llm.generate([[5] * (llm.info.max_model_len - 2)], SamplingParams(max_tokens=9))
    assert (len(full.token_ids), full.finish_reason) == (2, "length")
    assert full.note is not None and "fill the context" in full.note


def test_equal_prompts_are_sampled_differently_and_the_same_again(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=LENGTH)
    first, second = ([a.token_ids for a in llm.generate([PROMPTS[0]] * 3, params)] for _ in range(2))
    assert first == second
    assert len({tuple(ids) for ids in first}) == 3


def test_prompts_log_probabilities_are_those_of_transformers(llm: LLM, model: tuple[Path, Any]) -> None:
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=2), prompt_logprobs=3)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        ids = llm.tokenizer.encode(prompt)
        with torch.no_grad():
            wanted = model[1](torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert answer.prompt_logprobs is not None and answer.prompt_logprobs[0] is None
        assert len(answer.prompt_logprobs) == len(ids)
        for place, one in enumerate(answer.prompt_logprobs[1:], start=1):
            assert one is not None and one.logprob == pytest.approx(float(wanted[place - 1, ids[place]]), abs=1e-4)
            assert [id for id, _ in one.top] == wanted[place - 1].topk(3).indices.tolist()
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].prompt_logprobs is None
    assert llm.generate([[5]], SamplingParams(max_tokens=3), prompt_logprobs=0)[0].prompt_logprobs == [None]


def test_forms_are_kept_to_and_what_is_none_ends_nothing(llm: LLM) -> None:
    forms = [SamplingParams(max_tokens=40, temperature=1.0, seed=n, regex="[ab]{3}-[0-9]{2}") for n in range(6)]
    answers = llm.generate(["x"] * 6, forms)
    assert all(re.fullmatch("[ab]{3}-[0-9]{2}", answer.text) for answer in answers)
    assert {answer.finish_reason for answer in answers} == {"stop"} and len({answer.text for answer in answers}) > 1
    with pytest.raises(RequestError, match="regex: at 1"):
        llm.generate("x", SamplingParams(regex="(["))
    with pytest.raises(RequestError, match="prompt 2 of 2: grammar: the grammar has no text that could follow"):
        llm.generate(["x", "y"], [SamplingParams(), SamplingParams(grammar="start: start")])
    assert llm.chat([{"role": "user", "content": "hi"}], SamplingParams(choice=("left", "right"))).text in (
        "left",
        "right",
    )
    stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks


def test_a_conversation(llm: LLM) -> None:
    message = {"role": "user", "content": "hi"}
    answer = llm.chat([message], SamplingParams(max_tokens=LENGTH))
    assert answer.text == llm.generate("[u]hi[a]", SamplingParams(max_tokens=LENGTH))[0].text
    with pytest.raises(RequestError, match="not that"):
        llm.chat([{"role": "user", "content": "forbidden"}])


def test_what_cannot_be_served_is_said_and_the_engine_goes_on(llm: LLM) -> None:
    most = llm.info.max_model_len - 1
    wrong: list[tuple[Any, str]] = [
        ([[1] * (most + 1)], f"the prompt has {most + 1} tokens, but this engine takes at most {most} "),
        (["fine", [7, 900]], "prompt 2 holds token 900, but the model knows ids 0 to 299; leave it out"),
        ([[2**70]], "prompt 1 holds token .*, but the model knows ids 0 to 299; leave it out"),
        ([5], "prompt 1 is 5, but must be a text or a list of token ids"),
        ([None], "prompt 1 is null"),
    ]
    for prompts, message in wrong:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts)
    with pytest.raises(RequestError, match="2 prompts, but sampling for 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].token_ids) == 3
    stats = llm.stats()  # the engine checks its books, as nothing is under way
    assert stats.free_blocks == stats.num_blocks


def test_threads_share_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=LENGTH)
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda n: llm.generate([PROMPTS[n % 3]] * 2, params), range(12)))
    for n, answers in enumerate(together):
        assert [answer.token_ids for answer in answers] == [alone[n % 3]] * 2


def test_wrong_settings_start_nothing(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tpp": 2}, "unknown setting 'tpp'; known: attention_backend, block_size"),
        ({"tp": 0}, "tp is 0, but must be a whole number, at least 1"),
        ({"max_num_seqs": "8"}, 'max_num_seqs is "8", but must be a whole number'),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization is 2, but must be a number from 0.01 to 1"),
        ({"device": "tpu"}, "unknown device 'tpu'; use cpu, cuda"),
        ({"device": "cpu", "dtype": "int8"}, "unknown dtype 'int8'; use auto, float32"),
        ({"device": "cpu", "attention_backend": "triton"}, "triton needs a GPU"),
    ]
    for settings, message in wrong:
        with pytest.raises(UsageError, match=message):
            LLM(str(tmp_path / "none"), **settings)
    with pytest.raises(SourceError):
        LLM(str(tmp_path / "none"), device="cpu")
