"""Replicas as steps of a SLURM job: ``srun`` starts each with its own share, and SLURM chooses where.

The coordinator runs inside the allocation, in the batch script or under ``salloc``. A replica is a step of its own, so
that one that died is started again while the others go on; which GPUs and cores a step has, and that nobody else has
them, is SLURM's to see to (``--exact``).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tpctl.batch.local import Slot
from tpctl.batch.remote import Remote
from tpctl.errors import UsageError

_GPUS = ("SLURM_JOB_GPUS", "SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
# What a script's own options would add to every step: tasks a node, GPUs a task and so on. A step here is one task.
_STEPS = re.compile(
    r"(SLURM|SRUN)_(NTASKS|NPROCS|NTASKS_PER_\w+|CPUS_PER_\w+|GPUS|GPUS_PER_\w+|TRES_PER_TASK|GPU_BIND)"
)


_ONE_TASK = ("--nodes=1", "--ntasks=1", "--exact", "--mpi=none", "--job-name=tpctl-replica")


@dataclass(frozen=True)
class Allocation:
    """What a SLURM job has, as its environment says.

    Attributes:
        job: its id.
        tasks: replicas that it has room for.
        cores: of each replica.
        gpus: it has some.
        nodes: hosts.
        memory: MB of each replica; ``None`` where SLURM deals memory by cores, or not at all.
    """

    job: str
    tasks: int
    cores: int
    gpus: bool
    nodes: int
    memory: int | None

    @property
    def on_a_host(self) -> int:
        """Replicas that run on one host, at most if SLURM deals evenly."""
        return -(-self.tasks // self.nodes)


def allocation(env: Mapping[str, str], count: int | None, tp_size: int) -> Allocation:
    """The allocation that this process runs in, divided among ``count`` replicas; ``None``: as its tasks say.

    Raises:
        UsageError: there is none, no srun, or it has fewer cores than replicas.
    """
    if "SLURM_JOB_ID" not in env:
        raise UsageError("--hosts slurm needs a SLURM job (SLURM_JOB_ID is not set); run it with sbatch or salloc")
    if shutil.which("srun", path=env.get("PATH")) is None:
        raise UsageError("--hosts slurm needs srun, which is not on the PATH; run it where SLURM is installed")
    cores = _dealt(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    if count is None:
        count = _tasks(env, len(cores), tp_size)
    if count > sum(cores):
        raise UsageError(
            f"{count} replicas are more than the {sum(cores)} CPUs of SLURM job {env['SLURM_JOB_ID']}; "
            "lower --replicas, or ask for more (--ntasks, --cpus-per-task)"
        )
    each = max(share for share in range(1, max(cores) + 1) if sum(had // share for had in cores) >= count)
    memory = env.get("SLURM_MEM_PER_NODE", "")
    share = int(memory) * len(cores) // max(count, len(cores)) if memory.isdigit() else None
    return Allocation(env["SLURM_JOB_ID"], count, each, any(env.get(name) for name in _GPUS), len(cores), share)


def share_of(found: Allocation, tp_size: int, device: str | None) -> tuple[str, ...]:
    """``srun``'s options for one replica of ``tp_size`` ranks."""
    options = [f"--cpus-per-task={found.cores}"]
    if device == "cuda" or (device is None and found.gpus):
        options.append(f"--gpus-per-task={tp_size}")
    elif found.gpus:
        options.append("--gres=none")
    return (*options, *([] if found.memory is None else [f"--mem={found.memory}"]))


def _tasks(env: Mapping[str, str], nodes: int, tp_size: int) -> int:
    """Replicas of an allocation: its tasks if it was given any, else one a node, or one for each ``tp_size`` GPUs."""
    if env.get("SLURM_NTASKS", "").isdigit():
        return int(env["SLURM_NTASKS"])
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return nodes * max(1, int(on_node) // tp_size if on_node.isdigit() else 1)


def _dealt(text: str) -> list[int]:
    """``"4(x2),2"`` as ``[4, 4, 2]``: what each node has (sbatch(1), SLURM_JOB_CPUS_PER_NODE)."""
    found: list[int] = []
    for cores, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(cores)] * int(times or 1)
    return found or [1]


@dataclass
class Slurm(Remote):
    """The steps of one job.

    Attributes:
        share: ``srun``'s options for a replica's share of the job. A step that says nothing of memory or GPUs takes all
            that the job has on its host, and the next one waits.
        threads: of each rank, where SLURM binds no task to its cores and a replica sees all of its host's.
    """

    noise: tuple[str, ...] = ("srun: ", "slurmstepd")
    share: tuple[str, ...] = ()
    threads: int = 1

    def _argv(self, slot: Slot) -> list[str]:
        replica = [sys.executable, "-m", "tpctl", "replica", str(self.root), "--name", slot.name, "--tied"]
        return ["srun", *_ONE_TASK, *self.share, *replica]

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not _STEPS.fullmatch(name)}
        env.setdefault("OMP_NUM_THREADS", str(self.threads))
        return env

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """srun ends its tasks by SIGKILL when it is sent SIGTERM; killed itself it would leave them running."""
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
