"""Programs of others that speak to ``tpctl serve``, each run with the demo model: ``python -m tests.clients.NAME``.

Each installs its program, of a version that it names, into a virtual environment of its own and says what came of it;
it ends with exit code 1 where that is not what should. docs/serve.md has what was found.
"""
