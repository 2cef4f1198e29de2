"""What a worker hears of the environment tpctl was started in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.children import python_environment
from tpctl.launch.environment import worker_environment

LAUNCHERS = [
    *("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    *("PET_RDZV_ENDPOINT", "PET_STANDALONE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_HEALTH_CHECK_PORT", "TORCHELASTIC_SIGNALS_TO_HANDLE"),
    *("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
    *("TORCH_ELASTIC_WORKER_IDENTICAL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_DISTRIBUTED_USE_TORCHCOMMS"),
    *("TORCH_DIST_INIT_BARRIER", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_WORKER_SERVER_SOCKET"),
    *("TORCH_GLOO_LAZY_INIT", "USE_LIBUV", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME"),
    *("ROLE_WORLD_SIZE", "NODE_RANK", "GLOO_DEVICE_TRANSPORT", "SLURM_JOB_ID", "SLURM_NTASKS"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS", "PYTHON_EXEC"),
    *("LOGLEVEL", "PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONDEVMODE"),
    *("PYTHONTRACEMALLOC", "PYTHONIOENCODING"),
]
OWN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "TORCHELASTIC_ERROR_FILE": "/run/error.json",
}
USERS = [
    *("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUNBUFFERED"),
    *("TPCTL_CPU_COLLECTIVES", "HF_HOME", "HOME", "PATH", "LC_ALL", "MALLOC_TRIM_THRESHOLD_", "RES_OPTIONS"),
]


def environment(base: dict[str, str], tp_size: int = 1) -> dict[str, str]:
    return worker_environment(base, {}, tp_size, Path("/run"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_variable_of_a_launcher_is_left_out(name: str) -> None:
    assert name not in environment({name: "theirs"})
    assert name not in environment({name: "theirs"}, tp_size=2)
    assert name not in python_environment({name: "theirs"})


@pytest.mark.parametrize("name", OWN)
def test_a_variable_that_torchrun_sets_is_ours_or_the_agents(name: str) -> None:
    assert environment({name: "theirs"})[name] == OWN[name]
    assert name not in environment({name: "theirs"}, tp_size=2)


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_variable_of_the_user_wins(name: str, tp_size: int) -> None:
    assert environment({name: "7"}, tp_size)[name] == "7"


def test_an_empty_variable_is_not_given() -> None:
    assert environment({"OMP_NUM_THREADS": ""})["OMP_NUM_THREADS"] != ""


def test_name_servers_that_do_not_answer_are_not_waited_for() -> None:
    assert environment({})["RES_OPTIONS"] == "timeout:1 attempts:1"


def test_what_the_caller_wants_is_there_whatever_it_is_called() -> None:
    assert worker_environment({}, {"LOGLEVEL": "INFO"}, 1, Path("/run"))["LOGLEVEL"] == "INFO"
