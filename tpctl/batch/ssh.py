"""Replicas on the hosts of a file, each started by ``ssh``: OpenSSH, with keys or an agent, and nothing is installed.

A line of the file is a host as ssh takes it, and how many replicas run there:

    # eight GPUs each, --tp 2
    gpu01           slots=4
    user@gpu02      slots=4   # another account
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.batch.local import Death, Slot
from tpctl.batch.remote import Remote
from tpctl.children import python_environment
from tpctl.errors import SourceError, UsageError, shown

OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3")

MOST_SLOTS = 1024

_HOST = re.compile(r"(ssh://)?[A-Za-z0-9_][\w.@:\[\]%-]*", re.ASCII)  # no option of ssh's: none begins with -
_SLOTS = re.compile(r"(?:slots|replicas)=(\d{1,4})", re.ASCII)
_UNREACHED = 255  # ssh's own exit code (ssh(1)); 126 and 127 are the shell's, for a command that it cannot run
# What a replica there should hear of this process's environment. Nothing secret: other users see command lines.
_PASSED = re.compile(r"PYTHONPATH|OMP_NUM_THREADS|HF_(HOME|HUB_CACHE|HUB_OFFLINE|ENDPOINT|HUB_DISABLE_XET)|TPCTL_\w+")


@dataclass(frozen=True)
class Host:
    """``name``: as ssh takes it; ``slots``: replicas that run there."""

    name: str
    slots: int


def read_hosts(path: Path) -> list[Host]:
    """The hosts of a file.

    Raises:
        SourceError: it cannot be read.
        UsageError: it names no host, one twice, or a line is not understood.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SourceError(f"cannot read the hosts in {path}: {why}") from None
    found: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"line {number} of {path}"
        name, slots = words[0], 1
        if not _HOST.fullmatch(name):
            raise UsageError(f"{where}: {shown(name)} is no host's name; give one host a line, and slots=N after it")
        if name in found:
            raise UsageError(f"{where}: {name} is there twice; give one line for a host, with slots=N")
        for word in words[1:]:
            if (given := _SLOTS.fullmatch(word)) is None or not 1 <= int(given[1]) <= MOST_SLOTS:
                raise UsageError(
                    f"{where}: {shown(word)} is not understood; slots=N, from 1 to {MOST_SLOTS}, may stand there"
                )
            slots = int(given[1])
        found[name] = Host(name, slots)
    if not found:
        raise UsageError(f"{path} names no host; give one host a line, and slots=N after it")
    return list(found.values())


def passed_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment a replica on another host is given, too."""
    return {name: value for name, value in python_environment(env).items() if _PASSED.fullmatch(name)}


@dataclass
class SshSlot(Slot):
    """``share``: which of the host's replicas this is, from 1 on."""

    host: Host = field(default_factory=lambda: Host("", 1))
    share: int = 1


@dataclass
class Ssh(Remote):
    """A replica in each slot of each host. A host that never answered is given up at once, by one line."""

    noise: tuple[str, ...] = ("Connection to ",)
    program: Sequence[str] = ("ssh",)
    _heard: set[str] = field(default_factory=set, init=False)
    _given_up: dict[str, str] = field(default_factory=dict, init=False)  # why, by host

    def deaths(self, answered: dict[str, int]) -> list[Death]:
        hosts = {slot.name: self._of(slot).host.name for slot in self.slots}
        self._heard |= {host for name, host in hosts.items() if name in answered}
        before = set(self._given_up)
        told: set[str] = set()
        found = []
        for death in super().deaths(answered):
            host = hosts[death.name]
            if host in self._given_up:
                if host in before | told:
                    continue
                told.add(host)
            found.append(death)
        for slot in self.slots:
            if (why := self._given_up.get(self._of(slot).host.name)) is None:
                continue
            slot.reason = why  # also of those that are killed because another told it
            if not slot.given_up:
                slot.given_up = True
                if slot.process is not None:
                    self._kill(slot.process)
        return found

    def _judge(self, slot: Slot, code: int) -> tuple[str, bool, bool]:
        reason, fatal, hopeless = super()._judge(slot, code)
        host = self._of(slot).host.name
        if host not in self._heard and code in (_UNREACHED, 126, 127):
            what = "cannot be reached" if code == _UNREACHED else "cannot run tpctl"
            self._given_up[host] = f"{host} {what} ({reason})"
            return self._given_up[host], False, True
        return f"{reason} (on {host})", fatal, hopeless

    def _name(self, slot: Slot) -> str:
        host = re.sub(r"[^\w-]", "-", self._of(slot).host.name, flags=re.ASCII)[:40]
        return f"{host}-{super()._name(slot)}"

    def _argv(self, slot: Slot) -> list[str]:
        at = self._of(slot)
        replica = [sys.executable, "-m", "tpctl", "replica", str(self.root), "--name", slot.name, "--tied"]
        if at.host.slots > 1:
            replica += ["--share", f"{at.share}/{at.host.slots}"]
        variables = [f"{name}={value}" for name, value in sorted(passed_environment(os.environ).items())]
        options = [word for option in OPTIONS for word in ("-o", option)]
        # Whatever the login shell is; one that waits, since sshd tells of a process that a signal ended as of ssh's own
        # failures.
        script = f"env {shlex.join([*variables, *replica])}; exit $?"
        return [*self.program, *options, "-T", "--", at.host.name, f"exec /bin/sh -c {shlex.quote(script)}"]

    @staticmethod
    def _of(slot: Slot) -> SshSlot:
        assert isinstance(slot, SshSlot)
        return slot


def ssh_slots(hosts: Sequence[Host]) -> list[Slot]:
    """A slot for every replica, those of one host after another.

    Raises:
        UsageError: there is no ssh here.
    """
    if shutil.which("ssh") is None:
        raise UsageError("--hosts FILE needs ssh, which is not on the PATH; install OpenSSH's client")
    places = [(host, share) for host in hosts for share in range(1, host.slots + 1)]
    return [SshSlot(number, None, host=host, share=share) for number, (host, share) in enumerate(places)]
