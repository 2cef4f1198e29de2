"""Running steps: anywhere, and on GPUs ahead of time."""
