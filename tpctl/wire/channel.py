"""Length-framed JSON over a stream socket: four bytes of length, big-endian, then UTF-8."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading

from tpctl.wire.messages import Message, from_wire, to_wire

_LENGTH = struct.Struct(">I")
_AHEAD = 1 << 16  # bytes that are read at least, if there are as many: several messages, where they come fast


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a connection. Any thread may send; one thread at a time may receive.

    It reads ahead, so that of a socket no more than one may receive.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = bytearray()  # what has come of messages that were not asked for yet
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            ChannelClosed: the other side is gone.
        """
        self.send_json(json.dumps(to_wire(message), separators=(",", ":")).encode())

    def send_json(self, data: bytes) -> None:
        """Send JSON that is made already. Raises as ``send``."""
        try:
            with self._send_lock:
                self._sock.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self) -> Message:
        """Wait for one message.

        Raises:
            ChannelClosed: the other side is gone.
        """
        return from_wire(json.loads(self.receive_json()))

    def receive_json(self) -> bytes:
        """Wait for what one ``send`` or ``send_json`` sent, and leave it as it came. Raises as ``receive``."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def close(self) -> None:
        # shutdown wakes a thread that is blocked in receive; close alone does not.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, size: int) -> bytes:
        while (missing := size - len(self._ahead)) > 0:
            try:
                part = self._sock.recv(min(max(missing, _AHEAD), 1 << 20))
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not part:
                raise ChannelClosed("end of stream")
            self._ahead += part
        data = bytes(self._ahead[:size])
        del self._ahead[:size]
        return data
