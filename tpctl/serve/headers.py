"""A request's headers, as a scope has them: names are in small letters, and may come several times."""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first one of that name."""
    return next((value for one, value in scope["headers"] if one == name), None)


def headers(scope: Scope, name: bytes) -> bytes:
    """All of that name, as one list (RFC 9110, 5.3)."""
    return b", ".join(value for one, value in scope["headers"] if one == name)
