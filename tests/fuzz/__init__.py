"""A fuzzer: files, lines and options as no well-meaning hand makes them, and what tpctl may answer to them.

``case`` says what one case is, ``mutations`` how what is right becomes wrong, ``targets`` what is made wrong,
``sandbox`` runs a case in a process with limits (``server`` is its other end), ``judge`` and ``oracles`` say what is a
fault. ``pytest tests/fuzz`` runs a fixed number of cases that are the same every time, ``python -m tests.fuzz`` any
number of new ones, and prints a table.
"""
