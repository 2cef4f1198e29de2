"""The version, apart from the package's face, which leads to everything."""

from __future__ import annotations

__version__ = "0.1.0"
