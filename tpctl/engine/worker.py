"""The torchrun entry: one rank of the engine, from start to Stop.

    python -m tpctl.engine.worker --config FILE --socket PATH

At tp 1 it is run as that; ranks of larger groups are forked by ``launch.agent``, which has imported this module.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.launch import lifeline

if TYPE_CHECKING:
    from tpctl.engine.runners.ahead import Ahead

AHEAD = "TPCTL_COMPILE_AHEAD"
"""Variable of the environment that rules out, as ``off``, that kernels are compiled before they are launched."""
_STARTED = time.perf_counter()
if __name__ == "__main__":
    lifeline.tie_to_parent()  # before torch's import, which takes seconds

import torch  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from tpctl.distributed import TPGroup  # noqa: E402
from tpctl.engine.engine import Engine  # noqa: E402
from tpctl.engine.feed import Follower, Leader  # noqa: E402
from tpctl.engine.guiding.grammars import Grammars  # noqa: E402
from tpctl.engine.guiding.guides import Guides  # noqa: E402
from tpctl.engine.outbox import Outbox  # noqa: E402
from tpctl.engine.runners.agreement import agree  # noqa: E402
from tpctl.engine.wait_policy import WaitPolicy, watch_waiting  # noqa: E402
from tpctl.errors import TpctlError  # noqa: E402
from tpctl.wire.messages import Abort, Fatal, GetStats, Message, Outputs, Progress, Ready, Stats, Stop  # noqa: E402
from tpctl.wire.settings import EngineConfig  # noqa: E402


def serve(engine: Engine, feed: Leader | Follower, policy: WaitPolicy | None = None) -> None:
    """Apply messages and compute steps until Stop."""
    outbox = Outbox()  # every rank's, though one alone sends: all of them are idle at the same steps
    while True:
        outputs = []
        idle = not (engine.has_work or outbox)
        if idle and policy is not None:
            policy.rest()
        messages = feed.next(idle and not engine.runner.rest(), engine.patience())
        if idle:
            if policy is not None:
                policy.work()
            # What an idle engine holds (the model, compiled kernels, CUDA graphs) stays: a collection that visits it
            # takes as long as two or three steps.
            gc.freeze()
        for message in messages:
            if isinstance(message, Stop):
                return
            if isinstance(message, GetStats):
                feed.send(Stats(engine.stats()))
            if isinstance(message, Abort):
                outputs += outbox.abort(message.ids)
            outputs += engine.apply(message)
        outputs += engine.step()
        if told := outbox.told(outputs):
            feed.send(Outputs(told))


class Kernels:
    """Those that are compiled beside the ranks of this host while they load, by the first of them, if they run on
    GPUs with Triton."""

    def __init__(self, config: EngineConfig) -> None:
        self._ahead: Ahead | None = None
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        runs = config.device == "cuda" and config.attention_backend != "sdpa" and find_spec("triton") is not None
        if first and runs and os.environ.get(AHEAD) != "off":
            from tpctl.engine.runners.ahead import Ahead, processes

            with suppress(OSError):  # no room for a process: then there is none for what it would do
                self._ahead = Ahead() if processes() else None

    def begin(self, config: EngineConfig, group: TPGroup) -> None:
        """Start to compile those of an engine, once its settings are known."""
        if self._ahead is not None:
            self._ahead.begin(config, group, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def wait(self, group: TPGroup, send: Callable[[Message], object]) -> None:
        """Until they are compiled, as far as they will be (collective)."""
        if self._ahead is not None:
            self._ahead.wait(lambda text: send(Progress(text)))
        group.minimum(0)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    return parser.parse_args(argv)


def preload(argv: list[str]) -> None:
    """Import what this engine's ranks will need beyond this module; initialises no device."""
    if EngineConfig.load(parse_arguments(argv).config).device == "cuda" and find_spec("triton") is not None:
        import tpctl.engine.runners.cuda_start
        import tpctl.layers.attention.triton  # noqa: F401


@record
def main() -> None:
    args = parse_arguments()
    imported = time.perf_counter()
    torch.set_grad_enabled(False)
    gc.freeze()  # imports leave some hundred thousand objects that no collection need visit
    config = EngineConfig.load(args.config)
    kernels = Kernels(config)  # a process beside this one, forked before there is a GPU in it
    group = TPGroup.from_environment(config.device)
    policy = watch_waiting(torch.get_num_threads(), group.let_spin) if config.device == "cpu" else None
    channel = lifeline.connect(args.socket) if group.rank == 0 else None
    try:
        joined = time.perf_counter()
        # First, since between hosts it is by the feed that one learns of the other's end.
        guides = Guides(Grammars(config.text_dir)) if channel is not None else None
        feed = Leader(group, channel, guides) if channel is not None and guides is not None else Follower(group)
        if not group.one_host:
            config = agree(group, config)
        kernels.begin(config, group)
        engine = Engine(config, group, guides, lambda: kernels.wait(group, feed.send))
        timings = engine.runner.loaded.timings
        timings.update(imports=round(imported - _STARTED, 3), group=round(joined - imported, 3))
        feed.send(Ready(engine.info()))
        serve(engine, feed, policy)
    except TpctlError as error:
        # A failure that a sentence explains: the command line shows that, not a traceback.
        if channel is not None:
            channel.send(Fatal(str(error)))
        raise
    group.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's own way out takes half a second, for which somebody waits at the prompt
