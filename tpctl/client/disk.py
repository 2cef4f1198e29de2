"""What a disk refuses, in one line that names the next step."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpctl.errors import OutputError


@contextmanager
def writing(path: Path | None) -> Iterator[None]:
    """Turn what the system refuses into one line with the next step."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EFBIG: "files may not be that large here (ulimit -f); allow larger ones",
            errno.ENOENT: "the folder does not exist; make it first"
            if path is None or not path.parent.is_dir()
            else "that folder takes no new files; name another one",
            errno.EACCES: "no permission; name a place where you may write",
            errno.EROFS: "the disk is read-only; name a place where you may write",
        }.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot write {path or 'a temporary file'}: {hint}") from None
