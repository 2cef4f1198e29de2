"""A replica without an engine, which answers a line with its length: for what the coordinator and the folder cost.

python -m tests.distributed.light_replica FOLDER PROMPTS NAME
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import plain
from tpctl.batch.formats.ids import id_of
from tpctl.batch.leases import Leases
from tpctl.batch.replica import Replica
from tpctl.client.jobs import Line


def row_of(line: Line) -> dict[str, Any]:
    id = id_of(line.raw, line.number)
    return {"id": id, "text": f"{len(line.raw)}", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 1}


def answer_all(leases: Leases, place: Replica) -> None:
    for group in leases.groups(1000, 0.02, place.over):
        for line in group:
            leases.add(line, row_of(line))
        leases.flush()


def main() -> None:
    root, prompts, name = sys.argv[1:]
    with Replica(JobFolder(Path(root)), name, 1) as place:
        answer_all(place.begin(plain(Path(prompts))), place)


if __name__ == "__main__":
    main()
