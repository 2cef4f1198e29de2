"""The environment of Python processes that tpctl starts: they import what is installed, not what lies around."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def python_environment(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` for a child that runs ``python -m …`` or ``python -c …``.

    Either puts the current folder before everything else that can be imported, so that a file ``torch.py`` which
    happens to be there would be run; ``PYTHONSAFEPATH`` keeps it out. A tpctl that is run from a checkout may have been
    found by just that folder, and is named in ``PYTHONPATH`` instead.
    """
    env = {**base, "PYTHONSAFEPATH": "1"}
    if _ROOT.name not in ("site-packages", "dist-packages"):
        known = env.get("PYTHONPATH")
        env["PYTHONPATH"] = f"{known}{os.pathsep}{_ROOT}" if known else str(_ROOT)
    return env
