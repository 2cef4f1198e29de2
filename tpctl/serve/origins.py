"""Which web pages may use the server.

A browser says where a page is from (``Origin``, RFC 6454), and lets it read an answer only if that allows it
(https://fetch.spec.whatwg.org/#http-cors-protocol). What a page asks for is computed all the same: any site that is
visited could keep a server on the visitor's own machine at work. So requests of pages are refused unless they are the
server's own or allowed by name. Programs that are no browsers send no ``Origin``.

A page is the server's own where its origin is what the request calls the server (``Host``). But a site may have its
name lead to its visitor's own machine once its page is loaded (DNS rebinding), which is then of the same origin. So
that name must be one that no stranger can have: an address, ``localhost``, this machine's name, or one that was given.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection

from starlette.types import Scope

from tpctl.errors import UsageError, printable, shown
from tpctl.serve.errors import ApiError
from tpctl.serve.headers import header

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", re.IGNORECASE)

Headers = list[tuple[bytes, bytes]]


def check_origin(origin: str) -> str:
    """As a browser sends it. Raises ``UsageError``: it is none."""
    if origin not in (ANY, "null") and not (origin.isascii() and _ORIGIN.fullmatch(origin)):
        raise UsageError(
            f"--allowed-origin {shown(origin)} is none; give scheme and host, with the port if there is one, like "
            "https://chat.example or http://localhost:3000, or * for all"
        )
    return origin.lower()


class Origins:
    """Those that are allowed besides the server's own page; ``ANY``: all.

    ``host``: what the server was told to listen at.
    """

    def __init__(self, allowed: Collection[str] = (), host: str = "") -> None:
        self._allowed = frozenset(allowed)
        machine = socket.gethostname().lower()
        short = machine.partition(".")[0]
        given = {_name(one.partition("://")[2]) for one in allowed}
        self._names = {host.lower(), machine, short, f"{short}.local", *given} - {"", ".local"}

    def headers(self, scope: Scope) -> Headers:
        """What an answer says to the browser that asks. Raises ``ApiError``: the page is not allowed."""
        origin, host = header(scope, b"origin"), (header(scope, b"host") or b"").decode("latin-1").lower()
        if origin is None:
            # A page's GET to its own server has none; over HTTPS, and to localhost, it has this.
            if header(scope, b"sec-fetch-site") == b"same-origin":
                self._check_host(host, f"https://{host}")
            return []
        said = origin.decode("latin-1").lower()
        if host and said.partition("://")[2] == host:
            self._check_host(host, said)
            return []
        if ANY not in self._allowed and said not in self._allowed:
            raise ApiError(
                403,
                f"pages of {shown(said)} may not use this server; start it with --allowed-origin {said[:200]}"
                if _ORIGIN.fullmatch(said) or said == "null"
                else f"{shown(said)} is no origin that may use this server (--allowed-origin)",
                code="origin_not_allowed",
            )
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]

    def _check_host(self, host: str, origin: str) -> None:
        """Raise ``ApiError`` if a page at ``origin`` may be a stranger's, though it has come from this server."""
        name = _name(host)
        if ANY in self._allowed or name in self._names or name == "localhost" or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                f"{shown(host)} may be anybody's name for this server, so pages may not use it there; open it by its "
                f"address or as localhost, or start it with --allowed-origin {printable(origin[:200])}",
                code="origin_not_allowed",
            ) from None

    def before(self, scope: Scope) -> Headers | None:
        """What is answered to the question that a browser asks before a request (a preflight); ``None``: it is none.

        Raises:
            ApiError: the page is not allowed.
        """
        if scope["method"] != "OPTIONS" or header(scope, b"access-control-request-method") is None:
            return None
        found = self.headers(scope)
        if found:
            asked = header(scope, b"access-control-request-headers")
            found += [
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-max-age", b"600"),
                *([] if asked is None else [(b"access-control-allow-headers", asked)]),
            ]
        return found


def _name(host: str) -> str:
    """A host without its port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")
