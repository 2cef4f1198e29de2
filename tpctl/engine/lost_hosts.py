"""A rank's end is seen on other hosts: by the connection of the feed, which its system closes with the process.

A host that is gone itself, or cannot be reached, closes nothing; the system's own probes find out (tcp(7)).
"""

from __future__ import annotations

import os
import select
import socket
import threading
from dataclasses import dataclass

from tpctl.launch.failure import write_error_file

_IDLE, _INTERVAL, _PROBES = 5, 5, 3  # seconds without a word, seconds between probes, and how many go unanswered
_UNACKNOWLEDGED = 20_000  # milliseconds that sent data may wait for an answer (TCP_USER_TIMEOUT)
_GRACE = 0.5  # seconds for a Stop that lies unread beside the end of the connection


@dataclass(frozen=True)
class Peer:
    """A rank as others name it. ``node``: of which agent's ranks it is, which is the host's number."""

    rank: int
    node: int
    host: str


def own_peer(rank: int) -> Peer:
    return Peer(rank, int(os.environ.get("GROUP_RANK", "0")), socket.gethostname())


def watch(connection: socket.socket, peer: Peer, ending: threading.Event) -> None:
    """End this process once ``peer``, a rank of another host, is gone, unless all are ``ending``. Ranks of this host
    are the agent's to watch."""
    if peer.node == own_peer(0).node:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _IDLE),
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", _UNACKNOWLEDGED),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    threading.Thread(target=_await_end, args=(connection, peer, ending), daemon=True, name="tpctl-peer").start()


def leave_after(peer: Peer) -> None:
    """End this process because ``peer`` is gone; its agent finds the reason. A collective may hang, so nothing is
    unwound."""
    if peer.node != own_peer(0).node:
        who = "the first host" if peer.rank == 0 else f"rank {peer.rank}"
        write_error_file(f"EngineError: {who} ({peer.host}) is gone; what happened is said there", os.environ)
    os._exit(1)


def _await_end(connection: socket.socket, peer: Peer, ending: threading.Event) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)  # and POLLHUP, POLLERR; what was sent is left for who reads
    while not poll.poll(1000):
        if ending.is_set():
            return
    if not ending.wait(_GRACE if peer.rank == 0 else 0.0):
        leave_after(peer)
