"""The console script: a Ctrl-C during the imports, which take half a second, is one line like any other."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from tpctl.cli.app import main as run
    except KeyboardInterrupt:
        print("tpctl: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
