"""``tpctl bench serve`` against a server that answers as it is told to."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.openai_server import OpenAIServer, Reply, completed, event, failed, openai_server, text
from tpctl.bench.answers import Answer
from tpctl.bench.endpoint import Address, Endpoint
from tpctl.bench.load import send
from tpctl.cli.app import app
from tpctl.errors import EndpointError, OutputError, UsageError


def bench(server: OpenAIServer, *options: str) -> tuple[dict[str, Any], Any]:
    """What ``--json`` says, if it ended well, and how it ended."""
    result = CliRunner().invoke(app, ["bench", "serve", "--url", server.url, "--json", *options])
    return (json.loads(result.stdout) if result.exit_code == 0 else {}), result


SMALL = ("--num-prompts", "6", "--prompt-tokens", "12", "--output-tokens", "5")


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_measurement(kind: str) -> None:
    with openai_server(api_key="k") as server:
        found, result = bench(server, *SMALL, "--endpoint", kind, "--api-key", "k", "--rate", "200,inf")
    assert result.exit_code == 0, result
    said = r"warmed up: 1 request in \d\.\d\d s, prompts of 12 tokens and answers of 5, which no figure counts\n"
    assert re.fullmatch(said, result.stderr)
    assert (found["benchmark"], found["model"]) == ("serve", "demo")
    assert [run["rate"] for run in found["runs"]] == [200.0, "inf"]
    for run in found["runs"]:
        counts = {name: run[name] for name in ("completed", "failed", "output_tokens", "chunks", "prompt_tokens")}
        assert counts == {"completed": 6, "failed": 0, "output_tokens": 30, "chunks": 30, "prompt_tokens": 72}
        assert run["ttft"]["p50"] <= run["e2e"]["p50"] and run["duration"] > 0
    path = "/v1/completions" if kind == "completions" else "/v1/chat/completions"
    assert {where for where, _ in server.seen} == {path} and len(server.seen) == 1 + 12  # a warm-up
    bodies = [body for _, body in server.seen]
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in bodies)
    assert {(body["temperature"], body["ignore_eos"], body["model"]) for body in bodies} == {(0.0, True, "demo")}
    prompts = {str(body.get("prompt", body.get("messages"))) for body in bodies}
    assert len(prompts) == 13  # so that no run finds another's in a prefix cache


def test_connections_are_kept_and_limited() -> None:
    with openai_server() as server:
        _, result = bench(server, *SMALL, "--max-concurrency", "2")
        assert result.exit_code == 0 and server.most_open <= 2 and server.connections <= 2
        asked = [body["prompt"] for _, body in server.seen]
        bench(server, *SMALL)
        assert sorted(asked) == sorted(body["prompt"] for _, body in server.seen[len(asked) :])


def test_a_kept_connection_that_was_closed_is_made_anew() -> None:
    """Each answer is the last one of its connection, which does not say so beforehand."""

    def once(body: dict[str, Any]) -> Reply:
        data = b"".join(completed(body).pieces)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data)
        return Reply(raw=head + data)

    with openai_server(answer=once) as server:
        found, result = bench(server, *SMALL, "--max-concurrency", "1")
    assert result.exit_code == 0 and found["runs"][0]["failed"] == 0 and server.connections >= 7


def test_failures_are_counted_by_their_names() -> None:
    numbers = iter(range(100))

    def some(body: dict[str, Any]) -> Reply:
        return {
            2: failed(429, "the queue is full"),
            3: failed(429, "the queue is full"),
            4: Reply([event(text("a"))], cut=True),
            5: Reply([event(text("a")), event({"error": {"message": "the engine failed"}})]),
            6: Reply([event(text("a"))], stall=True),
        }.get(next(numbers), completed(body))

    with openai_server(answer=some) as server:
        found, _ = bench(server, *SMALL, "--num-prompts", "8", "--timeout", "1", "--max-concurrency", "1")
        shown = CliRunner().invoke(app, ["bench", "serve", "--url", server.url, *SMALL])
    run = found["runs"][0]
    assert (run["completed"], run["failed"]) == (3, 5)
    assert run["errors"] == {
        "status 429: the queue is full": 2,
        "closed the connection before its answer ended": 1,
        "ended the stream with an error: the engine failed": 1,
        "no whole answer within 1 s": 1,
    }
    assert "6 answers in" in shown.stdout and "0 failed" in shown.stdout


def test_when_all_fail_there_is_no_figure() -> None:
    numbers = iter(range(100))
    first_only = lambda body: failed(500, "out of memory") if next(numbers) else completed(body)  # noqa: E731
    with openai_server(answer=first_only) as server:
        _, result = bench(server, *SMALL)
    assert isinstance(result.exception, EndpointError)
    assert str(result.exception).endswith("all 6 requests failed; the first: status 500: out of memory")


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        (
            {"api_key": "k"},
            ("--api-key", "x"),
            "/v1/models: status 401: the API key is wrong (--api-key, or TPCTL_API_KEY)",
        ),
        ({}, ("--model", "other"), "has no model other; it has demo"),
        ({"models": ()}, (), "has no model; it has none"),
        ({"models": None}, (), "/v1/models: status 404: not here"),
        (
            {"answer": lambda body: failed(400, "unknown field 'ignore_eos'")},
            (),
            "status 400: unknown field 'ignore_eos'",
        ),
        ({"answer": lambda body: Reply([b"{}"], kind="application/json")}, (), "application/json, not a stream"),
        ({"answer": lambda body: Reply(raw=b"")}, (), "closed the connection without an answer"),
        ({"answer": lambda body: Reply(raw=b"hello\r\n")}, (), "sent what is no HTTP/1.1 response"),
        ({"answer": lambda body: Reply(status=307, headers="Location: http://x/\r\n")}, (), "307: it is at http://x/"),
    ],
)
def test_a_server_that_refuses(settings: dict[str, Any], options: tuple[str, ...], said: str) -> None:
    with openai_server(**settings) as server:
        _, result = bench(server, *SMALL, *options)
    assert isinstance(result.exception, EndpointError) and result.exception.exit_code == 1
    assert str(result.exception).startswith(server.url) and said in str(result.exception), result.exception


def test_a_server_without_a_list_has_the_model_that_is_named() -> None:
    with openai_server(models=None) as server:
        found, _ = bench(server, *SMALL, "--model", "it")
    assert found["model"] == "it" and server.seen[0][1]["model"] == "it"


def test_no_server() -> None:
    with openai_server() as server:
        pass
    _, result = bench(server)
    assert isinstance(result.exception, EndpointError)
    assert str(result.exception) == f"cannot connect to {server.url}: Connection refused; is a server there (--url)?"


def test_a_files_prompts_and_fields_of_every_body(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a b", "max_tokens": 3, "id": 1},
        {"messages": [{"role": "user", "content": "c"}], "top_p": 0.5},
    ]
    (tmp_path / "lines").write_text("\n\n".join(map(json.dumps, lines)))
    with openai_server() as server:
        given = ("--prompts", str(tmp_path / "lines"), "--endpoint", "chat", "--output-tokens", "4")
        found, result = bench(server, *given, "--body", '{"temperature": 0.5, "stream_options": null}')
        refused = bench(server, *given[:2])[1]
    assert result.exit_code == 0 and found["runs"][0]["completed"] == 2
    one, two = sorted((body for _, body in server.seen[1:]), key=lambda body: body["max_tokens"])
    assert (one["messages"], one["max_tokens"]) == ([{"role": "user", "content": "a b"}], 3)
    assert (two["messages"][0]["content"], two["max_tokens"], two["top_p"]) == ("c", 4, 0.5)
    assert one["temperature"] == 0.5 and not {"id", "prompt", "ignore_eos", "stream_options"} & one.keys()
    assert str(refused.exception).endswith(
        "lines: line 3: --endpoint completions takes no messages; use --endpoint chat"
    )
    assert len(server.seen) == 3


def test_results_are_saved_whole_and_not_over_others(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    with openai_server() as server:
        _, result = bench(server, *SMALL, "-o", str(target), "--slo", "ttft:60000", "--slo", "tpot:60000")
        assert f"saved as {target}" in result.stderr
        saved = json.loads(target.read_text())
        assert [one["output_tokens"] for one in saved["runs"][0]["requests"]] == [5] * 6
        assert saved["runs"][0]["good"] == 6 and saved["settings"]["num_prompts"] == 6 and "machine" in saved
        asked = len(server.seen)
        _, again = bench(server, *SMALL, "-o", str(target))
        assert isinstance(again.exception, OutputError) and "use --force" in str(again.exception)
        assert len(server.seen) == asked  # nothing was measured for it
        assert bench(server, *SMALL, "-o", str(target), "--force")[1].exit_code == 0
        for place, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "a folder that does not exist")):
            assert said in str(bench(server, *SMALL, "-o", str(place))[1].exception)
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_what_a_terminal_shows() -> None:
    with openai_server() as server:
        one = CliRunner().invoke(app, ["bench", "serve", "--url", server.url, *SMALL, "--slo", "ttft:60000"]).stdout
        many = CliRunner().invoke(app, ["bench", "serve", "--url", server.url, *SMALL, "--rate", "300,inf"]).stdout
    assert f"demo at {server.url}/v1/completions\nall at once: 6 answers in " in one
    assert all(f"\n{name}  " in one for name in ("TTFT", "TPOT", "ITL", "E2E")) and "within --slo" in one
    assert "tokens of answers a second\n" in one and "requests under way\n" in one
    assert "TTFT p99 in ms, by rate\n" in many and "\n 300 " in many and "\n inf " in many
    assert max(map(len, [*one.splitlines(), *many.splitlines()])) <= 120


def test_answers_without_usage_are_told_of() -> None:
    with openai_server(answer=lambda body: completed(body, counted=False)) as server:
        shown = CliRunner().invoke(app, ["bench", "serve", "--url", server.url, *SMALL]).stdout
    assert "6 answers came without usage: their chunks are taken for tokens" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rate 0", "--rate 0 is no list of numbers above 0"),
        ("--rate 1,x", "--rate 1,x is no list"),
        ("--rate nan", "--rate nan is no list"),
        ("--burstiness nan", "--burstiness nan is not above 0"),
        ("--slo itl:5", "known: ttft, tpot, e2e"),
        ("--slo ttft:inf", "--slo ttft:inf is no limit"),
        ("--body []", "--body is \\[\\], but must be a JSON object"),
        ('--body {"n":2}', "--body has n, which is not for it to set"),
        ("--token-ids --endpoint chat", "--token-ids are prompts of --endpoint completions"),
        ("--workload nano --num-prompts 300", "--num-prompts is 300, but nano has 256 prompts"),
        ("--workload nano --prompt-tokens 8", "--prompt-tokens says nothing of the prompts of --workload nano"),
        ("--workload long --output-tokens 8", "--output-tokens says nothing of the prompts of --workload long"),
        ("--prompts p.jsonl --prefix-tokens 8", "--prefix-tokens says nothing of the prompts of --prompts p.jsonl"),
        ("--prompts p.jsonl --workload nano", "--workload says nothing of the prompts of --prompts p.jsonl"),
    ],
)
def test_options_that_contradict(options: str, said: str) -> None:
    error = CliRunner().invoke(app, ["bench", "serve", *options.split()]).exception
    assert isinstance(error, UsageError)
    with pytest.raises(UsageError, match=said):
        raise error


def test_the_clock_is_read_as_bytes_come() -> None:
    """TTFT begins before the connection is made, and what lies between two reads is ITL, to the clock's digit."""
    ticks = iter(range(1000))
    with openai_server() as server:

        async def ask() -> Answer:
            endpoint = Endpoint(Address.of(server.url), clock=lambda: float(next(ticks)))
            try:
                body = json.dumps({"max_tokens": 3, "prompt": "a"}).encode()
                return await send(endpoint, endpoint.post("/v1/completions", body), Answer(), 60.0)
            finally:
                endpoint.close()

        answer = asyncio.run(ask())
    assert answer.error is None and answer.started == 0.0
    assert answer.times == sorted(answer.times) and set(answer.times) <= {float(one) for one in range(1, 10)}
