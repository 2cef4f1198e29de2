"""What was said in chats before, kept in a file for the arrow keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from prompt_toolkit.history import FileHistory

MOST = 1000
"""Messages that are offered. The file may grow to twice as many before the older ones go."""


class ChatHistory(FileHistory):
    """prompt_toolkit's file of messages, of any number of lines each; bounded, and only for its owner to read.

    A chat goes on where the file cannot be read or written.

    Args:
        readline: a file that readline kept for earlier versions, one line a message; read where ``file`` is new.
    """

    def __init__(self, file: Path, readline: Path | None = None) -> None:
        super().__init__(str(file))
        self._file = file
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                self._bound()
            else:
                if readline is not None and readline.is_file():
                    lines = readline.read_text(encoding="utf-8", errors="replace").splitlines()
                    self._append([line for line in lines if line.strip()][-MOST:])

    def load_history_strings(self) -> Iterable[str]:
        """Newest first."""
        with suppress(OSError):
            yield from islice(super().load_history_strings(), MOST)

    def store_string(self, string: str) -> None:
        self._append([string])

    def _append(self, messages: list[str]) -> None:
        for message in messages:
            with suppress(OSError):
                super().store_string(message.encode(errors="replace").decode())  # half a surrogate pair has no bytes

    def _bound(self) -> None:
        kept = list(super().load_history_strings())
        if len(kept) <= 2 * MOST:
            return
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        shorter = ChatHistory(fresh)
        shorter._append(kept[MOST - 1 :: -1])
        fresh.replace(self._file)
