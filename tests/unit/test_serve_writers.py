"""What the chunks of a stream cost the server's event loop, which all streams share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.test_serve_pool import job
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.asked import Streaming
from tpctl.serve.generation import Generation
from tpctl.serve.text_writer import PromptLogprobs, TextWriter
from tpctl.serve.writers import ChatWriter, ChunkWriter
from tpctl.wire.messages import Output


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_tokenizer(folder))


def lines(work: Callable[[], object]) -> int:
    """Lines of Python that something runs through."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("chat", [True, False])
def test_a_chunk_costs_no_more_beside_many_answers(tokenizer: Tokenizer, chat: bool) -> None:
    """Also with the usage so far, in which all of them count, and where several tokens are told together."""

    def cost(prompts: int) -> int:
        jobs = [job(tokenizer, "ab", answers=2) for _ in range(prompts)]
        streams = [stream for one in jobs for stream in one.streams]
        generation = Generation(streams, lambda: None, interval=8, answers=2)
        rest = (jobs, generation, tokenizer, Streaming(True, True, True))
        writer: ChunkWriter = ChatWriter("demo", *rest)
        if not chat:
            writer = TextWriter(None, PromptLogprobs(None, None), False, "demo", *rest)
        for at in range(len(streams)):
            generation.push(at, Output(str(at), [5], None, num_cached_tokens=1))
        generation._tell()
        for at in range(len(streams)):
            generation.push(at, Output(str(at), [5], None, num_cached_tokens=1))
        assert writer.usage()["total_tokens"] == 2 * prompts + 4 * prompts
        assert writer.usage()["prompt_tokens_details"] == {"cached_tokens": prompts}

        def chunk() -> None:
            generation.push(1, Output("1", [5], None, num_cached_tokens=1))
            assert writer.pieces(generation._pieces[-1:]).count(b"data: ") == 1

        return lines(chunk)

    assert cost(100) == cost(2) > 0
