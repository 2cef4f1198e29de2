"""Where workers keep compiled modules when the installation has none.

Importing torch compiles its thousand modules where no bytecode lies beside them, which takes seconds at every start.
That is so where packages were installed without compiling them and Python may not write what it compiles: in images
built with ``PYTHONDONTWRITEBYTECODE``, on read-only file systems, in another user's installation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import distributions
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from tpctl.checkpoint.cache import cache_root
from tpctl.errors import SourceError
from tpctl.version import __version__


def bytecode_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What to add to ``env``, a worker's environment, so that torch is compiled once and not at every start.

    Nothing, where it is compiled already, where Python will write what it compiles, or where the user has named a
    place (``PYTHONPYCACHEPREFIX``).
    """
    spec = find_spec("torch")
    if env.get("PYTHONPYCACHEPREFIX") or spec is None or spec.origin is None:
        return {}
    if Path(cache_from_source(spec.origin)).exists():
        return {}
    if not env.get("PYTHONDONTWRITEBYTECODE") and os.access(Path(spec.origin).parent, os.W_OK):
        return {}
    try:
        place = cache_root() / "bytecode" / _installation()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        safe = _only_ours(place) and _only_ours(place.parent) and os.access(place, os.W_OK)
    except (OSError, SourceError):  # a place that cannot be written to would cost the bytecode that there is
        return {}
    return {"PYTHONPYCACHEPREFIX": str(place), "PYTHONDONTWRITEBYTECODE": ""} if safe else {}


def _installation() -> str:
    """A name that changes with what is installed: files may keep their times when an image is built anew."""
    packages = sorted(f"{found.name}=={found.version}" for found in distributions())
    return blake2b("\n".join([sys.version, sys.prefix, __version__, *packages]).encode(), digest_size=8).hexdigest()


def _only_ours(folder: Path) -> bool:
    """Whether nobody else may put code there, which workers would run."""
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
