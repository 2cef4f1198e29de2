"""What a model would take, from headers alone."""
