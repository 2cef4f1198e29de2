"""An engine without a model or torch, as fast as messages go: for everything around an engine (``TPCTL_WORKER``).

Its answer to a prompt is a function of the prompt's tokens alone: a few of them, from the end to the front. A prompt
that holds the text of ``FAST_WORKER_DEADLY`` as its own ids (comma between them) kills the rank that is asked, and one
that holds those of ``FAST_WORKER_HANGS`` is thought about for ever. ``FAST_WORKER_DELAY`` seconds pass before each
group of answers (``TPCTL_FAST_DELAY`` on other hosts, which are told of variables that begin so), and while the file
``FAST_WORKER_PAUSE`` is there, none comes.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from tests.distributed.fake_worker import info
from tpctl.launch.lifeline import connect, tie_to_parent
from tpctl.wire.channel import ChannelClosed
from tpctl.wire.messages import Abort, Add, GetStats, Output, Outputs, Ready, Request, Stats, Stop
from tpctl.wire.report import EngineStats
from tpctl.wire.settings import EngineConfig


def answer(token_ids: list[int], max_tokens: int) -> list[int]:
    return token_ids[::-1][: min(max_tokens, 8)]


def ids_of(variable: str) -> list[int]:
    return [int(id) for id in os.environ.get(variable, "").split(",") if id]


def holds(token_ids: list[int], part: list[int]) -> bool:
    return bool(part) and any(token_ids[at:][: len(part)] == part for at in range(len(token_ids)))


def main() -> None:
    tie_to_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--socket", type=Path)
    arguments = parser.parse_args()
    config = EngineConfig.load(arguments.config)
    stopped = arguments.config.parent / "stop"
    if int(os.environ["RANK"]) == 0:
        serve(config, arguments.socket)
        stopped.touch()
    while not stopped.exists():  # the other ranks have nothing to do
        time.sleep(0.05)


def serve(config: EngineConfig, path: Path) -> None:
    deadly, hangs = (ids_of(f"FAST_WORKER_{name}") for name in ("DEADLY", "HANGS"))
    delay = float(os.environ.get("FAST_WORKER_DELAY") or os.environ.get("TPCTL_FAST_DELAY", "0"))
    pause = os.environ.get("FAST_WORKER_PAUSE")
    channel = connect(path)
    longest = config.max_model_len or 2048
    channel.send(Ready(replace(info(config), max_model_len=longest, wanted_model_len=longest)))

    def outputs(requests: list[Request]) -> list[Output]:
        found = []
        for request in requests:
            if holds(request.token_ids, deadly):
                os.kill(os.getpid(), signal.SIGKILL)
            while holds(request.token_ids, hangs):
                time.sleep(1)
            found.append(Output(request.id, answer(request.token_ids, request.sampling.max_tokens), "length"))
        return found

    try:
        while not isinstance(message := channel.receive(), Stop):
            if isinstance(message, GetStats):
                channel.send(Stats(EngineStats(*[0] * 13)))
            if isinstance(message, Abort):
                channel.send(Outputs([Output(id, [], "abort") for id in message.ids]))
            if isinstance(message, Add):
                time.sleep(delay)
                while pause and Path(pause).exists():
                    time.sleep(0.02)
                channel.send(Outputs(outputs(message.requests)))
    except ChannelClosed:
        os._exit(1)


if __name__ == "__main__":
    main()
