"""A batch by a stand-in for the engine, and its rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tests.unit.fake_client import FakeClient
from tests.unit.fake_client import job_parser as parser
from tpctl.client.batch import Batch, Tally
from tpctl.client.jobs import read_lines
from tpctl.client.results import Results
from tpctl.client.tokenizer import Tokenizer


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
            read_lines(io.BytesIO(text.encode())), parser(tokenizer)
        )
        results.publish(tally.lines)
    return tally, fake


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(count: int) -> str:
    return "".join(json.dumps({"prompt": "x" * (count - n)}) + "\n" for n in range(count))
