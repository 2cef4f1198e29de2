"""The errors a user can cause or meet.

Every message is one line that says what is wrong, both numbers where two disagree, and what to do. The command
line prints the message and exits with the error's ``exit_code``; it never shows a traceback for these.
"""

from __future__ import annotations

import json

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_TURNS = {code: f"\\u{code:04x}" for code in (*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """``text`` as a terminal may be shown it, whoever wrote it: control characters, and those that turn the direction
    of writing, become escapes. Tabs and newlines stay."""
    return text.translate(_CONTROLS | _TURNS)


def shorten(text: str, width: int = 40) -> str:
    """What somebody gave, as a message may repeat it: ``width`` characters of ``text`` at most."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shown(value: object) -> str:
    """A value of some JSON, as a message may repeat it."""
    return shorten(json.dumps(value, ensure_ascii=False, default=repr))


class TpctlError(Exception):
    """Base of every error that is the world's fault, not the program's."""

    exit_code = 1


class UsageError(TpctlError):
    """The command line itself is wrong (an option's value, two options that exclude each other)."""

    exit_code = 2


class SourceError(TpctlError):
    """A model could not be found, reached or read."""


class CheckpointError(TpctlError):
    """A checkpoint's files contradict each other, its config, or the safetensors format."""


class UnsupportedModelError(TpctlError):
    """The config names an architecture, activation or RoPE kind that tpctl does not know."""


class PartitionError(TpctlError):
    """A tensor-parallel size that the model cannot be cut into."""


class ShardFolderError(TpctlError):
    """A shard folder is incomplete, altered, or made for another tensor-parallel size."""


class OutputError(TpctlError):
    """A result cannot be written: no space, no permission, or something in the way."""


class RequestError(TpctlError):
    """One request cannot be served (too long, bad sampling field); other requests go on."""


class EngineError(TpctlError):
    """The workers could not start, or one of them failed."""
