"""JSON files that come with a model, read with limits: no file can take the memory, the stack, or two meanings.

What json (RFC 8259, with Python's ``NaN`` and ``Infinity``, which transformers writes) leaves open is settled here: a
byte order mark is skipped, a key that occurs twice must say the same thing twice.
"""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

from tpctl.errors import CheckpointError, shown

MOST_BYTES = 32 << 20
"""Longest file. The index of a model with 200,000 tensors has 20 MB; parsed, a file can take 25 times its length."""

MOST_DEPTH = 64
"""Deepest nesting. What is deeper parses, but ends Python's stack where it is written or walked through."""

MOST_DIGITS = 400
"""Longest whole number. The largest in use, a tokenizer's "no limit" of 10^30, has 31."""


def read_object(path: Path, *, default: dict[str, Any] | None = None, where: str | None = None) -> dict[str, Any]:
    """The JSON object in ``path``; ``default``, if there is one, where no such file is.

    Args:
        where: what messages call the file, if not ``path``.

    Raises:
        CheckpointError: the file is missing, too large, no JSON, or no object; the message names it and the reason.
    """
    try:
        raw = read_bytes(path, where=where)
    except FileNotFoundError:
        if default is not None:
            return default
        raise CheckpointError(f"{where or path} does not exist") from None
    return parse_object(raw, where or str(path))


def broken(path: Path) -> str | None:
    """What is wrong with ``path`` where something is there that is no file, as a message says it behind its name.

    ``None`` where a regular file is, or nothing at all.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        try:
            target = path.readlink()
        except OSError:
            return None
        return f"is a link to {target}, which is not there; put the file there, or a copy of it in the link's place"
    except OSError as error:
        loop = error.errno == errno.ELOOP
        return "is a link that leads back to itself" if loop else f"cannot be read: {error.strerror}"
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "device")
    return None if stat.S_ISREG(mode) else f"is a {kind}, but must be a regular file"


def is_file(path: Path, where: str | None = None) -> bool:
    """Whether ``path``, which messages call ``where``, is a file; ``False`` only where nothing is.

    Raises:
        CheckpointError: something else is there.
    """
    if (said := broken(path)) is not None:
        raise CheckpointError(f"{where or path} {said}")
    return path.exists()


def read_bytes(path: Path, most: int = MOST_BYTES, *, where: str | None = None) -> bytes:
    """The bytes of a small regular file.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is larger than ``most``, something else than a file (a pipe would be waited for), or cannot
            be read.
    """
    if not is_file(path, where):
        raise FileNotFoundError(path)
    try:
        status = path.stat()
        if status.st_size > most:
            raise CheckpointError(f"{where or path} has {status.st_size} bytes, but such a file has at most {most}")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise CheckpointError(f"{where or path} cannot be read: {error.strerror}") from None


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that ``raw`` is; ``where`` names it in messages. Errors as ``read_object``."""
    value = parse(raw, where)
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise CheckpointError(f"{where} holds {kind}, but a JSON object is needed")
    return value


def parse(raw: bytes, where: str) -> Any:
    """The value that ``raw``, JSON in UTF-8, stands for. Errors as ``read_object``."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=one_meaning, parse_int=_whole)
        _check_depth(value)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CheckpointError(
            f"{where} is not UTF-8 text (byte {error.start} is {byte:#04x}); download it again"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; correct it, or download it again") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested more than {MOST_DEPTH} levels deep; download it again") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid: {error}; correct it, or download it again") from None
    return value


class TwoMeanings(ValueError):
    """A key of a JSON object occurs twice, and does not say the same thing twice."""


def one_meaning(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``, for ``json.loads`` (``object_pairs_hook``).

    Raises:
        TwoMeanings: it has two.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if value != found[key] and not (value != value and found[key] != found[key]):
                raise TwoMeanings(f"{shown(key)} occurs twice, as {shown(value)} and as {shown(found[key])}")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than {MOST_DIGITS}")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Raise RecursionError beyond ``MOST_DEPTH``, and ValueError for half a surrogate pair, which is no text."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise RecursionError
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text holds {text[error.start]!r}, half of a surrogate pair") from None
