"""Asking the Hub again, where its answer says that it fails for a moment only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tpctl.checkpoint.hub_errors import retry_after

T = TypeVar("T")

ATTEMPTS = 5
"""How often in a row a request may fail before its error is final."""

FILE_SECONDS = 30.0
"""For how long a file that is fetched in one piece is asked for again."""


def patiently(call: Callable[[], T], seconds: float) -> T:
    """The result of ``call``, made again after 429 with a Retry-After, or a failure of the server (500 and above).

    It raises its last error once ``ATTEMPTS`` have failed or the next one would begin later than ``seconds`` from now.
    """
    deadline = time.monotonic() + seconds
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            pause = _pause(error, attempt)
            if pause is None or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
    return call()


def _pause(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; ``None``: another would not help."""
    response = getattr(error, "response", None)
    if response is None:  # huggingface_hub wraps the answer in errors of its own
        return _pause(error.__cause__, attempt) if error.__cause__ is not None else None
    asked = retry_after(response.headers)
    if response.status_code == 429:
        return None if asked is None else max(float(asked), 0.5)
    if response.status_code >= 500:
        return 0.5 * 2**attempt if asked is None else max(float(asked), 0.5)
    return None
