"""Choosing tokens over a divided vocabulary."""
