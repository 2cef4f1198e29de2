"""What soak tests of a server end on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed.soak_checks import LOOKS, MOST_ROUNDS, check_start, growth, is_whole, more_threads
from tests.distributed.soak_client import heard, request
from tests.unit.fake_client import write_tokenizer
from tests.unit.running import everything, running, talkative
from tpctl.client.tokenizer import Tokenizer

LEAST = 1 + 2 * LOOKS
LEAK = (0.02 * 150e6 + (4 << 20)) / LOOKS * 1.1
"""Bytes a round of a process of 150 MB, a tenth more than is let pass."""


def told(sizes: list[float], more: int = 0) -> str:
    return growth([{7: 100_000_000, 9: int(size)} for size in sizes], {9: more})


def steady(sizes: list[float]) -> bool:
    """Whether a run would end well, which looks after each round from the least on."""
    return any(not told(sizes[:count]) for count in range(LEAST, len(sizes) + 1))


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_told_from_bursts(seed: int) -> None:
    draw = random.Random(seed)
    bursts = [draw.choice([0, 0, 5e6, 40e6]) for _ in range(MOST_ROUNDS)]
    kept = [sum(bursts[: at + 1]) if at < 4 else sum(bursts[:4]) for at in range(MOST_ROUNDS)]
    assert steady([150e6 + burst for burst in bursts] + [150e6] * LOOKS)  # what comes and goes
    assert steady([150e6 + more for more in kept])  # and what stays, until it is as much as is ever needed
    small = [draw.uniform(0, LEAK / 20) for _ in range(MOST_ROUNDS)]
    assert not steady([100e6 + LEAK * at + more for at, more in enumerate(small)])
    burst = draw.randrange(MOST_ROUNDS)  # which hides a round's growth of three
    assert not steady([100e6 + 1.5 * LEAK * at + (40e6 if at == burst else 0) for at in range(MOST_ROUNDS)])


def test_a_step_at_the_end_is_no_leak_and_two_ends_are_compared_by_their_least() -> None:
    flat, step = [150e6] * LEAST, [150e6] * (LEAST - 1) + [190e6]
    assert not told(flat) and not told(step)
    assert told([*step, 190e6, 190e6]) == f"9 grew from 150000000 to 190000000 bytes within {LOOKS} rounds"
    assert not told([*step, 190e6, 190e6], 40 << 20)  # a KV cache's
    assert not told([*step, *[190e6] * (2 * LOOKS - 1)])
    assert not told([10e6, *flat]) and told(flat[1:]) == f"{LEAST - 1} rounds are too few to tell"


def test_processes_that_come_or_go() -> None:
    both = {7: 1, 9: 1}
    assert growth([both, both, {7: 1}, *[both] * LEAST], {}) == "processes came or went: [7, 9], [7]"
    assert not growth([{7: 1}, *[both] * LEAST], {})


def test_a_start_that_is_later_than_that_of_chat_is_told() -> None:
    assert check_start([(5.0, 5.1), (9.0, 5.2), (5.6, 5.3)]) == "medians: serve 5.60 s, chat 5.20 s"
    with pytest.raises(SystemExit, match=r"WRONG: medians: serve 5\.80 s, chat 5\.20 s; serve may take 0\.5 s more"):
        check_start([(5.0, 5.1), (9.0, 5.2), (5.8, 5.3)])


def test_a_rank_that_grows_by_more_than_its_cache_is_told() -> None:
    """Its cache counts once, and not anew in every few rounds."""
    leak = [1e9 + 30e6 * at for at in range(MOST_ROUNDS)]
    assert told(leak, 100 << 20).startswith("9 grew from ") and not told(leak[:LEAST], 100 << 20)
    touched = [1e9 + min(30e6 * at, 100e6) for at in range(MOST_ROUNDS)]
    assert not told(touched, 100 << 20)


EVENT = b'data: {"id":"%s","choices":[{"text":"%s","finish_reason":%s}]}\n\n'
USAGE = b'data: {"id":"a","choices":[],"usage":{"completion_tokens":32,"total_tokens":38}}\n\n'
DONE = b"data: [DONE]\n\n"


def response(*events: bytes, status: bytes = b"200 OK") -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (*events, b""))
    return b"HTTP/1.1 " + status + b"\r\ntransfer-encoding: chunked\r\n\r\n" + chunks


def test_a_stream_is_whole_by_its_tokens_and_not_by_its_chunks() -> None:
    said, last = EVENT % (b"a", b'{\\"error\\": 1}', b"null"), EVENT % (b"a", b"", b'"length"')
    whole = response(said, said, last, USAGE, DONE)
    assert is_whole(whole, 32) and not is_whole(whole, 31)
    assert is_whole(response(said + said[:9], said[9:] + last + USAGE + DONE), 32)  # wherever chunks end
    for broken in (
        (said, b'data: {"error":{"message":"it broke"}}\n\n', last, USAGE, DONE),
        (said, last),
        (USAGE, DONE),
        (last, USAGE, DONE),  # no text
        (said, last, said, USAGE, DONE),
        (said, last, last, USAGE, DONE),
        (said, last, DONE, USAGE),
        (said, last, USAGE, DONE, said),
        (said, EVENT % (b"b", b"x", b"null"), last, USAGE, DONE),  # another's
        (said, said[:-9], last, USAGE, DONE),
        (said, EVENT % (b"a", b"", b'"stop"'), USAGE, DONE),
    ):
        assert not is_whole(response(*broken), 32), broken
    assert not is_whole(response(said, last, USAGE, DONE, status=b"500 Internal Server Error"), 32)
    assert not any(is_whole(whole[:end], 32) for end in range(len(whole)))
    assert not is_whole(whole + b"\r\n", 32)


def test_what_a_server_says_is_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    asked = {"prompt": "ab", "max_tokens": 32, "stream": True, "stream_options": {"include_usage": True}}
    with running(tokenizer, talkative(tokenizer)) as server, server.connect() as sock:
        sock.sendall(request(asked))
        told = everything(sock)
    assert is_whole(told, 32) and not is_whole(told, 31)


def test_threads_that_become_more_and_more_are_told() -> None:
    assert not more_threads([20, 24, 27, 27, 25, 27, 27]) and not more_threads([20, 24, 24, 24, 30, 24])
    assert more_threads([20, 24, 25, 26, 27, 28]) == "threads became more and more: [20, 24, 25, 26, 27, 28]"


def test_what_an_answer_says_is_told_from_what_went_wrong() -> None:
    said, last = EVENT % (b"a", b"x", b"null"), EVENT % (b"a", b"y", b'"stop"')
    assert heard(response(said, last, USAGE, DONE)) == (200, "xy", [], "stop")
    ended = b'data: {"error":{"message":"it ends","type":"server_error","code":"ended"}}\n\n'
    assert heard(response(said, ended)) == (503, "it ends", [], "")
    own = ended.replace(b"server_error", b"invalid_request_error").replace(b"ended", b"")
    assert heard(response(said, own)).status == 400
    call = b'{"index":0,"function":{"name":"f","arguments":"{"}}', b'{"index":0,"function":{"arguments":"}"}}'
    deltas = [b'data: {"choices":[{"delta":{"tool_calls":[%b]},"finish_reason":null}]}\n\n' % one for one in call]
    end = b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\n'
    assert heard(response(*deltas, end, DONE)) == (200, "", [("f", "{}")], "tool_calls")
    whole = b'{"choices":[{"message":{"content":"a","tool_calls":null},"finish_reason":"length"}]}'
    assert heard(b"HTTP/1.1 200 OK\r\n\r\n" + whole) == (200, "a", [], "length")
    assert heard(b'HTTP/1.1 429 No\r\n\r\n{"error":{"message":"full"}}') == (429, "full", [], "")
    half = b"HTTP/1.1 200 OK\r\n\r\n{"
    for broken in (response(said), response(said, last, USAGE), response(said, DONE)[:-5], b"", half):
        with pytest.raises(ValueError, match="in b"):
            heard(broken)
