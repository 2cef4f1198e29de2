"""How requests reach every rank at the same step.

Only rank 0 hears the command line. At the start of each step it says to every other rank which messages arrived since
the last one: a frame on a TCP connection, usually empty. Nothing is waited for but that frame, and rank 0 waits for no
rank (for requests it may, ``engine.launch_time``), so the feed works the same within a host and between hosts and costs
a few microseconds a step.

Within a host the agent ends all ranks when one has ended. Between hosts nobody else sees it, and a collective may wait
for minutes, so each end also watches whether the other's host still holds the connection (``engine.lost_hosts``).
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

from tpctl.distributed import TPGroup
from tpctl.engine.guiding.gate import Gate
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.lost_hosts import Peer, leave_after, own_peer, watch
from tpctl.wire.channel import Channel, ChannelClosed
from tpctl.wire.messages import Message, Stop, from_wire, to_wire

ARRIVAL = 0.5e-3
"""Seconds by which a step that takes in requests is launched earlier: what the host does for them comes on top."""

_JOIN_TIMEOUT = 60.0  # seconds for the other ranks to connect
_HELLO_TIMEOUT = 5.0  # seconds for a connection to name the secret


class Leader:
    """Rank 0's end: messages from the command line, passed on to the followers step by step."""

    def __init__(self, group: TPGroup, channel: Channel, guides: Guides) -> None:
        self._channel = channel
        self._gate = Gate(guides, lambda message, text: self._inbox.put((message, text)), channel.send)
        self._inbox: queue.SimpleQueue[tuple[Message, bytes]] = queue.SimpleQueue()  # each beside its JSON
        self._ending = threading.Event()
        guides.may_leave_out(self._tell)
        self._followers: list[Channel] = []
        for connection, follower, peer in _accept_followers(group):
            self._followers.append(follower)
            watch(connection, peer, self._ending)
        threading.Thread(target=self._listen, daemon=True, name="tpctl-listen").start()

    def next(self, wait: bool, patience: float = 0.0) -> list[Message]:
        """The messages that this step applies: with ``wait`` at least one, else what comes within ``patience`` seconds,
        all of it: who comes in a burst should not wait for the prompts of those before. Once there is something, that
        is ``ARRIVAL`` less. Stop ends both."""
        arrived = [self._inbox.get()] if wait else []
        deadline = time.monotonic() + patience
        while not (arrived and isinstance(arrived[-1][0], Stop)):
            left = 0.0 if wait else deadline - time.monotonic() - (ARRIVAL if arrived else 0.0)
            try:
                arrived.append(self._inbox.get(block=left > 0, timeout=max(left, 0.0) or None))
            except queue.Empty:
                break
        if arrived and isinstance(arrived[-1][0], Stop):
            self._ending.set()
        if self._followers:
            data = b"[" + b",".join(text for _, text in arrived) + b"]"
            for follower in self._followers:
                follower.send_json(data)
        return [message for message, _ in arrived]

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def _tell(self, message: Message) -> None:
        """Of this process to all ranks, this one among them. Any thread."""
        self._inbox.put((message, json.dumps(to_wire(message)).encode()))

    def _listen(self) -> None:
        try:
            while True:
                text = self._channel.receive_json()
                self._gate.take(from_wire(json.loads(text)), text)
        finally:
            # Nobody is left to work for, or what they say makes no sense; a collective may hang, so do not unwind.
            os._exit(1)


class Follower:
    """Every other rank's end."""

    def __init__(self, group: TPGroup) -> None:
        self._ending = threading.Event()
        connection, self._peer = _connect_to_leader(group)
        self._leader = Channel(connection)
        watch(connection, self._peer, self._ending)

    def next(self, wait: bool, patience: float = 0.0) -> list[Message]:
        """The messages that rank 0 applies at the same step. Rank 0 decides whether to wait, and how long."""
        try:
            frame = self._leader.receive_json()
        except ChannelClosed:
            leave_after(self._peer)  # rank 0 is gone
        messages = [from_wire(wire) for wire in json.loads(frame)]
        if any(isinstance(message, Stop) for message in messages):
            self._ending.set()
        return messages

    def send(self, message: Message) -> None:
        """Followers compute the same outputs as rank 0, which alone reports them."""


def _accept_followers(group: TPGroup) -> list[tuple[socket.socket, Channel, Peer]]:
    """Listen, tell the group where and with which secret, and wait for every other rank, which says who it is."""
    if group.size == 1:
        return []
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1" if _is_local(host) else "", 0)) as server:
        server.settimeout(_JOIN_TIMEOUT)
        address = "127.0.0.1" if _is_local(host) else host
        group.broadcast_text(json.dumps([address, server.getsockname()[1], token, asdict(own_peer(group.rank))]))
        followers: list[tuple[socket.socket, Channel, Peer]] = []
        while len(followers) < group.size - 1:
            connection, _ = server.accept()
            connection.settimeout(_HELLO_TIMEOUT)
            if secrets.compare_digest(_hello(connection, len(token)), token.encode()):
                channel = Channel(connection)
                peer = Peer(**json.loads(channel.receive_json()))
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                followers.append((connection, channel, peer))
            else:
                connection.close()
    return followers


def _hello(connection: socket.socket, length: int) -> bytes:
    """What a new connection says first; nothing if it is a stranger that says nothing."""
    try:
        return connection.recv(length, socket.MSG_WAITALL)
    except OSError:
        return b""


def _connect_to_leader(group: TPGroup) -> tuple[socket.socket, Peer]:
    where: list[Any] = json.loads(group.broadcast_text(""))
    address, port, token, leader = where
    connection = socket.create_connection((address, port), timeout=_JOIN_TIMEOUT)
    connection.sendall(token.encode())
    Channel(connection).send_json(json.dumps(asdict(own_peer(group.rank))).encode())
    connection.settimeout(None)
    return connection, Peer(**leader)


def _is_local(host: str) -> bool:
    """Whether all ranks are on this host; ``torchrun --standalone`` names the machine itself."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == int(os.environ.get("WORLD_SIZE", "1")) or host in (
        "localhost",
        "127.0.0.1",
    )
