"""A line for each request that was answered, as uvicorn writes one, and behind its status what an engine made for it,
and what the answer is called:

… 127.0.0.1:41234 - "POST /v1/completions HTTP/1.1" 200 1.234s prompt_tokens=12 completion_tokens=34 id=cmpl-…
"""

from __future__ import annotations

import time

from starlette.types import Scope

from tpctl.errors import printable, shorten
from tpctl.serve.work import Growing

_LONGEST = 500
"""Characters of a path."""


def line(scope: Scope, status: int, since: float, id: str, answer: Growing | None) -> str:
    """What is told of one request.

    Args:
        status: 499: its client hung up before it was told one.
        since: when it came, as of ``time.monotonic``.
        id: what it is called without an answer.
        answer: of an engine, if it came to that.
    """
    host, port = scope.get("client") or ("", 0)  # none of a Unix socket
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    path = shorten(printable((scope["raw_path"] + query).decode("latin-1")), _LONGEST)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seconds = time.monotonic() - since
    made = f"id={id}" if answer is None else answer.account
    asked = f"{scope['method']} {path} HTTP/{scope['http_version']}"
    return f'{now} {f"[{host}]" if ":" in host else host}:{port} - "{asked}" {status} {seconds:.3f}s {made}'
