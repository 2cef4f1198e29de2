"""Whether a folder holds what it says."""
