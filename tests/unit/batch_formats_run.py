"""A batch by one engine that echoes, from any input into any output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.unit.fake_client import FakeClient
from tpctl.batch.formats.choose import Asked, choose
from tpctl.client.batch import Batch, Tally
from tpctl.client.jobs import JobParser
from tpctl.client.results import Results
from tpctl.client.resume import check_kept
from tpctl.client.tokenizer import Tokenizer


def answer(
    tokenizer: Tokenizer,
    prompts: Path | str,
    out: Path,
    *,
    resume: bool = False,
    fake: FakeClient | None = None,
    stop_after: int | None = None,
    **asked: Any,
) -> Tally:
    """Run it as ``tpctl batch`` does. ``stop_after``: answers after which it is interrupted."""
    spec = choose(str(prompts), str(out), Asked(**asked), "echo")
    assert spec is not None
    formats = spec.formats()
    fake = fake or FakeClient(tokenizer)
    with formats.source.open() as reader, Results(out, {}, resume=resume, encode=formats.sink.encode) as results:
        if results.count:
            check_kept(results, reader.lines(), reader.shown)
        parser = JobParser(
            tokenizer,
            sampling={"max_tokens": 40},
            stop=[],
            max_model_len=64,
            vocab_size=tokenizer.backend.get_vocab_size(),
            form=lambda: formats.source.form,
        )
        batch: Any = Batch(fake, tokenizer, results, 4)  # type: ignore[arg-type]
        tally: Tally = batch.run(
            reader.lines(),
            parser,
            together=8,
            should_stop=lambda: stop_after is not None and results.count >= stop_after,
        )
        if not tally.interrupted:
            results.publish(tally.lines)
    return tally


def write_lines(path: Path, lines: list[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.open()]
