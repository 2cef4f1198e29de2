"""torchrun with three additions: it dies with its parent, its ranks share one import, and their ends are data.

    python -m tpctl.launch.agent REPORT.json [torchrun arguments] MODULE [the module's arguments]

The stock ``torchrun`` keeps its workers running when the process that started it is killed, has every rank import torch
again after the agent has, and of a rank that was killed by a signal it leaves no trace but a printed table. Here
the agent imports MODULE and forks the ranks, which call its ``main()``. Started by ``launch.torchrun``, never by the
command line itself: this is the one module of the package that imports torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from pathlib import Path

from tpctl.launch.failure import RankFailure, is_consequence, read_error_file
from tpctl.launch.lifeline import PARENT_PID, tie_to_parent
from tpctl.launch.rank_watch import RankWatch, await_sleep

_LINGER = 1.0  # seconds; the agent looks at its ranks ten times a second


def main() -> int:
    tie_to_parent()
    os.environ[PARENT_PID] = str(os.getpid())  # the workers' parent is this process

    # torchrun asks for this host's full name with every event that it logs nowhere. A name server that does not answer
    # costs ten seconds each time.
    socket.getfqdn = lambda name="": name or socket.gethostname()

    # torch then counts GPUs without initialising CUDA, which no process may do before it forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    arguments = parse_args(sys.argv[2:])  # type: ignore[no-untyped-call]
    watch = RankWatch(Path(sys.argv[1]), int(arguments.nproc_per_node))
    try:
        if not (sys.platform == "linux" and _run_forked(arguments, watch)):
            arguments.module = True
            run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        watch.add(
            [
                RankFailure(rank, ended.exitcode, read_error_file(Path(ended.error_file)), ended.timestamp)
                for rank, ended in error.failures.items()
            ]
        )
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _run_forked(arguments: Namespace, watch: RankWatch) -> bool:
    """What ``torch.distributed.run.run`` does, with forked ranks: they find everything imported.

    Returns:
        False, and nothing is started, where a forked rank could not use its GPU.
    """
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args

    module, argv = arguments.training_script, arguments.training_script_args
    imported = importlib.import_module(module)
    preload = getattr(imported, "preload", None)
    if preload is not None:
        preload(argv)
    config, _, _ = config_from_args(arguments)
    config.start_method = "fork"
    if not _forks_well():
        return False
    agent = os.getpid()
    os.register_at_fork(before=lambda: await_sleep() if os.getpid() == agent else None)  # ranks fork, too
    elastic_launch(config, _rank)(watch, module, argv)
    return True


def _forks_well() -> bool:
    """Whether a child forked now could initialise CUDA; asked of one."""
    import torch

    child = os.fork()
    if not child:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(child, 0)[1] == 0


def _rank(watch: RankWatch, module: str, argv: list[str]) -> None:
    """One rank: the module's ``main()`` in a process that has forgotten the agent's signal handlers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    tie_to_parent()
    watch.announce()
    sys.argv = [module, *argv]
    try:
        importlib.import_module(module).main()
    except Exception as error:
        # Of ranks that end within one look the agent reports any. The one that caused it should be seen first.
        if is_consequence(f"{type(error).__name__}: {error}"):
            time.sleep(_LINGER)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # torch's own way out takes half a second, for which somebody waits at the prompt
