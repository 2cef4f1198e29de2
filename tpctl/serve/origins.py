"""Which web pages may use the server.

A browser says where a page is from (``Origin``, RFC 6454), and lets it read an answer only if that allows it
(https://fetch.spec.whatwg.org/#http-cors-protocol). What a page asks for is computed all the same: any site that is
visited could keep a server on the visitor's own machine at work. So requests of pages are refused unless they are the
server's own or allowed by name. Programs that are no browsers send no ``Origin``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import Scope

from tpctl.errors import UsageError, shown
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
    """Those that are allowed besides the server's own page; ``ANY``: all."""

    def __init__(self, allowed: Collection[str] = ()) -> None:
        self._allowed = frozenset(allowed)

    def headers(self, scope: Scope) -> Headers:
        """What an answer says to the browser that asks. Raises ``ApiError``: the page is not allowed."""
        origin = header(scope, b"origin")
        if origin is None or origin.partition(b"://")[2] == (header(scope, b"host") or b""):
            return []
        said = origin.decode("latin-1").lower()
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
