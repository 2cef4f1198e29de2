"""A worker without a model: speaks the messages, answers with token ids that count up, and fails on request.

``FAKE_WORKER`` names what it does wrong; ``rank:what`` does it on one rank only, ``rank:what,rank:what`` on two. It
imports torch only for ``record``, as the real worker does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tpctl.errors import ShardFolderError
from tpctl.launch.lifeline import connect, tie_to_parent
from tpctl.wire.channel import ChannelClosed
from tpctl.wire.messages import Abort, Add, Fatal, GetStats, Output, Outputs, Progress, Ready, Stats, Stop
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig


def own_rank() -> int:
    """Asked late: the agent imports this module before the ranks are forked."""
    return int(os.environ["RANK"])


def misbehaviour() -> str:
    for fault in os.environ.get("FAKE_WORKER", "").split(","):
        rank, _, what = fault.rpartition(":")
        if rank in ("", str(own_rank())):
            return what
    return ""


def main() -> None:
    tie_to_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--socket", type=Path)
    arguments = parser.parse_args()
    config = EngineConfig.load(arguments.config)
    what = misbehaviour()
    if folder := os.environ.get("FAKE_WORKER_PIDS"):
        Path(folder, f"{own_rank()}").write_text(f"{os.getpid()} {os.getppid()}")
    if what == "raise":
        raise RuntimeError("the weights are on strike\nsecond line")
    if what == "raise-ours":
        raise ShardFolderError("shard folder is for tp 2, but tp 3 was asked for")
    if what == "exit":
        sys.exit(7)
    if what == "exit-0":
        sys.exit(0)
    if what == "import":
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "lose-peer":
        raise ConnectionError("connection closed by peer")
    if what == "hang":
        time.sleep(600)
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if own_rank() != 0:
        if what == "die-later":
            notes = Path(os.environ["FAKE_WORKER_PIDS"])
            while len(list(notes.iterdir())) < int(os.environ["WORLD_SIZE"]):
                time.sleep(0.01)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        while not (arguments.config.parent / "stop").exists():
            time.sleep(0.05)
        return
    serve(config, arguments.socket, what)


def info(config: EngineConfig) -> EngineInfo:
    longest = config.max_model_len or 64
    return EngineInfo(
        device=config.device,
        dtype="float32",
        tp_size=config.tp_size,
        attention_backend="none",
        kv_cache_dtype="float32",
        block_size=16,
        num_blocks=4,
        max_model_len=longest,
        wanted_model_len=longest,
        kv_cache_bytes=0,
        all_reduce=None,
        scheduling_policy="fcfs",
        weight_bytes=0,
        timings={},
        max_num_seqs=config.max_num_seqs,
    )


def serve(config: EngineConfig, path: Path, what: str) -> None:
    channel = connect(path)
    if what == "fatal":
        channel.send(Fatal("no room for a KV cache"))
        sys.exit(1)
    if folder := os.environ.get("FAKE_WORKER_PIDS"):
        surroundings = {"environ": dict(os.environ), "stdin": sys.stdin.read()}
        Path(folder).with_name("surroundings.json").write_text(json.dumps(surroundings))
    if what == "compile":
        channel.send(Progress("compiling 3 kernels"))
    channel.send(Ready(info(config)))
    steps = 0
    try:
        while True:
            message = channel.receive()
            if isinstance(message, Stop):
                if what == "ignore-stop":
                    continue
                (path.parent / "stop").touch()  # for the other ranks
                return
            if isinstance(message, GetStats):
                channel.send(Stats(EngineStats(steps, *[0] * 12)))
            if isinstance(message, Abort):
                channel.send(Outputs([Output(id, [], "abort") for id in message.ids]))
            if isinstance(message, Add):
                for request in message.requests:
                    if what == "endless":
                        channel.send(Outputs([Output(request.id, [request.token_ids[-1] + 1])]))
                        continue
                    if what == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if what == "refuse":
                        channel.send(Outputs([Output(request.id, [], "error", "the fake refuses")]))
                        continue
                    start = request.token_ids[-1] + 1
                    for step in range(request.sampling.max_tokens):
                        steps += 1
                        last = step + 1 == request.sampling.max_tokens
                        channel.send(Outputs([Output(request.id, [start + step], "length" if last else None)]))
                    if what == "answer-and-die":
                        os.kill(os.getpid(), signal.SIGKILL)
    except ChannelClosed:
        os._exit(1)


if __name__ == "__main__":
    threading.current_thread().name = "fake"
    if os.environ.get("FAKE_WORKER_RECORD"):
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main()
