"""What ``tpctl bench serve`` makes of times, bytes and options; of a clock that the test moves."""

from __future__ import annotations

import io
import json
import math
import random
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.openai_server import delta, event, text, usage
from tpctl.bench.answers import Answer, AnswerReader
from tpctl.bench.endpoint import Address, Endpoint
from tpctl.bench.http import Events, Response
from tpctl.bench.latencies import Summary, percentile, rows, summarise
from tpctl.bench.load import Load, arrivals
from tpctl.bench.prompts import WORDS, Shape, file_prompts, named_prompts, random_prompts
from tpctl.bench.serving import Measured
from tpctl.cli.bench_serve_report import print_runs
from tpctl.cli.plot import columns
from tpctl.errors import EndpointError, SourceError, UsageError


def answered(started: float, times: list[float], tokens: int | None = None, prompt: int = 10) -> Answer:
    found = Answer(started)
    found.started, found.times, found.output_tokens, found.prompt_tokens = started, times, tokens, prompt
    return found


def refused(error: str) -> Answer:
    found = Answer()
    found.error = error
    return found


def summary_of(*answers: Answer, duration: float = 10.0, started: float = 0.0, **limits: float) -> Summary:
    return summarise(Load(answers, started, duration, 0.5), 2.0, limits)


def test_times_are_those_of_vllms_benchmark() -> None:
    """TTFT 1 s and 2 s; the first answer has 4 tokens in 3 chunks, the second 2 in 2."""
    run = summary_of(answered(0.0, [1.0, 1.5, 2.5], 4), answered(1.0, [3.0, 3.2], 2), refused("x"), refused("x"))
    assert (run.completed, run.failed, run.errors) == (2, 2, {"x": 2})
    assert run.ttft is not None and run.tpot is not None and run.itl is not None and run.e2e is not None
    assert (run.ttft.p50, run.ttft.max) == (1500.0, 2000.0)
    assert (run.tpot.mean, run.tpot.max) == (pytest.approx(350.0), pytest.approx(500.0))  # 1.5 s / 3, 0.2 s / 1
    assert (run.itl.mean, run.itl.max) == (pytest.approx(1e3 * 1.7 / 3), pytest.approx(1000.0))
    assert (run.e2e.mean, run.e2e.max) == (pytest.approx(2350.0), pytest.approx(2500.0))
    assert (run.output_tokens, run.prompt_tokens, run.chunks, run.uncounted) == (6, 20, 5, 0)
    assert (run.requests_per_second, run.output_per_second, run.tokens_per_second) == (0.2, 0.6, 2.6)
    assert run.goodput is None and run.peak == 2


def test_percentiles_are_numpys() -> None:
    rng = random.Random(3)
    for size in (1, 2, 3, 50, 101):
        values = sorted(rng.random() for _ in range(size))
        for share in (0, 50, 90, 99, 100):
            assert percentile(values, share) == pytest.approx(float(np.percentile(values, share)))


def test_goodput_counts_answers_within_all_limits() -> None:
    """An answer of one token has no time a token."""
    answers = [answered(0.0, [0.4, 0.5], 2), answered(0.0, [0.6, 0.7], 2), answered(0.0, [0.4, 1.4], 2)]
    answers.append(answered(0.0, [0.5], 1))
    assert summary_of(*answers, ttft=500.0).good == 3
    assert summary_of(*answers, ttft=500.0, tpot=200.0).good == 2
    assert summary_of(*answers, e2e=700.0).goodput == 0.3
    assert summary_of(refused("x"), ttft=1.0).goodput == 0.0


def test_requests_at_once_and_slices_of_time() -> None:
    one, two = answered(100.0, [130.0], 6), answered(130.0, [140.0, 160.0], 4)
    run = summary_of(one, two, started=100.0, duration=60.0)
    assert run.peak == 1  # the second begins as the first ends
    tokens, held = zip(*run.slices, strict=True)
    assert (len(tokens), tokens[30], tokens[40], tokens[59], sum(tokens)) == (60, 6.0, 2.0, 2.0, 10.0)
    assert held == (1.0,) * 60
    assert summary_of(one, answered(129.0, [131.0], 1), started=100.0).peak == 2


def test_without_usage_chunks_are_tokens_and_that_is_told() -> None:
    run = summary_of(answered(0.0, [1.0, 2.0, 3.0]), answered(0.0, [1.0], 7))
    assert (run.output_tokens, run.uncounted) == (10, 1)
    assert json.loads(json.dumps(replace(run, rate=math.inf).to_dict()))["rate"] == "inf"


def test_rows_have_each_requests_own_figures() -> None:
    first, second = rows(Load([answered(5.0, [6.0, 8.0], 3), refused("x")], 4.0, 10.0, 0.1))
    assert first == {
        "due": 1.0,
        "started": 1.0,
        "prompt_tokens": 10,
        "output_tokens": 3,
        "ttft": 1.0,
        "tpot": 1.0,
        "e2e": 3.0,
        "chunks": 2,
    }
    assert second["error"] == "x"


def test_arrivals_are_a_poisson_process_and_repeatable() -> None:
    due = arrivals(4000, 8.0, seed=1)
    gaps = np.diff([0.0, *due])
    assert due[-1] == pytest.approx(500.0) and min(gaps) > 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as an exponential distribution's
    assert np.diff(arrivals(4000, 8.0, 4.0)).std() == pytest.approx(0.125 / 2, rel=0.1)
    assert due == arrivals(4000, 8.0, seed=1) != arrivals(4000, 8.0, seed=2)
    assert np.diff(arrivals(10, 2.0, math.inf)).tolist() == pytest.approx([0.5] * 9)
    assert arrivals(3, math.inf) == [0.0] * 3


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_pieces(raw: bytes, size: int) -> tuple[Response, bytes]:
    response, body = Response(), b""
    for at in range(0, len(raw), size):
        body += response.feed(raw[at : at + size])
    return response, body


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_may_be_cut_anywhere(size: int) -> None:
    raw = WHOLE + b"5;x=y\r\nab\r\nc\r\n10\r\n0123456789abcdef\r\n0\r\nTrailer: x\r\n\r\n"
    response, body = in_pieces(raw, size)
    assert (body, response.status, response.ended, response.keep) == (b"ab\r\nc0123456789abcdef", 200, True, True)
    response, body = in_pieces(b"HTTP/1.1 100 x\r\n\r\nHTTP/1.1 404 y\r\ncontent-length: 3\r\n\r\nabc", size)
    assert (response.status, body, response.ended) == (404, b"abc", True)
    response, body = in_pieces(b"HTTP/1.0 200 y\r\n\r\nabc", size)
    assert not response.ended and body == b"abc"
    response.close()
    assert response.ended and not response.keep


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"SSH-2.0-x\r\n", "no HTTP/1.1 response"),
        (b"HTTP/1.1 abc\r\n\r\n", "no HTTP/1.1 response"),
        (b"HTTP/2 200\r\n\r\n", "no HTTP/1.1 response"),
        (WHOLE + b"x\r\n", "a chunk without a length"),
        (WHOLE + b"-1\r\n", "a chunk without a length"),
        (WHOLE + b"1\r\nab\r\n", "longer than it says"),
        (WHOLE + b"1" * 70000, "has no end"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabc", "more than its content-length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n", "no number"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", "'gzip', which nobody asked for"),
    ],
)
def test_what_is_no_response(raw: bytes, said: str) -> None:
    with pytest.raises(EndpointError, match=said):
        Response().feed(raw)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_may_be_cut_anywhere(size: int) -> None:
    raw = b'data: {"a": 1}\n\n: still there\n\ndata: one\ndata:two\r\n\r\nid: 3\rdata: \xc3\xa4\r\rdata: rest'
    events = Events()
    found = [data for at in range(0, len(raw), size) for data in events.feed(raw[at : at + size])]
    assert found == [b'{"a": 1}', b"one\ntwo", "ä".encode()]


def read(*chunks: Any, status: int = 200, kind: str = "text/event-stream") -> Answer:
    """An answer whose chunks come a second apart."""
    answer = Answer()
    reader = AnswerReader(answer)
    reader.response.status, reader.response.headers = status, {"content-type": kind}
    for at, chunk in enumerate(chunks):
        reader.take(float(at), chunk if isinstance(chunk, bytes) else event(chunk))
    reader.end()
    return answer


def test_chunks_with_tokens_count() -> None:
    """What opens or closes an answer does not, nor its usage; a token without text of its own does."""
    spoken = read(
        delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"), usage(5, 2)
    )
    assert (spoken.times, spoken.prompt_tokens, spoken.tokens) == ([1.0, 2.0], 5, 2)
    assert read(delta(reasoning_content="a"), delta(content=""), delta("stop", content="b")).times == [0.0, 1.0, 2.0]
    assert read(delta(tool_calls=[{"index": 0}]), delta("tool_calls")).times == [0.0]
    assert read(text("a"), text(""), text("b", "length"), event(b"[DONE]")).times == [0.0, 1.0, 2.0]
    assert read(text("", "stop"), usage(5, 1)).times == [0.0]
    assert read(text("a"), text("", "stop")).tokens == 1
    assert read({**text("a", "stop"), "usage": None}).output_tokens is None


@pytest.mark.parametrize(
    ("chunks", "kind", "said"),
    [
        ([], "text/event-stream", "answered with a stream without a token"),
        ([usage(1, 0), b"data: [DONE]\n\n"], "text/event-stream", "a stream without a token"),
        ([b'{"choices": []}'], "application/json", "answered with application/json, not a stream"),
        ([text("a")], "text/event-stream", "ended the stream before the answer"),
        ([text("a"), b"data: {\n\n"], "text/event-stream", "no chunk of an answer: {"),
        ([b"data: 5\n\n"], "text/event-stream", "no chunk of an answer: 5"),
        ([text("a"), {"error": {"message": "out of\nmemory"}}], "text/event-stream", "with an error: out of memory"),
        ([text("a"), {"object": "error", "message": "full"}], "text/event-stream", "with an error: full"),
    ],
)
def test_what_is_no_answer(chunks: list[Any], kind: str, said: str) -> None:
    with pytest.raises(EndpointError, match=said):
        read(*chunks, kind=kind)


def test_prompts_have_the_lengths_asked_for() -> None:
    made = random_prompts(50, Shape(100, 20, 0.5, prefix=30, prefixes=3), 1)
    lengths = [len(one["prompt"].split()) - 30 for one in made]
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(set(lengths)) > 20
    assert {10 <= one["max_tokens"] <= 30 for one in made} == {True}
    assert len({tuple(one["prompt"].split()[:30]) for one in made}) == 3
    assert made == random_prompts(50, Shape(100, 20, 0.5, prefix=30, prefixes=3), 1)
    ids = random_prompts(2, Shape(16, 4, ids=True), 1)
    assert [len(one["prompt"]) for one in ids] == [16, 16] and ids[0]["prompt"] != ids[1]["prompt"]
    assert len(set(WORDS)) == len(WORDS) == 250
    nano = named_prompts("nano", None, 0, ids=True)
    assert (len(nano), sum(one["max_tokens"] for one in nano), nano[0]["temperature"]) == (256, 133966, 0.6)
    alike = [one["prompt"].split() for one in named_prompts("prefix", 3, 0, ids=False)]
    assert alike[0][:2000] == alike[1][:2000] and len({tuple(words) for words in alike}) == 3
    words = named_prompts("nano", 3, 0, ids=False)
    assert [len(one["prompt"].split()) for one in words] == [len(one["prompt"]) for one in nano[:3]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 is \\[\\], but must be an object"),
        ('{"text": "x"}', "must be an object with prompt or messages"),
        ('{"prompt": "x", "messages": []}', "must be an object with prompt or messages"),
        ('{"prompt": "x", "prompt": "y"}', "occurs twice"),
        ('{"messages": []}', "line 2: --endpoint completions takes no messages"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "lines").write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(SourceError, match=said):
        file_prompts(tmp_path / "lines", None, chat=False)
    assert file_prompts(tmp_path / "lines", 1, chat=False) == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://api.h/x/v1", "https://api.h:443/x"),
        ("http://[::1]:3", "http://[::1]:3"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    assert str(Address.of(url)) == shown
    assert Endpoint(Address.of(url)).get("/v1/models").count(b"\r\n") == 4


@pytest.mark.parametrize(
    "url", ["h:1", "ftp://h", "http://", "http://u:p@h", "http://h:x", "http://h/\r\nx: y", "http://h/?a"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is no address such as"):
        Address.of(url)


def test_what_is_not_as_it_should_be_is_told() -> None:
    late = answered(2.0, [3.0], 2)
    late.due = 1.0
    run = replace(summary_of(late, refused("status 429: full")), processor=9.0)
    with redirect_stdout(io.StringIO()) as out:
        print_runs([Measured("demo", run, [])], "http://x")
    said = out.getvalue().splitlines()
    assert said[2:6] == [
        "  failed 1 time: status 429: full",
        "  2.00 tokens came in a chunk: ITL is the time between chunks",
        "  requests were sent up to 1.00 s after they were due: so few may be under way, or it is busy here",
        "  this client computed for 90% of the time: it may be what limits the figures",
    ]


def test_columns() -> None:
    assert columns("x", [0.0, 5.0, 10.0], ["a", "b", "c"], width=6) == [
        "x",
        "10 │    ██",
        "   │    ██",
        "   │    ██",
        "   │  ████",
        "   │  ████",
        "   │  ████",
        " 0 └──────",
        "    a b c",
    ]
    assert columns("x", [0.0], ["", "1"])[1] == "1 │"
    assert [line[:3] for line in columns("x", [1234.0], ["a"])][1] == "150"
