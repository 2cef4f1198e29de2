"""Outputs of several steps that reach the event loop in one turn, as they do where a server is behind."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import PATIENCE, running
from tests.unit.test_serve import CHAT, HELLO, TEXT
from tests.unit.test_serve_streamed import drawn, joined, plain
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import generation
from tpctl.serve.generation import Piece
from tpctl.wire.messages import Output

SAID = "Só: a<b, 🙂 ab.\nEnd of it é zz\nE and more ab"


class Bursty(FakeEngine):
    """Makes several steps at once, in each of which it may pass over an answer, or make several tokens of it."""

    draw = random.Random(0)

    def _run(self) -> None:
        while not self.closed:
            with self._wake:
                self._wake.wait_for(lambda: self.open or self.closed)
                for _ in range(self.draw.choice([1, 2, 3, 5, 50])):
                    self.router.deliver([self._several(id) for id in list(self.open) if self.draw.random() < 0.7])
            time.sleep(self.draw.choice([0, 0.001]))

    def _several(self, id: str) -> Output:
        found = self._next(id)
        for _ in range(self.draw.choice([0, 0, 1, 3])):
            if id not in self.open:
                break
            more = self._next(id)
            told = None if more.logprobs is None else [*(found.logprobs or ()), *more.logprobs]
            ids = [*found.token_ids, *more.token_ids]
            found = found._replace(token_ids=ids, finish_reason=more.finish_reason, logprobs=told)
        return found


@pytest.mark.parametrize("interval", [1, 3])
def test_a_stream_in_bursts_comes_to_the_whole_answer(
    tmp_path: Path, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reasons to end, log-probabilities, and the usage in each chunk, of up to ten answers."""
    draw = random.Random(interval)
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    together: list[list[Piece]] = []

    def join(pieces: list[Piece]) -> list[Piece]:
        together.append(list(pieces))
        return made(pieces)

    made = generation.joined
    monkeypatch.setattr(generation, "joined", join)
    with (
        running(tokenizer, Bursty(tokenizer, say=lambda *_: SAID), interval=interval) as server,
        httpx2.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):

        def hold_up() -> None:
            time.sleep(0.002)
            if not server.server._ending.is_set():  # type: ignore[union-attr]
                server.loop.call_later(0.002, hold_up)

        server.loop.call_soon_threadsafe(hold_up)
        for _ in range(60):
            path = draw.choice([CHAT, TEXT])
            prompt = {"messages": HELLO} if path == CHAT else {"prompt": draw.choice(["Once", ["Once", "ü"]])}
            body: dict[str, Any] = {**prompt, **drawn(draw, path, 1, 2, 5, 9, 100), "n": draw.choice([1, 2, 5])}
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            whole, each = answer.json(), draw.random() < 0.5
            options = {"include_usage": True, "continuous_usage_stats": each}
            told = client.post(path, json={**body, "stream": True, "stream_options": options}).text
            *events, done = [one.removeprefix("data: ") for one in told.split("\n\n") if one]
            *chunks, last = map(json.loads, events)
            assert done == "[DONE]" and last["usage"] == whole["usage"]
            assert joined(chunks, path) == [plain(choice, path) for choice in whole["choices"]], body
            if each:
                counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
                assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]
    several = [found for pieces in together if (found := Counter(piece.at for piece in pieces)).most_common()[0][1] > 1]
    assert any(len(found) > 1 for found in several)  # of one answer beside others, and with its end
    assert any(piece.finish_reason for pieces in together for piece in pieces[1:])
