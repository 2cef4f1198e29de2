"""Replicas on a Ray cluster: for each a placement group, and in it an actor that keeps the replica.

A group waits until the cluster has room for it, which an autoscaler may make; the replica of a node that is gone waits
for room again. All of it ends with the coordinator, since nothing is detached.
"""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any, cast

from tpctl.batch.local import ENGINE_FAILED, Death, Local, Slot, why_ended
from tpctl.batch.ray_cluster import answering, nodes
from tpctl.batch.ray_keeper import Keeper, show
from tpctl.client.disk import writing
from tpctl.errors import counted

_LOOK = 0.5  # seconds between looks at the placement groups
_SETTLED = 3.0  # seconds that groups wait before it is told
_END = 15.0  # seconds for Ray to end an actor


@dataclass(frozen=True)
class Room:
    """What a replica takes of a cluster.

    Attributes:
        resource: ``"GPU"`` or ``"CPU"``; one for each of its ``ranks``.
        most: that one node has now.
        replicas: that there is room for now, if nothing else runs.
        on_a_host: replicas that one node has room for.
    """

    ranks: int
    resource: str
    most: int
    replicas: int

    @property
    def gpus(self) -> int:
        return self.ranks if self.resource == "GPU" else 0

    @property
    def bundle(self) -> dict[str, float]:
        return {self.resource: float(self.ranks)}

    @property
    def on_a_host(self) -> int:
        return max(1, self.most // self.ranks)

    def __str__(self) -> str:
        return f"{{{self.resource}: {self.ranks}}}"


def room(ranks: int, device: str | None) -> Room:
    """What the cluster has for replicas of so many ranks: of GPUs, if a node has one or ``device`` says so."""
    gpus = device == "cuda" or (device is None and any(_each("GPU")))
    resource = "GPU" if gpus else "CPU"
    each = _each(resource)
    return Room(ranks, resource, max(each, default=0), sum(count // ranks for count in each))


def _each(resource: str) -> list[int]:
    """How many each node has."""
    return [int(node.get(resource, 0)) for node in nodes().values()]


class ActorProcess:
    """An actor and the replica that it keeps, as ``Local`` sees a process.

    Attributes:
        lost: its node is gone or cannot be reached, so that neither the replica nor its lines have done it.
        said: the last line of the replica.
    """

    def __init__(self, actor: Any, ended: Future[tuple[int, str]], node: str) -> None:
        self._actor = actor
        self._ended = ended
        self._node = node
        self._code: int | None = None
        self.lost = False
        self.said = ""

    def poll(self) -> int | None:
        if self._code is None and self._ended.done():
            error = self._ended.exception()
            if error is None:
                self._code, self.said = self._ended.result()
            else:
                self._fail(error)
            self.kill()  # the actor has nothing to do any more
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        wait([self._ended], _END if timeout is None else timeout)
        code = self.poll()
        if code is None and timeout is not None:
            raise subprocess.TimeoutExpired("replica", timeout)
        return ENGINE_FAILED if code is None else code

    def send_signal(self, number: int) -> None:
        """Only SIGTERM comes through."""
        if number == signal.SIGTERM:
            self._actor.end.remote()

    def kill(self) -> None:
        """End the actor, and the replica with it."""
        with suppress(Exception):  # it is gone, or the cluster is
            import ray

            ray.kill(self._actor)

    def _fail(self, error: BaseException) -> None:
        """The actor ended before its replica did."""
        text = " ".join(str(error).split())
        self.lost = type(error).__name__ == "ActorUnavailableError" or self._node not in nodes()
        self._code = ENGINE_FAILED
        if self.lost:
            self.said = "its node is gone"
        elif "No module named 'tpctl" in text:
            self._code, self.said = 1, "tpctl: tpctl is not installed on a node of the cluster; install it on all"
        else:
            detail = text.partition("Worker exit detail: ")[2] or text
            self.said = f"its actor ended: {detail[:200]}"


@dataclass
class RayReplicas(Local):
    """The replicas of a batch, one a slot, each where its placement group is.

    Attributes:
        room: what a replica takes.
    """

    room: Room = field(kw_only=True)
    _groups: dict[int, Any] = field(default_factory=dict, init=False)
    _placed: dict[int, str] = field(default_factory=dict, init=False)  # slots whose groups have a node, and its id
    _looked: float = field(default=float("-inf"), init=False)
    _waiting: tuple[int, float] = field(default=(0, 0.0), init=False)  # groups that wait, and since when so many do

    def __post_init__(self) -> None:
        """Raises ``OutputError`` if the folder cannot be written to."""
        with writing(self.root):
            show(self.root, self.token)

    @property
    def pending(self) -> str:
        """The replicas that wait for room, once they have for a while."""
        count, since = self._waiting
        if not count or time.monotonic() - since < _SETTLED:
            return ""
        groups = f"{counted(count, 'group')} pending: {self.room}" + (" each" if count > 1 else "")
        if self.room.most >= self.room.ranks:
            return groups
        resource = self.room.resource
        return f"{groups}, but no node has more than {counted(self.room.most, resource)}; waiting for one that has"

    def start_due(self) -> None:
        self._look()
        now = time.monotonic()
        for slot in self.slots:
            if slot.process is None and not slot.given_up and now >= slot.due and slot.number in self._placed:
                self._start(slot)

    def deaths(self, answered: dict[str, int]) -> list[Death]:
        before = {slot.name: (slot, slot.process, slot.deaths) for slot in self.slots if slot.process is not None}
        found = []
        for death in super().deaths(answered):
            slot, process, deaths = before[death.name]
            if lost := cast(ActorProcess, process).lost:
                slot.deaths, slot.given_up, slot.due = deaths, False, 0.0
                self._placed.pop(slot.number, None)
                self._looked = float("-inf")
                death = replace(death, again="starts again where there is room")
            if slot.given_up:
                self._remove(slot)
            found.append(replace(death, certain=True, blameless=lost))
        return found

    def kill(self) -> None:
        super().kill()
        for slot in self.slots:
            self._remove(slot)

    def _look(self) -> None:
        """See which replicas have a place."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        wanted = [slot for slot in self.slots if not slot.given_up]
        with answering():
            self._placed = self._place(wanted)
        count = len(wanted) - len(self._placed)
        if count != self._waiting[0]:
            self._waiting = (count, time.monotonic())
        if count:
            self.room = replace(self.room, most=max(_each(self.room.resource), default=0))

    def _place(self, slots: list[Slot]) -> dict[int, str]:
        """Ask for groups that are not there; the nodes of those that have one, by the slots' numbers."""
        import ray

        for slot in slots:
            if slot.number not in self._groups:
                self._groups[slot.number] = ray.util.placement_group(
                    [self.room.bundle], strategy="STRICT_PACK", name=f"tpctl-{self.token}-{slot.number}"
                )
        table = ray.util.placement_group_table()
        placed = {}
        for slot in slots:
            entry = table.get(self._groups[slot.number].id.hex(), {})
            if entry.get("state") == "CREATED":
                placed[slot.number] = entry["bundles_to_node_id"][0]
            elif entry.get("state") == "REMOVED":
                del self._groups[slot.number]  # by somebody else
        return placed

    def _remove(self, slot: Slot) -> None:
        import ray

        self._placed.pop(slot.number, None)
        if (group := self._groups.pop(slot.number, None)) is not None:
            with suppress(Exception):  # the cluster is gone
                ray.util.remove_placement_group(group)

    def _launch(self, slot: Slot, log: IO[bytes]) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        with answering():
            where = PlacementGroupSchedulingStrategy(self._groups[slot.number], 0)
            actor = (
                ray.remote(Keeper)
                .options(
                    num_gpus=self.room.gpus,
                    num_cpus=0 if self.room.gpus else self.room.ranks,
                    max_restarts=0,  # ``Local`` starts it again, after a while, and a few times
                    max_concurrency=2,
                    scheduling_strategy=where,
                )
                .remote()
            )
            run = actor.run.remote(str(self.root), slot.name, self.token, self.room.gpus, list(self.command[1:]))
        return ActorProcess(actor, run.future(), self._placed[slot.number])

    def _judge(self, slot: Slot, code: int) -> tuple[str, bool, bool]:
        """As of other hosts: what ends a replica on one of them ends no batch, others may do better."""
        process: Any = slot.process
        reason, fatal = why_ended(code, process.said)
        return reason, False, fatal
