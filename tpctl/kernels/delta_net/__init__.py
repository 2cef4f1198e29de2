"""Gated delta nets on GPUs: one token of many sequences, and prompts in chunks."""
