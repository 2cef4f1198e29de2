"""Threads for llguidance, which follows rules that name each other in a long chain by recursion.

A chain may be as long as a text of ``wire.guide.MOST_CHARACTERS`` makes it: some thousands of rules, for each of which
a stack grows by kilobytes. An ordinary one has room for a thousand, and ends the process beyond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tpctl.errors import RequestError, shorten

_STACK = 1 << 30  # bytes of addresses; what is not used takes no memory
_lock = threading.Lock()


def deep_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """A thread, started, that may recurse as deeply as grammars make it.

    Raises:
        RequestError: the process may not have so many addresses more (``ulimit -v``).
    """
    with _lock:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
        except RuntimeError:
            raise RequestError(
                f"a grammar is followed by a thread with {_STACK >> 20} MiB of addresses, which this process may not "
                "have; raise its limit (ulimit -v)"
            ) from None
        finally:
            threading.stack_size(before)
    return thread


def said(message: str) -> str:
    """llguidance's words on one line."""
    return shorten(" ".join(message.split()), 300)
