"""``python -m tpctl.checkpoint.gguf SOURCE FOLDER``: the process that ``convert_gguf`` starts."""

from __future__ import annotations

import sys
from pathlib import Path

from tpctl.checkpoint.gguf.convert import write_checkpoint


def main() -> int:
    try:
        write_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # anything here is the file's or the machine's fault; the parent shows one line
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{text[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
