"""The process that runs cases: ``python -m tests.fuzz.server FOLDER PRISTINE IN OUT``.

It reads pickled cases from the pipe with number IN and answers each on OUT with its outcomes, one by one, and ``None``.
Commands that start an engine get one without processes, which answers with the first tokens of the prompt.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import struct
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from tests.fuzz.sandbox import Sandbox
from tests.unit.fake_client import FakeClient
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import TokenLogprob
from tpctl.wire.scoring import TokenScore

ANSWER = 5
"""Tokens of the prompt that an answer repeats, at most."""


def echo_engine(record: dict[str, Any]) -> type[FakeClient]:
    """A stand-in for ``EngineClient`` that writes down what it is given."""

    class Echo(FakeClient):
        def __init__(self, config: Any, **options: Any) -> None:
            from tpctl.client.tokenizer import Tokenizer

            super().__init__(Tokenizer(config.shard_dir))
            record["config"] = asdict(config)
            record["requests"] = []
            self._waiting: list[Request] = []

        def close(self) -> None:
            pass

        def submit(self, requests: Iterable[Request]) -> None:
            for request in requests:
                record["requests"].append(
                    {"id": request.id, "token_ids": list(request.token_ids), "sampling": asdict(request.sampling)}
                )
                self._waiting.append(request)

        def outputs(self, timeout: float | None = None) -> list[Output]:
            ended, self._ended = self._ended, []
            for request in self._waiting:
                answer = list(request.token_ids[: min(ANSWER, request.sampling.max_tokens)])
                asked = request.sampling.logprobs is not None
                logprobs = [TokenLogprob(-0.5, [(token, -0.5)]) for token in answer] if asked else None
                scored = [] if request.scoring is None else request.token_ids[request.scoring.first :]
                scores = [TokenScore(-0.5, 0.0, True) for _ in scored] or None
                ended.append(Output(request.id, answer, "length", None, logprobs, num_cached_tokens=0, scores=scores))
            self._waiting = []
            return ended

        def abort(self, ids: Iterable[str]) -> None:
            self._waiting = [request for request in self._waiting if request.id not in set(ids)]

    return Echo


def _prepare(sandbox: Sandbox) -> None:
    """Import what commands import when they run, and put the stand-in where they look for an engine."""
    import blake3  # noqa: F401
    import huggingface_hub  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import rich.table  # noqa: F401
    import tokenizers  # noqa: F401

    import tpctl.bench.measure
    import tpctl.cli.app
    import tpctl.client.batch
    import tpctl.client.conversation
    import tpctl.client.engine_client
    import tpctl.planning.fit
    import tpctl.sharding.cutting.merge
    import tpctl.sharding.cutting.reshard
    import tpctl.sharding.cutting.shard
    import tpctl.sharding.showing.inspect

    # What takes most of a command's time here says nothing of it: the command line's parser is built once, and nothing
    # need be on a disk after the power fails.
    parser = typer.main.get_command(tpctl.cli.app.app)
    typer.main.get_command = lambda app: parser
    os.fsync = lambda file: None
    tpctl.client.engine_client.EngineClient = echo_engine(sandbox.engine)  # type: ignore[misc,assignment]


def main() -> None:
    folder, pristine, source, target = sys.argv[1:]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a case that hangs must not outlive the run
    home = Path(folder)
    os.environ.update(
        HOME=str(home / "home"),
        TPCTL_CACHE=str(home / "cache"),
        XDG_CACHE_HOME=str(home / "home" / ".cache"),
        HF_HOME=str(home / "home" / "hf"),
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
        TMPDIR=str(home / "tmp"),
        TOKENIZERS_PARALLELISM="false",
        COLUMNS="200",
    )
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}-stack", "w"), all_threads=False)  # noqa: PTH123, SIM115
    sandbox = Sandbox(home, Path(pristine))
    _prepare(sandbox)
    with open(int(source), "rb") as cases, open(int(target), "wb") as answers:  # noqa: PTH123

        def send(value: Any) -> None:
            raw = pickle.dumps(value)
            answers.write(struct.pack("<Q", len(raw)) + raw)
            answers.flush()

        send(None)
        while head := cases.read(8):
            for outcome in sandbox.run(pickle.loads(cases.read(struct.unpack("<Q", head)[0]))):
                send(outcome)
            send(None)


if __name__ == "__main__":
    main()
