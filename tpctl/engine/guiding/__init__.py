"""Answers of a given form: grammars, followed on rank 0's host beside the steps."""
