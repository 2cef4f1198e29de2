"""Kernels compiled in processes beside a rank, while it loads weights.

Such a process is forked before the rank meets its GPU, and never meets one itself. It rehearses the engine
(``engine.runners.rehearsal``); each kernel that is found and not compiled yet goes to one of further processes, one a
core, which compiles it into Triton's own cache. Processes and not threads, since a good part of a compilation is
Python. Of ranks on one host the first has them rehearsed for all, and of engines that start together one compiles.

What fails here, or is not found, is compiled when it is first launched, as it would be without any of this; so is all
that takes too long: the rank waits for no silent process, and for none for ever. All of these processes end with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from typing import TextIO

from tpctl.distributed import TPGroup
from tpctl.engine.memory.host import available_host_memory
from tpctl.engine.runners.forked import MOST_BYTES, Pool, live
from tpctl.engine.runners.rehearsal import Order, rehearse
from tpctl.kernels.common.ahead import Compiled, KernelSpec, compile_driver, compile_spec, was_killed
from tpctl.kernels.common.launch import DeviceFacts
from tpctl.launch.environment import available_cores
from tpctl.wire.settings import EngineConfig

_NICE = 5  # threads that read weights, and the rank's own, come first
_FEWEST, _MOST = 4, 16
"""Processes that compile. Fewer take longer for all kernels than the first requests do for those that they meet; more
have nothing to do: there are a hundred kernels or two, of which some take as long as ten others."""
_MEMORY = 512 << 20  # bytes of one such process, with LLVM and the assembler; 270 to 380 MB were seen
_SAY = 1.0  # seconds of waiting that are not worth a word
_SILENCE, _LONGEST = 20.0, 90.0
"""Seconds that a rank waits while it hears nothing, and at all. The largest kernels take two seconds of a core."""
_LOOK = 0.2  # seconds between looks at what another engine has compiled
_FIRST = 8  # kernels that are looked at before the rank is told how many of them are missing, and again after as many
_ALIVE = b"."
"""What the rank is told where there is nothing to count yet."""


def compile_one(described: list[str] | None, launcher: bool = False) -> None:
    """Compile a kernel, a ``KernelSpec``, and note that; ``None``: what loads them. One that Triton rejects is noted,
    too, so that it is not tried at each start.

    Raises:
        OSError, MemoryError: there was no room for it.
        Exception: what compiles it was killed, so nothing is known of the kernel.
    """
    if described is None:
        compile_driver()
        return
    spec, compiled = KernelSpec(*described), Compiled()
    name, folder = compiled.digest(spec), ""
    if name not in compiled:
        try:
            folder = compile_spec(spec, launcher=launcher)
        except (OSError, MemoryError):
            raise
        except Exception as failed:
            if was_killed(failed):
                raise
            folder = ""
        compiled.add(name, [folder] if folder else [])


def processes() -> int:
    """How many would compile on this host; 0: too few to gain by it."""
    count = min(available_cores(), available_host_memory() // _MEMORY, _MOST)
    return count if count >= _FEWEST else 0


class Ahead:
    """A rank's end: the process that has its kernels compiled. Made before the rank touches a GPU.

    Attributes:
        missing: kernels that were found and not compiled yet so far; ``None``: so far none was looked for.

    Raises:
        OSError: the system has no room for a process.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            self._socket.close()
            theirs.close()
            raise
        if not self._pid:
            self._socket.close()
            live(parent, lambda: _serve(theirs))
        theirs.close()
        self.missing: int | None = None
        self._done = False

    def begin(self, config: EngineConfig, group: TPGroup, ranks: int) -> None:
        """Have the kernels of an engine compiled, for as many ranks from this one on; returns at once."""
        order = Order.of(config, group, range(group.rank, group.rank + ranks))
        told = {"config": order.config.to_dict(), "rest": order[1:]}
        with suppress(OSError):  # it has ended: then there is nothing to wait for
            self._socket.send(json.dumps(told, default=str).encode())

    def wait(self, told: Callable[[str], object] = lambda text: None) -> None:
        """Wait until all that was missing is compiled, or for ``_SILENCE`` and ``_LONGEST`` at most: then nothing more
        is compiled ahead. Where the first kernels were there, so were most others mostly: then they are not waited for.

        Args:
            told: where it takes over a second, called with how many there are, again when more are found.
        """
        started, said = time.monotonic(), 0
        heard = started
        while not self._done:
            now = time.monotonic()
            left = min(heard + _SILENCE, started + _LONGEST) - now
            if left <= 0:
                os.kill(self._pid, signal.SIGKILL)
                told("compiling kernels as they are met")
                break
            if select.select([self._socket], [], [], min(left, _SAY / 4) if self.missing != 0 else 0)[0]:
                self._hear()
                heard = now
            elif self.missing == 0:
                break
            if self.missing and self.missing > said and now - started > _SAY:
                said = self.missing
                told(f"compiling {self.missing} kernels")
        # It may still look through the others: nobody waits for that.
        threading.Thread(target=self._bury, daemon=True, name="tpctl-ahead").start()

    def _bury(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _hear(self) -> None:
        message = b""
        with suppress(OSError):
            message = self._socket.recv(MOST_BYTES)
        if not message:
            self._done = True
        elif message != _ALIVE:
            self.missing = int(message)


class _Teller:
    """Tells the rank that something goes on, and how many kernels were missing so far."""

    def __init__(self, rank: socket.socket) -> None:
        self._rank = rank
        self.missing = 0

    def count(self) -> None:
        self._send(str(self.missing).encode())

    def alive(self) -> None:
        self._send(_ALIVE)

    def _send(self, message: bytes) -> None:
        with suppress(BlockingIOError):  # it has much to read already, while it loads
            self._rank.send(message, socket.MSG_DONTWAIT)


def _serve(rank: socket.socket) -> None:
    """Tell ``rank`` how many kernels were missing, first when its first step is known; end when they are compiled."""
    message = rank.recv(MOST_BYTES)
    if not message:
        return
    os.nice(_NICE)
    told = json.loads(message)
    ranks, facts, peers = told["rest"]
    config = EngineConfig.from_dict(told["config"])
    order = Order(config, ranks, DeviceFacts(tuple(facts[0]), *facts[1:]), peers)
    compiled = Compiled()
    if (whole := order.digest) in compiled:
        return
    tell = _Teller(rank)
    with (compiled.folder / "lock").open("w") as lock:
        _take(lock, compiled, tell.alive)
        if whole in compiled:
            return
        names, failed = compile_all(order, tell)
    if not failed:
        compiled.add(whole, names)


def _take(lock: TextIO, compiled: Compiled, alive: Callable[[], None]) -> None:
    """Wait until no other engine compiles; each kernel that it has compiled is a sign that it lives."""
    known = len(compiled)
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOOK)
        if (now := len(compiled)) > known:
            known = now
            alive()


def compile_all(
    order: Order, tell: _Teller, compile: Callable[..., object] = compile_one, most: int | None = None
) -> tuple[list[str], int]:
    """Compile what is missing; the names of all kernels' notes, and how many failed to.

    Args:
        tell: of how many are missing, first when ``_FIRST`` were looked at or one is compiled.
        most: processes that compile.
    """
    compiled = Compiled()
    names: list[str] = []
    pool = Pool(compile, most or processes() or 1, tell.count)
    for spec, launcher in rehearse(order):
        names.append(compiled.digest(spec))
        if names[-1] not in compiled:
            tell.missing += 1
            if tell.missing == 1:
                pool.put(None)
            pool.put(astuple(spec), launcher)
        if len(names) % _FIRST == 0:
            tell.count()
    tell.count()
    return names, pool.join()
