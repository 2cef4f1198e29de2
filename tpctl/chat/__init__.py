"""Talking at a terminal: the loop, its commands, what is typed and what is shown."""
