"""The base of all layers."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """Called straight: torch's hooks, which nobody here sets, cost 2 µs a call, and a step has hundreds."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.forward(*args, **options)
