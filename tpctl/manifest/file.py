"""The manifest's bytes, which may come from anywhere: how many of them are read, and what may be in them."""

from __future__ import annotations

import json
from pathlib import Path
from stat import S_ISREG
from typing import Any

from tpctl.errors import ShardFolderError

MANIFEST = "tpctl.json"

LARGEST = 64 << 20
"""Bytes of a manifest: 170,000 tensors, such as a model of 126 layers has on 190 ranks."""

MOST_VALUES = 8_000_000
"""Brackets, commas and colons in it. Together with ``LARGEST`` this bounds what parsing takes: below 1 GB."""

_STRUCTURE = (b"{", b"[", b",", b":")


def read_manifest(folder: Path) -> bytes:
    """The manifest in ``folder``, if it is no larger than one can be.

    Raises:
        ShardFolderError: there is none, it cannot be read, or is none by its size.
    """
    path = folder / MANIFEST
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):  # reading a pipe would wait for ever
            raise ShardFolderError(f"{path} is a folder, a pipe or a device, not a manifest; shard the model again")
        if stat.st_size > LARGEST:
            raise ShardFolderError(
                f"{path} has {stat.st_size:,} bytes, but no manifest has more than {LARGEST:,}; shard the model again"
            )
        with path.open("rb") as file:
            raw = file.read(stat.st_size)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise ShardFolderError(f"there is no folder {folder}") from None
        raise ShardFolderError(
            f"{folder} has no {MANIFEST}; it is not a shard folder, make one with `tpctl shard`"
        ) from None
    except OSError as error:
        raise ShardFolderError(f"{path} cannot be read: {error.strerror}") from None
    if (values := sum(map(raw.count, _STRUCTURE))) > MOST_VALUES:
        raise ShardFolderError(
            f"{path} holds about {values:,} values, but no manifest more than {MOST_VALUES:,}; shard the model again"
        )
    return raw


def parse_manifest(raw: bytes, path: Path) -> tuple[str, Any]:
    """The text of ``raw`` and its JSON.

    Raises:
        ShardFolderError: it is no JSON in UTF-8.
    """
    try:
        text = raw.decode("utf-8")
        return text, json.loads(text)
    except RecursionError:
        raise ShardFolderError(f"{path} is damaged (it is nested too deeply); shard the model again") from None
    except ValueError as error:
        raise ShardFolderError(f"{path} is damaged ({error}); shard the model again") from None


def check_size(text: str) -> str:
    """``text``, a manifest that is to be written, if it can be read again.

    Raises:
        ShardFolderError: it is too large.
    """
    raw = text.encode()
    if len(raw) > LARGEST or sum(map(raw.count, _STRUCTURE)) > MOST_VALUES:
        raise ShardFolderError(
            f"the manifest would have {len(raw):,} bytes, more than the {LARGEST:,} that are read again; use a smaller "
            "--tp, or --ranks in several folders"
        )
    return text
