"""An engine that costs nothing, for ``serve_cost.py``: each request gets a token a step, at a pace, once all have come.

``SERVE_COST`` says how many requests, how many seconds a step, and the tokens' ids, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from tpctl.launch.lifeline import connect, tie_to_parent
from tpctl.wire.channel import Channel, ChannelClosed
from tpctl.wire.messages import Abort, Add, GetStats, Output, Outputs, Ready, Stats, Stop
from tpctl.wire.report import EngineInfo, EngineStats


def main() -> None:
    tie_to_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--socket", type=Path)
    channel = connect(parser.parse_args().socket)
    plan = json.loads(os.environ["SERVE_COST"])
    many = plan["streams"]
    channel.send(Ready(EngineInfo("cpu", "none", 1, "none", "none", 16, 1, 8192, 8192, 0, None, "fcfs", 0, {}, many)))
    requests: list[str] = []
    try:
        while not isinstance(message := channel.receive(), Stop):
            if isinstance(message, GetStats):
                channel.send(Stats(EngineStats(*[0] * 13)))
            elif isinstance(message, Abort):
                channel.send(Outputs([Output(id, [], "abort") for id in message.ids]))
            elif isinstance(message, Add):
                requests += [request.id for request in message.requests]
                if len(requests) == many:
                    threading.Thread(target=answer, args=(channel, list(requests), plan), daemon=True).start()
                    requests.clear()
    except ChannelClosed:
        os._exit(1)


def answer(channel: Channel, requests: list[str], plan: dict[str, Any]) -> None:
    time.sleep(1.0)
    due = time.monotonic()
    for at, id in enumerate(plan["ids"]):
        reason = "length" if at + 1 == len(plan["ids"]) else None
        channel.send(Outputs([Output(request, [id], reason) for request in requests]))
        due += plan["step"]
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
