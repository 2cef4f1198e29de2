"""A server for datatrove's ``InferenceRunner``, whose ``CustomServer`` starts a script with ``--port`` and options.

    InferenceConfig(
        server_type="custom", model_name_or_path="demo",
        model_kwargs={"server_script": "examples/datatrove_server.py", "model": "demo", "tp": 2, "max-model-len": 4096},
    )

is ``python examples/datatrove_server.py --port N --model=demo --tp=2 --max-model-len=4096``, and that ``tpctl serve
demo`` with the other options. ``model`` is what ``tpctl serve`` takes as MODEL; ``model_name_or_path`` must be one of
the names that it serves under (``served-model-name``, by default MODEL). tpctl must be installed beside datatrove.
"""

import argparse
import sys

from tpctl.start import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    known, options = parser.parse_known_args()
    sys.argv[1:] = ["serve", known.model, *options]
    main()
