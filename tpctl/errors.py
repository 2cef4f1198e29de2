"""The errors a user can cause or meet.

Every message is one line that says what is wrong, both numbers where two disagree, and what to do. The command
line prints the message and exits with the error's ``exit_code``; it never shows a traceback for these.
"""

from __future__ import annotations

import json
import re
from typing import TypeVar

E = TypeVar("E", bound=BaseException)

_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What a terminal obeys or hides instead of showing it: control characters, marks of direction, half characters."""


def printable(text: str) -> str:
    """``text`` as it can be printed wherever it comes from: nothing in it steers a terminal, and it is one line.

    What would is written as Python writes it (``\\x1b``).
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_printable(text: str) -> str:
    """``printable`` for a line of JSON, which stays the same JSON."""

    def escaped(match: re.Match[str]) -> str:
        units = match[0].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    return _STEERING.sub(escaped, text)


_WIDTH = 40
"""Characters of what somebody gave that a message repeats."""
_JSON = json.JSONEncoder(ensure_ascii=False, default=repr)


def shorten(text: str, width: int = _WIDTH) -> str:
    """What somebody gave, as a message may repeat it: ``width`` characters of ``text`` at most."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shown(value: object) -> str:
    """A value of some JSON, as a message may repeat it: of one with millions of parts the first few are looked at."""
    text = ""
    try:
        for piece in _JSON.iterencode(value):
            text += piece
            if len(text) > _WIDTH:
                break
        return shorten(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"a {type(value).__name__}"


def counted(number: int, what: str) -> str:
    """``1 file``, ``2 files``, ``1,000 files``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def format_bytes(count: float) -> str:
    """``count`` bytes in decimal units, as disks and the Hub state them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def again(error: E) -> E:
    """A new error that says what ``error`` does, without its traceback, which holds what the frames in it have.

    One that is kept and raised over and over would gather the frames of all who were told.
    """
    new = type(error).__new__(type(error), *error.args)
    new.__dict__.update(error.__dict__)
    return new


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


class MixedDtypesError(CheckpointError):
    """Tensors that are stored as one have several dtypes; a cast makes them equal."""


class OverflowedError(CheckpointError):
    """A value is beyond the range of the dtype that it is cast to."""


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


class TooLongError(RequestError):
    """A prompt has more tokens than leave room for an answer."""


class EngineError(TpctlError):
    """The workers could not start, or one of them failed."""


class EndpointError(TpctlError):
    """A server cannot be reached, refuses what it is asked, or answers with what is no answer."""


class BusyError(TpctlError):
    """What a request needs is in use by others for longer than is waited; another try may do better."""
