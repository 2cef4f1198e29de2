"""Which launcher starts a batch's replicas: on this host, as steps of a SLURM job, by ssh, or on a Ray cluster. The
coordinator is told none of it."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from tpctl.batch.local import Local, Slot
from tpctl.batch.slurm import Slurm, allocation, share_of
from tpctl.batch.ssh import Ssh, read_hosts, ssh_slots
from tpctl.errors import UsageError
from tpctl.launch.places import places

SLURM = "slurm"
"""The value of ``--hosts`` that is no file."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        count: replicas; ``None``: as many as there is room for.
        hosts: ``None``: this one; ``SLURM``; or a file of hosts.
        device: ``"cpu"``, ``"cuda"``, or ``None`` where each host is to find out.
        shared: several replicas may use a GPU: what each takes of it is said.
        ray: on the Ray cluster that this process is connected to (``ray_cluster.connected``).
    """

    count: int | None
    hosts: str | None
    tp_size: int
    device: str | None
    shared: bool
    ray: bool = False


def check_place(count: int | None, hosts: str | None, ray: str | None = None) -> None:
    """Refuse what contradicts itself, a SLURM job where there is none, and a file of no hosts: before a model is
    looked for, which may be a download.

    Args:
        count, hosts: as of ``Wanted``; ``ray``: the address of a Ray cluster.

    Raises:
        SourceError: the file of hosts cannot be read.
        UsageError: it is to be refused.
    """
    if ray is not None and (hosts is not None or count == 0):
        other = "--replicas 0" if hosts is None else f"--hosts {hosts}"
        raise UsageError(f"--ray {ray} and {other} say two things; leave one out")
    if hosts is None:
        return
    if count == 0:
        raise UsageError(f"--replicas 0 and --hosts {hosts} say two things; leave one out")
    if hosts == SLURM:
        allocation(os.environ, 1, 1)
    elif count is not None:
        raise UsageError(f"--replicas and --hosts {hosts} say two things; write slots=N behind a host")
    else:
        read_hosts(Path(hosts))


def launcher(root: Path, wanted: Wanted) -> tuple[Local, int]:
    """What starts the replicas of the batch in ``root``, and how many of them one host has at most.

    Raises:
        SourceError: the file of hosts cannot be read.
        UsageError: there is no room for so many, the file of hosts is none, or there is no SLURM job.
    """
    token = secrets.token_hex(2)
    root = root.resolve()
    if wanted.ray:
        from tpctl.batch.ray_replicas import RayReplicas, room

        found_room = room(wanted.tp_size, wanted.device)
        count = wanted.count or max(1, found_room.replicas)
        slots = [Slot(number, None) for number in range(count)]
        return RayReplicas(root, slots, token, room=found_room), min(count, found_room.on_a_host)
    check_place(wanted.count, wanted.hosts)
    if wanted.hosts == SLURM:
        found = allocation(os.environ, wanted.count, wanted.tp_size)
        share = share_of(found, wanted.tp_size, wanted.device)
        slots = [Slot(number, None) for number in range(found.tasks)]
        threads = max(1, found.cores // wanted.tp_size)
        return Slurm(root, slots, token, share=share, threads=threads), found.on_a_host
    if wanted.hosts is not None:
        hosts = read_hosts(Path(wanted.hosts))
        return Ssh(root, ssh_slots(hosts), token), max(host.slots for host in hosts)
    if wanted.count == 0:
        return Local(root, [], token), 1
    gpu_sets = places(wanted.count, wanted.tp_size, wanted.device or "cpu", wanted.shared)
    return Local(root, [Slot(number, place) for number, place in enumerate(gpu_sets)], token), len(gpu_sets)
