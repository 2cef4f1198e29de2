"""One model over several hosts: which of them this is, and where they meet.

The same command runs on every host, which starts its own ranks; torchrun's rendezvous joins them. The first host, node
rank 0, has rank 0 and with it whoever talks to the engine. Where all of them meet is an address and a port of that one.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from tpctl.errors import EngineError, UsageError

_ENDPOINT = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})", re.ASCII)
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>


@dataclass(frozen=True)
class Nodes:
    """A host's place among those of one engine.

    Attributes:
        count: hosts, each with as many ranks.
        rank: which this one is, from 0 on.
        endpoint: where they meet: HOST:PORT of the first.
    """

    count: int = 1
    rank: int = 0
    endpoint: str = ""

    def ranks_here(self, tp_size: int) -> range:
        """This host's ranks.

        Raises:
            UsageError: the hosts would not have equally many.
        """
        if tp_size % self.count:
            raise UsageError(
                f"--tp {tp_size} cannot be divided among --nnodes {self.count}, each of which has as many ranks; "
                f"use --tp {-(-tp_size // self.count) * self.count}, or another number of hosts"
            )
        each = tp_size // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def check_endpoint(self) -> None:
        """Look whether the hosts can meet there, before torch does, which takes minutes to find out.

        Raises:
            EngineError: the first host's name is not known here; or this is the first, and the port is taken.
        """
        host, port = split_endpoint(self.endpoint)
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise EngineError(f"--rdzv-endpoint {self.endpoint}: {host} is not found here ({error.strerror})") from None
        if self.rank == 0:
            try:
                with socket.create_server(("", port)):
                    pass
            except OSError as error:
                raise EngineError(
                    f"--rdzv-endpoint {self.endpoint}: port {port} of this host, the first, cannot be opened "
                    f"({error.strerror}); choose another one"
                ) from None


ONE_HOST = Nodes()


def find_nodes(count: int | None, rank: int | None, endpoint: str | None, env: Mapping[str, str]) -> Nodes:
    """What is said of several hosts, or what SLURM says where it has started one task on each.

    Args:
        count, rank, endpoint: as of ``Nodes``; ``None``: not given.
        env: where SLURM says the rest (srun(1), output environment variables).

    Raises:
        UsageError: something is missing, out of range, or no address.
    """
    if count in (None, 1):
        if rank is not None or endpoint is not None:
            name = "--node-rank" if rank is not None else "--rdzv-endpoint"
            raise UsageError(f"{name} is for a model over several hosts; give their number, too (--nnodes)")
        return ONE_HOST
    assert count is not None
    by_slurm = env.get("SLURM_STEP_NUM_TASKS") == str(count) and env.get("SLURM_STEP_NUM_NODES") in ("1", str(count))
    if by_slurm:
        rank = int(env["SLURM_PROCID"]) if rank is None else rank
        endpoint = _slurm_endpoint(env) if endpoint is None else endpoint
    if rank is None or endpoint is None:
        raise UsageError(
            f"--nnodes {count} needs --node-rank (0 on the first host) and --rdzv-endpoint HOST:PORT (of the first "
            "host); only srun with one task a host fills them in"
        )
    if not 0 <= rank < count:
        raise UsageError(f"--node-rank is {rank}, but with --nnodes {count} must be from 0 to {count - 1}")
    split_endpoint(endpoint)
    return Nodes(count, rank, endpoint)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """HOST and PORT.

    Raises:
        UsageError: they are not.
    """
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise UsageError(f"--rdzv-endpoint is {endpoint}, but must be HOST:PORT, a port from 1 to 65535")
    return found[1].strip("[]"), int(found[2])


def socket_interface(endpoint: str) -> str | None:
    """The network interface by which this host reaches the first one, which is where gloo should listen; ``None``
    where that cannot be told (Linux, IPv4)."""
    host, port = split_endpoint(endpoint)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # of a datagram's socket: nothing is sent
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", os.fsencode(name)[:15])
                try:
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(found[20:24]) == mine:
                    return name
    except OSError:
        return None
    return None


def _slurm_endpoint(env: Mapping[str, str]) -> str:
    """The step's first host, and a port that follows from the job, so that all tasks find the same one."""
    nodes = env.get("SLURM_STEP_NODELIST", "")
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise UsageError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host; give --rdzv-endpoint HOST:PORT")
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    return f"{found[1]}{found[2] or ''}:{15000 + (job * 16 + step % 16) % 15000}"
