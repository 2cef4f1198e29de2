"""Frames arrive whole and in order, from several threads and in any cutting; an end is noticed."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tpctl.wire.channel import Channel, ChannelClosed
from tpctl.wire.messages import Abort, Fatal, Stop


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def test_large_and_small_frames_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    one, other = Channel(sockets[0]), Channel(sockets[1])
    large = Fatal("é" * 3_000_000)
    sender = threading.Thread(target=lambda: [one.send(message) for message in (Stop(), large, Abort(["a"]))])
    sender.start()
    assert [other.receive() for _ in range(3)] == [Stop(), large, Abort(["a"])]
    sender.join()


def test_a_frame_that_comes_byte_by_byte(sockets: tuple[socket.socket, socket.socket]) -> None:
    data = b'["Abort",{"ids":["x"]}]'

    def trickle() -> None:
        for byte in struct.pack(">I", len(data)) + data:
            sockets[0].sendall(bytes([byte]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert Channel(sockets[1]).receive() == Abort(["x"])
    sender.join()


def test_what_came_together_is_received_one_by_one(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Also behind the end of the connection."""
    one, other = Channel(sockets[0]), Channel(sockets[1])
    messages = [Abort([str(number)]) for number in range(100)]
    for message in messages:
        one.send(message)
    sockets[0].close()
    assert [other.receive() for _ in messages] == messages
    with pytest.raises(ChannelClosed, match="end of stream"):
        other.receive()


def test_threads_do_not_mix_their_frames(sockets: tuple[socket.socket, socket.socket]) -> None:
    one, other = Channel(sockets[0]), Channel(sockets[1])
    texts = [str(n) * 50_000 for n in range(8)]
    threads = [threading.Thread(target=one.send, args=(Abort([text]),)) for text in texts]
    for thread in threads:
        thread.start()
    received = [other.receive() for _ in texts]
    assert sorted(message.ids[0] for message in received if isinstance(message, Abort)) == sorted(texts)
    for thread in threads:
        thread.join()


def test_the_other_side_hangs_up_in_the_middle(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[0].sendall(struct.pack(">I", 100) + b"half")
    sockets[0].close()
    with pytest.raises(ChannelClosed, match="end of stream"):
        Channel(sockets[1]).receive()


def test_sending_to_nobody(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()
    with pytest.raises(ChannelClosed):
        Channel(sockets[0]).send(Stop())


def test_close_wakes_a_thread_that_waits(sockets: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(sockets[0])
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(ChannelClosed):
            channel.receive()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    channel.close()
    assert ended.wait(30)
    thread.join()
