"""Bytes on their way: files, layouts, transfers."""
