"""The rows of Ray Data's batches, without a cluster and with an engine that has no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_client import FakeClient, engine_info, write_tokenizer
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, RequestError, UsageError

pytest.importorskip("ray", reason="needs Ray (pip install 'tpctl[ray]')")

from tpctl.ray import generator as module
from tpctl.ray.tables import plain


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array(["a", None], dtype=object), ["a", None]),
        (np.int64(3), 3),
        (float("nan"), None),
        ({"role": "user", "name": None, "content": np.array([1.5])}, {"role": "user", "content": [1.5]}),
        (("a", {"b": np.float32(2)}), ["a", {"b": 2.0}]),
    ],
)
def test_values_of_tables_as_json_knows_them(value: Any, said: Any) -> None:
    assert plain(value) == said


class FakeLLM:
    """An engine that answers p with <p>, and dies over what holds ``deadly``."""

    deadly = ""
    starts = 0
    tokenizer: Tokenizer

    def __init__(self, model: str, tp: int | None, **settings: Any) -> None:
        type(self).starts += 1
        self.info = engine_info()
        self.client = Deadly(self.tokenizer, self.deadly)

    def close(self) -> None:
        pass


class Deadly(FakeClient):
    def __init__(self, tokenizer: Tokenizer, deadly: str) -> None:
        super().__init__(tokenizer)
        self._deadly = deadly

    def submit(self, requests: Any) -> None:
        requests = list(requests)
        if self._deadly and any(self._deadly in self._tokenizer.decode(request.token_ids) for request in requests):
            self.dies_after = 0
        super().submit(requests)


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    FakeLLM.tokenizer, FakeLLM.deadly, FakeLLM.starts = Tokenizer(write_tokenizer(tmp_path)), "", 0
    monkeypatch.setattr(module, "LLM", FakeLLM)
    return module.Generator


def texts(*values: Any) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_a_batch_comes_back_with_answers_and_what_it_had(generator: Callable[..., Any]) -> None:
    answer = generator(sampling={"max_tokens": 30}, stop="z")
    batch = {"id": np.arange(5), "prompt": texts("hi", None, "refuse", "", b"x")}
    found = answer(batch)
    assert list(found["id"]) == [0, 1, 2, 3, 4] and list(found["prompt"]) == list(batch["prompt"])
    assert list(found["text"]) == ["<hi>", None, None, None, None]
    assert list(found["finish_reason"]) == ["stop", "error", "error", "error", "error"]
    assert list(found["prompt_tokens"]) == [2, 0, 0, 0, 0] and list(found["completion_tokens"]) == [5, 0, 0, 0, 0]
    said = ["the row has neither", "the engine refuses", "the prompt is empty", "cannot be used: Object of type bytes"]
    assert found["error"][0] is None and all(
        part in error and not error.startswith("line") for part, error in zip(said, found["error"][1:], strict=True)
    )
    assert "reasoning" not in found and FakeLLM.starts == 1


def test_conversations_columns_of_their_own_and_a_prefix(generator: Callable[..., Any]) -> None:
    answer = generator(prompt_column="text", prefix="said_", sampling_columns=("max_tokens",))
    chat = [{"role": "user", "content": "q", "name": None}]
    found = answer({"text": texts(chat, "p", 5), "max_tokens": texts(2, None, None)})
    assert list(found["said_text"]) == ["<[", "<p>", None]
    assert list(found["said_finish_reason"]) == ["length", "stop", "error"]
    assert found["said_error"][2] == "prompt is 5, but must be a string, or a list of token ids"


def test_seeds_are_of_what_is_asked_and_not_of_the_batch(generator: Callable[..., Any]) -> None:
    answer = generator(sampling={"temperature": 1.0, "seed": 7}, sampling_columns=("seed",))
    llm = answer._engine()

    def seeds(*prompts: str, seed: Any = None) -> list[int]:
        llm.client.requests.clear()
        answer({"prompt": texts(*prompts), "seed": texts(*[seed] * len(prompts))})
        return [request.sampling.seed for request in llm.client.requests]

    a, b, again = seeds("a", "b", "a")
    assert len({a, b, again}) == 3 and seeds("b", "a") == [b, a]
    assert seeds("a", "b", seed=3) == [3, 3]


def test_an_engine_that_dies_is_started_again_and_the_row_that_does_it_is_found(generator: Callable[..., Any]) -> None:
    FakeLLM.deadly = "poison"
    answer = generator()
    found = answer({"prompt": texts("a", "poison", "b", "c")})
    assert list(found["text"]) == ["<a>", None, "<b>", "<c>"]
    assert found["error"][1].startswith("2 engines died over this row while it was alone: rank 1 was killed")
    assert FakeLLM.starts == 4
    FakeLLM.deadly = "i"
    answer = generator()
    with pytest.raises(EngineError, match="rank 1 was killed"):
        answer({"prompt": texts("i1", "i2", "i3", "i4")})
    FakeLLM.deadly = ""
    assert list(answer({"prompt": texts("i1")})["text"]) == ["<i1>"]  # Ray tries again in the same actor


def test_wrong_settings_and_columns_are_refused(generator: Callable[..., Any]) -> None:
    for how, said in (
        ({"sampling": {"temperature": -1}}, "temperature is -1.0"),
        ({"sampling": {"heat": 1}}, "unknown sampling field 'heat'"),
        ({"sampling": {"logprobs": 1}}, "sampling has logprobs"),
        ({"sampling_columns": ["id"]}, "sampling_columns has 'id'"),
    ):
        with pytest.raises((UsageError, RequestError), match=said):
            generator(**how)
    answer = generator(sampling_columns=["seed"])
    for batch, said in (
        ({"question": texts("a")}, "no column prompt or messages, but question; set prompt_column"),
        ({"prompt": texts("a")}, "no column seed, which sampling_columns names"),
        ({"prompt": texts("a"), "seed": texts(1), "text": texts("a")}, "has a column text already"),
        (5, "a batch is a int"),
    ):
        with pytest.raises(UsageError, match=said):
            answer(batch)


def test_pandas_and_arrow_come_back_as_they_came(generator: Callable[..., Any]) -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    answer = generator()
    table = pyarrow.table({"prompt": ["a", None], "k": [1, 2]})
    found = answer(table)
    assert found.column_names[:3] == ["prompt", "k", "text"]
    assert found["text"].to_pylist() == ["<a>", None] and str(found.schema.field("note").type) == "string"
    frame = answer(pandas.DataFrame({"prompt": ["a", None], "k": [1, 2]}, index=[7, 9]))
    assert list(frame.index) == [7, 9] and list(frame["text"]) == ["<a>", None] and list(frame["k"]) == [1, 2]
