"""How a folder appears whole, or not at all."""
