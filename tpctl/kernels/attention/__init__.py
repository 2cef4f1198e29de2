"""Keys, values and attention over pages."""
