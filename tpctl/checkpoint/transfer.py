"""One large file over HTTP, continued where an earlier attempt stopped, in this process or in another.

huggingface_hub discards an unfinished file when its process ends; a 5 GB weight file deserves better. Bytes are
appended to a ``.partial`` file beside the target, which appears whole and with its SHA-256 checked, or not at all.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from tpctl.checkpoint.hub_errors import is_transport_error, retry_after
from tpctl.checkpoint.locks import exclusive
from tpctl.checkpoint.progress import Progress
from tpctl.errors import SourceError

ATTEMPTS = 5
"""How often in a row a transfer may fail without a single new byte."""

LONGEST_WAIT = 60
"""Seconds that a Hub that sees too many requests may ask us to wait; beyond it the user decides."""


class Meter:
    """Adds up the bytes of several transfers for one ``Progress``; once it is stopped, they end at their next block."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.stopped = total, 0, False
        self._progress = progress
        self._lock = threading.Lock()

    def stop(self) -> None:
        self.stopped = True

    def add(self, count: int, name: str) -> None:
        if self.stopped:
            raise InterruptedError("the download was stopped")
        with self._lock:
            self.done += count
            if self._progress is not None:
                self._progress(min(self.done, self.total), self.total, name)


@dataclass(frozen=True)
class Download:
    """A file to fetch: where from, where to, and what it must be."""

    url: str
    headers: dict[str, str]
    target: Path
    size: int
    sha256: str

    @property
    def partial(self) -> Path:
        # Named after its content too: in a folder that the user chose, another revision has the same file names.
        return self.target.with_name(f".{self.target.name}.{self.sha256[:12]}.partial")

    def foreign(self) -> list[Path]:
        """What unfinished downloads of other contents have left under this name."""
        pattern = re.compile(rf"\.{re.escape(self.target.name)}(\.[0-9a-f]{{12}})?\.partial")
        found = self.target.parent.glob(".*.partial")
        return [path for path in found if pattern.fullmatch(path.name) and path != self.partial]

    def received(self) -> int:
        """Bytes that earlier attempts have left, at most ``size``."""
        for path in (self.target, self.partial):
            if path.is_file():
                return min(path.stat().st_size, self.size)
        return 0

    def fetch(self, meter: Meter) -> None:
        """Fetch what is missing, check it and put it in place.

        Raises:
            SourceError: it arrived damaged.
            Exception: the HTTP library's, when the server refuses or the connection keeps failing; what has
                arrived stays for the next time.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.target.with_name(f".{self.target.name}.lock")):
            # A second process waits above until the first has checked and placed the file, and finds the work done.
            if self.target.exists():
                if _sha256(self.target) == self.sha256:
                    self.partial.unlink(missing_ok=True)
                    meter.add(self.size, self.target.name)
                    return
                self.target.unlink()  # of another revision, in a folder that the user chose
            for path in self.foreign():
                path.unlink(missing_ok=True)
            meter.add(self.received(), self.target.name)
            with self.partial.open("ab", buffering=0) as file:
                self._fill(file, meter)
            self._check()
            self.partial.rename(self.target)

    def _fill(self, file: FileIO, meter: Meter) -> None:
        failures = 0
        while (position := file.seek(0, 2)) < self.size:
            try:
                pause = self._receive(file, position, meter)
            except Exception as error:
                if file.seek(0, 2) > position:
                    failures = 0
                failures += 1
                status = getattr(getattr(error, "response", None), "status_code", 0)
                again = (is_transport_error(error) or status >= 500) and failures <= ATTEMPTS
                if meter.stopped or not again:
                    raise
                pause = min(2 ** (failures - 1), 8)
            else:
                # An answer that brings nothing new (429, an empty one, one from the start again) is a failure too.
                failures = 0 if file.seek(0, 2) > position else failures + 1
                if meter.stopped or failures > ATTEMPTS:
                    raise SourceError(
                        f"{self.target.name} does not arrive: {failures} answers in a row brought nothing new after "
                        f"{position} of {self.size} bytes; what has arrived is kept, run the command again later"
                    )
            time.sleep(pause)
        if file.seek(0, 2) > self.size:
            file.truncate(0)
            raise SourceError(f"{self.target.name} grew beyond its {self.size} bytes; run the command again")

    def _receive(self, file: FileIO, position: int, meter: Meter) -> int:
        """Append one answer's bytes; the seconds to wait before the next request."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        headers = {**self.headers, "Accept-Encoding": "identity"}
        if position:
            headers["Range"] = f"bytes={position}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.url, headers=headers, timeout=timeout) as response:
            if response.status_code == 429 and (wait := retry_after(response.headers)) is not None:
                if wait <= LONGEST_WAIT:
                    return max(wait, 1)
            elif response.status_code == 200 and position:  # a server that ignores ranges starts over
                file.truncate(0)
                meter.add(-position, self.target.name)
            hf_raise_for_status(response)
            length = response.headers.get("Content-Length")
            if response.status_code == 200 and length is not None and int(length) != self.size:
                raise SourceError(
                    f"{self.target.name} should have {self.size} bytes, but the answer has {length}; "
                    "something between here and the Hub answers in its place"
                )
            for block in response.iter_raw():  # as they arrive: a cut loses nothing that came before it
                file.write(block)
                meter.add(len(block), self.target.name)
        return 0

    def _check(self) -> None:
        found = _sha256(self.partial)
        if found != self.sha256:
            self.partial.unlink()
            raise SourceError(
                f"{self.target.name} arrived damaged: SHA-256 {found[:12]}… instead of {self.sha256[:12]}…; "
                "run the command again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
