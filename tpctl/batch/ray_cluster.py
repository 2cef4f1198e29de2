"""A Ray cluster as a batch sees it: reached or refused in one line, and what its nodes have."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from tpctl.children import python_environment
from tpctl.errors import EngineError, UsageError

PATIENCE = 45.0
"""Seconds in which a cluster must answer; Ray itself would wait for minutes."""

_KNOCK = 5.0  # seconds to reach an address at all
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_PROBE = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
except Exception as error:
    print("refused", type(error).__name__, " ".join(str(error).split()))
else:
    print("there")
"""
_VERSIONS = re.compile(r"started with: Ray: (\S+) Python: (\S+) .*started with: Ray: (\S+) Python: (\S+)")


def require_ray(what: str) -> None:
    """Refuse ``what`` where Ray is not installed. A folder of its name is none.

    Raises:
        UsageError: it is not.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        raise UsageError(f"{what} needs Ray, which is not installed here; `pip install 'tpctl[ray]'`")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at ``address``, ``"auto"`` for the one that this machine is a node of. At the end of
    the connection Ray ends what was started by it.

    Raises:
        EngineError: there is none, it does not answer, or another version runs there.
        UsageError: Ray is not installed, or the address is none.
    """
    _check_address(address)
    require_ray("--ray")
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    _probe(address)
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--ray is {address}, but must be auto, or HOST:PORT as `ray start` prints it, on a node of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()
    except OSError as error:
        raise EngineError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); name one that runs, or start one with "
            "`ray start --head`"
        ) from None


def _probe(address: str) -> None:
    """Have a process of its own try the address: in this one Ray could not be interrupted."""
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(
            command, env=python_environment(os.environ), capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"no Ray cluster answers at {_shown(address)} within {PATIENCE:.0f} s; is that the port of the head node, "
            "and this machine a node of the cluster?"
        ) from None
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if said == "there":
        return
    if found := _VERSIONS.search(said):
        theirs, their_python, ours, our_python = found.groups()
        raise EngineError(
            f"the Ray cluster at {_shown(address)} runs Ray {theirs} with Python {their_python}, but here is Ray "
            f"{ours} with Python {our_python}; install the same ones"
        )
    if said.startswith("refused ConnectionError") and address == "auto":
        raise EngineError(
            "this machine is no node of a Ray cluster that runs; start one with `ray start --head`, join one with "
            "`ray start --address HOST:PORT`, or name it: --ray HOST:PORT"
        )
    why = said.removeprefix("refused ") or (done.stderr.strip().splitlines() or ["Ray says nothing"])[-1]
    raise EngineError(f"cannot use the Ray cluster at {_shown(address)} (Ray {version('ray')}): {why[:300]}")


def _shown(address: str) -> str:
    return "this machine" if address == "auto" else address


@contextmanager
def answering() -> Iterator[None]:
    """Around calls of Ray in a batch that runs.

    Raises:
        EngineError: the cluster does not answer them any more.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"the Ray cluster does not answer any more ({said[:200]})") from None


def nodes() -> dict[str, dict[str, float]]:
    """The resources of the nodes that live, by their ids."""
    import ray

    with answering():
        known: list[dict[str, Any]] = ray.nodes()
    return {node["NodeID"]: node.get("Resources", {}) for node in known if node["Alive"]}
