"""Where a server listens, and which of address and port is at fault where it cannot."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from tpctl.errors import UsageError
from tpctl.serve.sockets import listen, take


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = rf"^--host 127\.0\.0\.1 --port {port}: Address already in use; give another --port, or 0 for any$"
        with listen("127.0.0.1", port) as late:  # both prepare their models
            take(taken)
            with pytest.raises(UsageError, match=said):
                take(late)
        with pytest.raises(UsageError, match=said):
            listen("127.0.0.1", port)
    said = r"^--host 192\.0\.2\.1: Cannot assign requested address; give an address of this host, or 0\.0\.0\.0"
    with pytest.raises(UsageError, match=said):
        listen("192.0.2.1", 0)  # which is kept for documents, and is nobody's
    with pytest.raises(UsageError, match=r"^--host 127\.0\.0\.1:80: .*; give a name or an address of this host alone"):
        listen("127.0.0.1:80", 0)

    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UsageError, match=r"^--port 80: Permission denied; ports below 1024 are mostly root's"):
        listen("127.0.0.1", 80)
