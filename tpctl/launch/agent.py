"""torchrun with two additions: it dies with its parent, and it reports how each rank ended as data.

    python -m tpctl.launch.agent REPORT.json [torchrun arguments]

The stock ``torchrun`` keeps its workers running when the process that started it is killed, and of a rank that was
killed by a signal it leaves no trace but a printed table. Started by ``launch.torchrun``, never by the command line
itself: this is the one module of the package that imports torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tpctl.launch.failure import read_error_file
from tpctl.launch.lifeline import PARENT_PID, tie_to_parent


def main() -> int:
    tie_to_parent()
    os.environ[PARENT_PID] = str(os.getpid())  # the workers' parent is this process

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(sys.argv[2:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        report = [
            {
                "rank": rank,
                "exit_code": failure.exitcode,
                "message": read_error_file(Path(failure.error_file)),
                "timestamp": failure.timestamp,
            }
            for rank, failure in error.failures.items()
        ]
        part = Path(sys.argv[1] + ".part")
        part.write_text(json.dumps(report), encoding="utf-8")
        part.replace(sys.argv[1])
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # torch's own way out takes half a second, for which somebody waits at the prompt
