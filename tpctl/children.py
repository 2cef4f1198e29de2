"""The environment of Python processes that tpctl starts.

They import what is installed, not what lies around, and hear nothing of a launcher that may have started tpctl itself:
in a pod of a training operator, in a batch job or beneath torchrun the variables describe *that* group of processes.
torch reads them before its arguments (``PET_NNODES=2`` alone makes it wait ten minutes for a second machine).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# What launchers set for the processes they start, and what steers torch's own launcher and its rendezvous. Not here,
# and so left as the user has them: CUDA_*, NCCL_*, TORCH_NCCL_*, OMP_*, GOMP_*, KMP_*, MKL_*, LD_*.
_LAUNCHERS_PREFIXES = (
    "PET_",  # torchrun's options (torch.distributed.argparse_util); set by Kubernetes training operators
    "TORCHELASTIC_",
    "TORCH_ELASTIC_",
    "TORCH_DISTRIBUTED_",
    "TORCH_DIST_",
    "ROLE_",
    "GLOO_",  # one host: gloo needs the loopback interface, whatever connects this host with others
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_"),
    *("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_", "MPICH_", "MV2_", "I_MPI_", "HYDRA_", "HYDI_", "FLUX_", "PALS_"),
)
_LAUNCHERS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "NNODES", "NPROC_PER_NODE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_WORKER_SERVER_SOCKET", "TORCH_GLOO_LAZY_INIT", "USE_LIBUV"),
    "PYTHON_EXEC",  # torchrun would start its ranks with it
    "LOGLEVEL",  # any program's, but torch demands a level that Python's logging knows
}
# Meant for a person at an interpreter, or for a program's developer: they change how it ends, or make it print or stop.
_INTERPRETERS = {
    *("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONVERBOSE", "PYTHONDEBUG", "PYTHONDUMPREFS"),
    *("PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONTRACEMALLOC", "PYTHONPROFILEIMPORTTIME", "PYTHONMALLOCSTATS"),
    *("PYTHONIOENCODING", "PYTHONCASEOK"),
}


def is_foreign(variable: str) -> bool:
    """Whether an environment variable of this name says something to tpctl, or to another program, that a process which
    tpctl starts must not hear."""
    return variable in _LAUNCHERS or variable in _INTERPRETERS or variable.startswith(_LAUNCHERS_PREFIXES)


def python_environment(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` for a child that runs ``python -m …`` or ``python -c …``, without what is foreign to it.

    Either puts the current folder before everything else that can be imported, so that a file ``torch.py`` which
    happens to be there would be run; ``PYTHONSAFEPATH`` keeps it out. A tpctl that is run from a checkout may have been
    found by just that folder, and is named in ``PYTHONPATH`` instead.
    """
    env = {name: value for name, value in base.items() if not is_foreign(name)}
    env["PYTHONSAFEPATH"] = "1"
    if _ROOT.name not in ("site-packages", "dist-packages"):
        known = env.get("PYTHONPATH")
        env["PYTHONPATH"] = f"{known}{os.pathsep}{_ROOT}" if known else str(_ROOT)
    return env
