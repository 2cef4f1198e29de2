"""Calls of tools, told from an answer's text in the form that each family writes them in."""
