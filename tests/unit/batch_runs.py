"""A batch by a stand-in for the engine, and its rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.unit.fake_client import FakeClient
from tests.unit.fake_client import job_parser as parser
from tpctl.client.batch import Batch, Tally
from tpctl.client.jobs import Line
from tpctl.client.results import Results
from tpctl.client.tokenizer import Tokenizer


def numbered(stream: Iterable[bytes]) -> Iterator[Line]:
    """The lines that hold more than white space, as a ``Reader`` gives them."""
    texts = ((number, raw) for number, raw in enumerate(stream, start=1) if raw.strip())
    yield from (Line(index, number, raw) for index, (number, raw) in enumerate(texts))


def run(
    tokenizer: Tokenizer,
    text: str,
    target: Path | None,
    *,
    resume: bool = False,
    window: int = 3,
    **client: Any,
) -> tuple[Tally, FakeClient]:
    fake = FakeClient(tokenizer, **client)
    with Results(target, {"model": "m"}, resume=resume) as results:
        tally = Batch(fake, tokenizer, results, window).run(  # type: ignore[arg-type]
            numbered(io.BytesIO(text.encode())), parser(tokenizer)
        )
        results.publish(tally.lines)
    return tally, fake


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(count: int) -> str:
    return "".join(json.dumps({"prompt": "x" * (count - n)}) + "\n" for n in range(count))
