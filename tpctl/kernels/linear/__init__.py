"""Linears of few rows, and gated ones."""
