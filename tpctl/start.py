"""The console script: a signal during the imports, which take half a second, is one line like any other."""

from __future__ import annotations

import sys
from contextlib import suppress


def main() -> None:
    """Run the command line."""
    try:
        from tpctl.cli.signals import take_signals

        take_signals()
        from tpctl.cli.app import main as run
    except (KeyboardInterrupt, SystemExit) as error:
        if sys.stderr is not None:
            with suppress(OSError):  # a terminal that is gone
                print("tpctl: interrupted", file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else error.code)
    run()
