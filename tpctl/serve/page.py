"""The page at ``/``: one HTML file that talks to the endpoints beside it, and to nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.types import Receive, Scope, Send

from tpctl.serve.answered import say


class Page:
    """``page.html``. Its own style and script are the only ones that a browser obeys, by their digests, and its own
    server the only one that it may speak to: whatever an answer holds stays text."""

    def __init__(self) -> None:
        self._body = files("tpctl.serve").joinpath("page.html").read_bytes()
        rules = {
            "default-src": "'none'",
            "style-src": _digest(self._body, b"style"),
            "script-src": _digest(self._body, b"script"),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self._headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-security-policy", "; ".join(f"{name} {value}" for name, value in rules.items()).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await say(200, self._headers, self._body, send)


def _digest(page: bytes, tag: bytes) -> str:
    """Of what stands in the one element ``tag``, as a source of Content-Security-Policy (CSP 3, 2.3.1)."""
    (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
