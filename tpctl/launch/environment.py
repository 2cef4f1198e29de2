"""The environment in which workers run: the user's, without what other launchers left in it, and with defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tpctl.children import python_environment
from tpctl.cores import affinity_cores
from tpctl.launch.bytecode import bytecode_environment
from tpctl.launch.lifeline import PARENT_PID
from tpctl.launch.nodes import ONE_HOST, Nodes, socket_interface
from tpctl.launch.processes import MARK

# glibc returns large freed blocks to the kernel at once and takes them back, page by page and zeroed, at the next call.
# On a CPU that cost a layer's activations more than the arithmetic on them. 32 MiB is the largest value it accepts.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
# torch asks name servers what this host's addresses are called, to put it into messages. One that does not answer would
# cost ten seconds a question (resolv.conf(5)).
_INTERFACE = "GLOO_SOCKET_IFNAME"
_HASTY_RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}


def worker_environment(
    base: Mapping[str, str], more: Mapping[str, str], tp_size: int, folder: Path, nodes: Nodes = ONE_HOST
) -> dict[str, str]:
    """What the process started by ``launch.torchrun`` is given: the only rank, or the agent, which adds RANK and so on.

    Args:
        base: this process's own environment; what ``children.is_foreign`` names is left out.
        more: variables that are wanted whatever they are called.
        folder: the engine's, in which a single rank leaves its error and by which its processes are found.
    """
    threads = str(max(1, available_cores() // len(nodes.ranks_here(tp_size))))
    defaults = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **_KEEP_FREED_MEMORY, **_HASTY_RESOLVER}
    given = {name: value for name, value in base.items() if value or name not in defaults}
    env = {**python_environment({**defaults, **given}), **more}
    env |= bytecode_environment(env)
    if nodes.count > 1:
        interface = base.get(_INTERFACE) or socket_interface(nodes.endpoint)
        env |= {} if interface is None else {_INTERFACE: interface}
    elif sys.platform == "linux":
        env.setdefault(_INTERFACE, "lo")  # one host: do not depend on what its name resolves to
    env |= {PARENT_PID: str(os.getpid()), MARK: str(folder)}
    if tp_size == 1:
        # Port 0 lets the store choose; nobody else has to find it.
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        env |= {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}
    return env


def available_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores this process may use: its affinity, and in a container its quota (cgroup v2's ``cpu.max``)."""
    count = affinity_cores()
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return count
