"""Figures as columns in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"

WIDTH, HEIGHT = 60, 6
"""Of what is drawn, in characters."""


def columns(title: str, values: Sequence[float], labels: Sequence[str], width: int = WIDTH) -> list[str]:
    """Lines that show ``values``, none negative, as columns from zero up.

    Args:
        labels: one for each value, below it; or two: where the first begins and the last ends.
    """
    top = _round_up(max(values, default=0.0))
    each = max(1, width // max(1, len(values)))
    gap = 1 if each > 2 else 0
    heights = [round(8 * HEIGHT * value / top) for value in values]
    axis = [f"{top:g}", *[""] * (HEIGHT - 1)]
    margin = len(axis[0])
    lines = [title]
    for row, label in enumerate(axis):
        below = 8 * (HEIGHT - 1 - row)
        drawn = "".join(_EIGHTHS[max(0, min(8, high - below))] * (each - gap) + " " * gap for high in heights)
        lines.append(f"{label:>{margin}} │{drawn}".rstrip())
    lines.append(f"{'0':>{margin}} └{'─' * (each * len(values))}")
    if len(labels) == len(values):
        below_axis = "".join(f"{label:^{each}}" for label in labels)
    else:
        below_axis = f"{labels[0]:<{each * len(values) - len(labels[1])}}{labels[1]}"
    lines.append(f"{'':>{margin}}  {below_axis}".rstrip())
    return lines


def _round_up(value: float) -> float:
    """The next number of one digit, or of two that begin with 1: what an axis ends at."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    return next((step * unit for step in steps if step * unit >= value * (1 - 1e-9)), 10 * unit)
