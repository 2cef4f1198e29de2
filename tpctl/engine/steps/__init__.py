"""A step's inputs, and captured steps."""
