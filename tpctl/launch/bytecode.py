"""Where workers keep compiled modules when the installation has none.

Importing torch compiles its thousand modules where no bytecode lies beside them, which takes seconds at every start.
That is so where packages were installed without compiling them and Python may not write what it compiles: in images
built with ``PYTHONDONTWRITEBYTECODE``, on read-only file systems, in another user's installation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from tpctl.checkpoint.cache import cache_root
from tpctl.errors import SourceError


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
        place = cache_root() / "bytecode"
    except SourceError:
        return {}
    return {"PYTHONPYCACHEPREFIX": str(place), "PYTHONDONTWRITEBYTECODE": ""}
