"""The process in which grammars are tried: ``python -m tpctl.client.grammar_worker``.

What a request asks for is compiled by llguidance, whose limits do not bound all of it: an ``allOf`` of 20 patterns in a
JSON schema takes 2 s and 240 MB until it is refused, with each pattern more nearly twice as much, and no thread can be
told to stop. So that runs here, where the system ends it: after ``SECONDS``, and beyond ``MEMORY`` bytes.

Requests and answers are JSON objects, each behind its length in four bytes; see ``answer``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpctl.client.deep_threads import deep_thread, said
from tpctl.client.grammar_text import grammar_text, parser_limits
from tpctl.client.schema_words import named, unenforced
from tpctl.client.template_worker import NO_MEMORY, frame, limit_memory, receive, tied
from tpctl.errors import RequestError
from tpctl.wire.guide import Guide

SECONDS = 2.0
"""Of the processor's time, for one grammar: of those that are as long as may be, none that was meant takes 0.15."""

MEMORY = 512 << 20

_WORN = 64 << 20  # bytes beyond what a fresh process has, at which another one takes its place


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a grammar is taken: ``problem``, why not, or ``None``; or ``refused``, as an error says it.

    Args:
        request: the fields of a ``Guide``.
    """
    try:
        from llguidance import LLMatcher

        guide = Guide(**request)
        if (problem := _unenforced(guide)) is not None:
            return {"problem": problem}
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar_text(guide), limits=parser_limits())
        return {"problem": said(messages[0] if guide.kind == "regex" else named(messages[0])) if failed else None}
    except RequestError as error:
        return {"refused": str(error)}
    except MemoryError:
        os._exit(NO_MEMORY)
    except BaseException as error:  # a panic of the library is no Exception
        return {"problem": said(f"{type(error).__name__}: {error}")}


def _unenforced(guide: Guide) -> str | None:
    """What of a strict schema would not be held to."""
    if guide.kind != "json" or guide.lenient:
        return None
    try:
        return unenforced(json.loads(guide.text))
    except RecursionError:
        return None  # llguidance says how deep it may be


def main() -> None:
    """Answer requests until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    try:
        deep_thread(_serve, "tpctl-grammar").join()
    except RequestError as error:
        refused = frame({"refused": str(error)})
        while receive(sys.stdin.buffer) is not None:
            os.write(1, refused)


def _serve() -> None:
    import llguidance  # noqa: F401

    limit_memory(MEMORY)
    fresh = _resident()
    while (request := receive(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with tied():
            found = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        data = memoryview(frame({**found, "worn": _resident() > fresh + _WORN}))
        while data:
            data = data[os.write(1, data) :]


def _resident() -> int:
    """Bytes; 0 where there is no Linux."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    main()
