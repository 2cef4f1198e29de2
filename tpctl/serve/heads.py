"""Heads of requests as HTTP has them, where h11 takes more, and uvicorn less."""

from __future__ import annotations

import re

import h11

_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)


def checked(request: h11.Request) -> h11.Request:
    """A request with a path for its target, and the host that it is for as ``Host``.

    Raises:
        h11.RemoteProtocolError: it does not say where its body ends, or which host it is for.
    """
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        # One who stands before this may go by the other, and what is a body there is a second request here.
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding; send one (RFC 9112, 6.1)")
    if (absolute := _ABSOLUTE.fullmatch(request.target)) is None:
        return request
    host, rest = absolute.groups()
    if b"@" in host or not host.partition(b":")[0]:
        raise h11.RemoteProtocolError("its target has no host, or a user's name before it (RFC 9110, 4.2)")
    return h11.Request(
        method=request.method,
        target=rest if rest.startswith(b"/") else b"/" + rest,
        headers=[(b"host", host), *((name, value) for name, value in request.headers if name != b"host")],
        http_version=request.http_version,
    )
